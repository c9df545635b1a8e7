"""One thread of torch for a process of the tests, and for each that it forks.

The models of the tests are tiny: one thread is faster than several that wait for each other.
"""

import os


def use_one_thread() -> None:
    """Do so in this process, and at the beginning of every fork.

    torch makes its pool of threads anew when a fork first asks for it, and several threads that ask at once may find
    none: "Invalid thread pool!". transformers loads a checkpoint in such threads.
    """
    import torch

    torch.set_num_threads(1)
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
