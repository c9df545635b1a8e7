"""What ends a command with exit code 1: neither the configuration nor the data was wrong."""


class RunFailed(Exception):
    """A run that started and could not go on; the message says why."""
