"""A disk that can be filled, for tests; `small_disk` of the conftest mounts it."""

from collections.abc import Callable
from pathlib import Path

SmallDisk = Callable[[int], Path]


def fill(disk: Path) -> None:
    """Take all the space that is left."""
    with (disk / "filler").open("ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass
