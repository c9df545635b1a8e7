"""Which files a run reads: a path, a list of paths, or an object that names them one after another."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Protocol, runtime_checkable

from pydantic import BeforeValidator


@runtime_checkable
class PathSequence(Protocol):
    """Anything that names files by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class FileDataset:
    """Files that are visited one after another. Subclass it to name (or to fetch) a file only when its turn comes."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]] = ()) -> None:
        self.paths = [os.fspath(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str:
        return self.paths[index]

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


def _files(value: object) -> PathSequence:
    """A path, a list of paths, or an object with `__len__` and `__getitem__(i) -> path`, as the last of the three."""
    if isinstance(value, str | os.PathLike):
        return FileDataset([value])
    if isinstance(value, list | tuple) and value and all(isinstance(path, str | os.PathLike) for path in value):
        return FileDataset(value)
    if isinstance(value, PathSequence) and not isinstance(value, list | tuple | bytes | Mapping):
        return value
    raise ValueError(
        f"got {value!r}, expected a path, a list of paths, or an object with __len__ and __getitem__(i) -> path"
    )


Files = Annotated[Any, BeforeValidator(_files)]
