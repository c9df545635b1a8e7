"""Forks of a process of the tests may use torch in several threads at once."""

import os
import threading

import torch

VALUES = torch.ones(200, 200)  # so many that torch would share them out


def test_threads_of_a_fork_find_a_pool() -> None:
    """Without `one_thread`, every second fork fails here."""
    VALUES + VALUES  # torch has a pool here
    for _ in range(10):
        child = os.fork()
        if child == 0:
            os._exit(_failures_of_threads())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _failures_of_threads() -> int:
    threads, failures = 4, []
    at_once = threading.Barrier(threads)

    def use_torch() -> None:
        at_once.wait()
        try:
            VALUES + VALUES
        except RuntimeError as error:
            failures.append(error)

    running = [threading.Thread(target=use_torch) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return len(failures)
