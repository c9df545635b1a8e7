"""Where a piece of data is, and the errors that name the place, what was found there, what was expected and the fix."""

import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlevel = 3


@dataclass(frozen=True)
class Location:
    """A place in the data: a file, a row of it, and a key inside that row."""

    path: Path | str  # the file, or whatever the user would recognise the source by
    row: int | None = None  # from 1: line in text formats, element elsewhere; None: the file as a whole
    key: str = ""  # the path inside the row, such as `messages[2].role`
    notes: Counter[str] | None = field(default=None, compare=False, repr=False)  # where `note` counts; None: nowhere
    names: Mapping[str, str] | None = field(default=None, compare=False, repr=False)  # column -> as the file calls it
    takes_images: bool = field(
        default=False, compare=False, repr=False
    )  # turns may show images; False: that is an error

    def at(self, key: str | int) -> "Location":
        """The same place, one step deeper: a key of an object or an index of a list."""
        if isinstance(key, int):
            deeper = f"{self.key}[{key}]"
        elif self.key:
            deeper = f"{self.key}.{key}"
        else:
            deeper = key if self.names is None else self.names.get(key, key)
        # Some ten times a row: `dataclasses.replace` takes three times as long.
        return Location(self.path, self.row, deeper, self.notes, self.names, self.takes_images)

    def note(self, text: str, count: int = 1) -> None:
        """Count something about this row that is no error and must not be silent: `turn: an empty answer, ...`.

        Args:
            text: what is counted, a colon, and what is said of it; the same words for every row.
            count: how many of it there are here.
        """
        if self.notes is not None and count:
            self.notes[text] += count

    def note_all(self, notes: Counter[str]) -> None:
        """`note` each of several."""
        for text, count in notes.items():
            self.note(text, count)

    def __str__(self) -> str:
        return str(self.path) if self.row is None else f"{self.path}:{self.row}"


class DataError(ValueError):
    """Data that cannot be used, with everything needed to repair it.

    Attributes:
        location: where; `location.row is None` when the whole file is unusable, so a caller that counts and drops bad
            rows knows which errors it may survive.
        reason: a short machine-readable word for counting.
    """

    def __init__(self, location: Location, found: str, expected: str, fix: str, reason: str = "malformed") -> None:
        key = f" key '{location.key}':" if location.key else ""
        super().__init__(f"{location}:{key} found {found}; expected {expected}; fix: {fix}")
        self.location = location
        self.reason = reason
        self.said = (replace(location, notes=None), found, expected, fix, reason)

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross process borders, where `Exception` would rebuild them from the message alone."""
        return type(self), self.said


def unreadable(path: Path | str, found: str, fix: str) -> DataError:
    """The error for a file of which no row can be read."""
    return DataError(Location(path), found, "a readable data file", fix, reason="unreadable")


class DroppedRow(DataError):
    """A row that is well formed but has nothing to teach (a tie, an empty answer): count `reason`, go on."""


def show(value: object) -> str:
    """A short description of a value for an error message: its type and the start of it."""
    if value is None:
        return "null"
    return f"{type(value).__name__} {_REPR.repr(value)}"
