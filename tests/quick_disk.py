"""Files that are in memory and not waited for: a test may kill a process, but it never switches the machine off.

What was written is in the system's memory and outlives its process. That checkpoints and exports do wait for the disk, and
when, is held by tests that put `SYNC` back.
"""

import os
import shutil
from pathlib import Path

SYNC = os.fsync
MEMORY = Path("/dev/shm")
ENOUGH = 4 << 30  # bytes; the folders of passed tests are removed at once


def never_wait() -> None:
    """Nothing that this process writes, or one that it forks, is waited for: with two workers a fifth of all time."""
    os.fsync = _not_synced


def keep_in_memory() -> None:
    """Have pytest make its folders in memory, where that has room, unless the user has said where.

    To remove a small file takes 0.3 ms of waiting on an ext4 disk that discards, and runs remove some of their files at
    every step.
    """
    if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ENOUGH:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


def _not_synced(descriptor: int) -> None:
    os.fstat(descriptor)  # that of an open file, as before
