"""Files that are not waited for: a test may kill a process, but it never switches the machine off.

What was written is in the system's memory and outlives its process. That checkpoints and exports do wait for the disk, and
when, is held by tests that put `SYNC` back.
"""

import os

SYNC = os.fsync


def never_wait() -> None:
    """Nothing that this process writes, or one that it forks, is waited for: with two workers a fifth of all time."""
    os.fsync = _not_synced


def _not_synced(descriptor: int) -> None:
    os.fstat(descriptor)  # that of an open file, as before
