"""A user's own names of columns, of keys inside turns and of roles -> the names that the formats know."""

import difflib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from llm_trainer.config.options import Reading, names_files
from llm_trainer.data.read.errors import DataError, Location, show
from llm_trainer.data.read.json_text import parse_json

TURN_COLUMNS = ("messages", "conversations", "conversation")  # hold turns, or JSON text of them
PER_FILE = ("columns", "roles")  # options of `Reading` that may be said per file
_MISSING = object()
R = TypeVar("R", bound=Reading)


@dataclass(frozen=True)
class Renaming:
    """What the columns and roles of a file are called, and what they become.

    Args:
        columns: our name -> the file's column, or a path into it such as `reward.answer`. Only these columns are read. A
            name with a dot is a key of the turns in a column: `{"messages": "dialogue", "messages.role": "speaker"}`.
        roles: our role -> the file's word for it, or several.
    """

    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)  # the file's word -> our role

    @classmethod
    def of(cls, reading: Reading) -> "Renaming | None":
        """The renaming that the options of a file (`reading_of`) ask for; None: the file's names are ours."""
        assert not names_files(reading.columns) and not names_files(reading.roles)
        if not reading.columns and not reading.roles:
            return None
        roles: dict[str, str] = {}
        named: Any = reading.roles or {}
        for ours, theirs in named.items():
            for word in [theirs] if isinstance(theirs, str) else theirs:
                roles[word] = ours
        columns: Any = reading.columns or {}
        return cls(dict(columns), roles)

    def __call__(self, row: Any, location: Location) -> tuple[Any, Location]:
        """The row as the formats know it, and its place, whose keys are still called as in the file.

        Raises:
            DataError: columns are renamed, but the row has none.
        """
        renamed = row
        if self.columns:
            if not isinstance(row, dict):
                fix = "leave data_loader_config.columns out"
                raise DataError(location, show(row), "an object, as columns are renamed", fix, "wrong_type")
            location = replace(location, names=self.columns)
            renamed = {}
            for ours, theirs in self.whole_columns.items():
                value = _value_at(row, theirs)
                if value is not _MISSING:
                    renamed[ours] = self._with_renamed_keys(ours, value, location)
        if self.roles:
            renamed = self._with_renamed_roles(renamed, location)
        return renamed, location

    @property
    def whole_columns(self) -> dict[str, str]:
        """The columns without the keys of turns."""
        return {ours: theirs for ours, theirs in self.columns.items() if "." not in ours}

    def _with_renamed_keys(self, column: str, value: Any, location: Location) -> Any:
        """A list of turns whose keys are ours."""
        ours_by_theirs = {}
        for ours, theirs in self.columns.items():
            if ours.startswith(f"{column}."):
                ours_by_theirs[theirs] = ours.removeprefix(f"{column}.")
        if not ours_by_theirs:
            return value
        listed = decode_turns(column, value, location)
        if not isinstance(listed, list):
            return value
        return [_with_keys(turn, ours_by_theirs) for turn in listed]

    def _with_renamed_roles(self, row: Any, location: Location) -> Any:
        if not isinstance(row, dict):
            return _with_roles(row, self.roles)
        columns = {name: decode_turns(name, value, location) for name, value in row.items()}
        return _with_roles(columns, self.roles)

    def check(self, rows: Iterable[tuple[Location, Any]]) -> None:
        """Every renamed column must be in some row of a file; reads on until all have been seen.

        Raises:
            DataError: one is in none of them; names the nearest.
        """
        unseen, known, path = dict(self.whole_columns), dict[str, None](), Path()
        for location, row in rows:
            path = Path(location.path)
            if not isinstance(row, dict):
                continue
            known |= dict.fromkeys(row)
            unseen = {ours: theirs for ours, theirs in unseen.items() if _value_at(row, theirs) is _MISSING}
            if not unseen:
                return
        for ours, theirs in unseen.items() if known else ():
            near = difflib.get_close_matches(theirs, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else "name one of these in data_loader_config.columns (--column)"
            found = f"no column '{theirs}', which is to be '{ours}'"
            raise DataError(Location(path), found, f"one of {', '.join(known)}", fix, "no_such_column")

    def unread(self, columns: Iterable[str]) -> list[str]:
        """Those of a file's columns that no name stands for."""
        first_parts = {theirs.partition(".")[0] for theirs in self.columns.values()}
        used = first_parts | set(self.columns.values())
        return [name for name in columns if self.columns and name not in used]


# --- names per file


def reading_of(reading: R, given: Path, file: Path) -> R:
    """The options of reading one file: of columns and roles that are said per file, its own.

    An entry is for the file if it is its path, or the folder, pattern or dataset's name that was given; otherwise if it is a
    pattern that the path matches, from its end as far as the pattern goes. A file without an entry speaks our language.

    Raises:
        DataError: several patterns match.
    """
    names: dict[str, Any] = {}
    for option in PER_FILE:
        entries = getattr(reading, option)
        if names_files(entries):
            found = _entries_of(entries, given, file)
            if len(found) > 1:
                what = f"{len(found)} entries of data_loader_config.{option} ({', '.join(found)})"
                raise DataError(Location(file), what, "one at most", "name the file itself, or narrow the patterns")
            names[option] = entries[found[0]] if found else None
    return replace(reading, **names) if names else reading


def check_named_files(reading: Reading, files: Iterable[tuple[Path, Path]]) -> None:
    """Every entry of columns and roles that are said per file must be some file's.

    Args:
        reading: the options.
        files: all files of a run, as `reading_of` takes them.

    Raises:
        ValueError: an entry is nobody's; names the nearest.
    """
    pairs = list(files)
    known = list(dict.fromkeys(str(given) for given, _ in pairs))
    for option in PER_FILE:
        entries = getattr(reading, option)
        for entry in entries if names_files(entries) else ():
            if any(_is_entry(entry, given, file) for given, file in pairs):
                continue
            near = difflib.get_close_matches(entry, known, n=1)
            fix = f"did you mean {near[0]!r}?" if near else "name a path of file_dataset or eval_dataset, or a pattern"
            raise ValueError(
                f"data_loader_config.{option}: got {entry!r}, which is no file of this run; expected one of "
                f"{', '.join(known)}; {fix}"
            )


def _entries_of(entries: Mapping[str, Any], given: Path, file: Path) -> list[str]:
    """The entry that names the file, else those whose pattern it matches."""
    named = [entry for entry in entries if Path(entry) == file] or [entry for entry in entries if Path(entry) == given]
    return named or [entry for entry in entries if _is_entry(entry, given, file)]


def _is_entry(entry: str, given: Path, file: Path) -> bool:
    return Path(entry) in (file, given) or file.match(entry) or fnmatchcase(str(file), entry)


# --- inside rows


def decode_turns(column: str, value: Any, location: Location) -> Any:
    """What the JSON text of a conversation means, where a table holds it as text; any other value as it is."""
    if column in TURN_COLUMNS and isinstance(value, str) and value.lstrip().startswith("[{"):
        return parse_json(value, location.at(column))
    return value


def _with_keys(turn: Any, ours_by_theirs: Mapping[str, str]) -> Any:
    if not isinstance(turn, dict):
        return turn
    renamed = {}
    for key, value in turn.items():
        if key in ours_by_theirs:
            renamed[ours_by_theirs[key]] = value
        elif key not in ours_by_theirs.values():  # another key is meant by that name
            renamed[key] = value
    return renamed


def _value_at(row: Any, path: str) -> Any:
    """`row[path]`, or what is at `a.b.0` inside it; `_MISSING` where there is nothing."""
    if isinstance(row, dict) and path in row:
        return row[path]
    first, dot, rest = path.partition(".")
    if not dot:
        first = path
    inside: Any = _MISSING
    if isinstance(row, dict) and dot:
        inside = row.get(first, _MISSING)
    elif isinstance(row, list) and first.isdigit() and int(first) < len(row):
        inside = row[int(first)]
    return inside if inside is _MISSING or not dot else _value_at(inside, rest)


def number_at(row: Any, path: str, location: Location) -> float:
    """The number in a column of a row, or at a path into it.

    Raises:
        DataError: there is no finite number.
    """
    value = _value_at(row, path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and abs(value) <= sys.float_info.max:  # False of NaN
        return float(value)
    found = "nothing" if value is _MISSING else show(value)
    fix = "add it, name another column in data_loader_config.curriculum, or set data_loader_config.bad_rows: drop"
    raise DataError(location.at(path), found, "a number, which the curriculum sorts by", fix, "curriculum")


def _with_roles(value: Any, roles: Mapping[str, str]) -> Any:
    """The value with the roles of all turns in it called by our names."""
    if isinstance(value, list):
        return [_with_roles(item, roles) for item in value]
    if not isinstance(value, dict):
        return value
    renamed = {}
    for key, inside in value.items():
        is_role = key in ("role", "from") and isinstance(inside, str)
        renamed[key] = roles.get(inside, inside) if is_role else _with_roles(inside, roles)
    return renamed
