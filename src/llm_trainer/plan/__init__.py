"""Planning a run for machines that are not here: what it keeps in memory, how long a step takes, what to choose.

Pure arithmetic on a model's shape; nothing is allocated and nothing is started.
"""
