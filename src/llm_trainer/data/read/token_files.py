"""Token files: rows of ids that were made elsewhere, memory mapped where they can be."""

import ast
from array import array
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llm_trainer.data.read.errors import DataError, Location, show, unreadable
from llm_trainer.data.read.unpickle import safe_load

TOKEN_SUFFIXES = (".npy", ".pkl")
TokenKind = Literal["sequences", "preference", "prompt"]
_COLUMNS: dict[TokenKind, tuple[str, ...]] = {  # the first column decides the kind
    "preference": ("chosen", "rejected"),
    "prompt": ("prompt", "answer"),  # the answer may be missing
    "sequences": ("input_ids",),
}


@dataclass(frozen=True)
class TokenFile:
    """Rows of token ids that were made elsewhere; `token_file[i]` is row i."""

    path: Path
    kind: TokenKind  # of the rows' columns, `_COLUMNS`; a flat .npy is one long row
    rows: np.ndarray | Sequence[Any]  # a memory-mapped array [rows, length], or what the pickle held

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        """Row i: column -> ids `[length]`, integers; memory-mapped rows are not copied.

        Raises:
            DataError: a missing column, or ids that are no flat list of non-negative integers.
        """
        location, row = Location(self.path, i + 1), self.rows[i]
        if not isinstance(row, dict):
            row = {"input_ids": row}
        columns = [name for name in _COLUMNS[self.kind] if name in row or name != "answer"]
        return {name: _token_ids(row.get(name), location.at(name)) for name in columns}


def open_tokens(path: Path | str) -> TokenFile:
    """Open a `.npy` or `.pkl` of token ids.

    Plain arrays are memory mapped: opening and reading cost the same memory at any size. Pickles and object arrays are
    loaded whole by `safe_load`, which refuses everything that is not plain data. Accepted are: a flat array of ids, an
    array `[rows, length]`, a list of ids, a list of id lists, a list of `{"chosen", "rejected"}`,
    `{"prompt", "answer"}` or `{"input_ids"}` dicts, or one dict of such columns.

    Raises:
        DataError: no such file, damaged, empty, unsafe, or not token ids.
    """
    path = Path(path)
    if not path.is_file() or path.suffix not in TOKEN_SUFFIXES:
        raise DataError(Location(path), "no such token file", "a .npy or .pkl file", "check the path")
    value = _load_npy(path) if path.suffix == ".npy" else safe_load(path)
    rows = _token_rows(value, Location(path))
    if len(rows) == 0 or (isinstance(rows, np.ndarray) and rows.size == 0):
        raise DataError(Location(path), "no token ids", "at least one row", "remove or refill the file")
    if not isinstance(rows[0], dict):
        return TokenFile(path, "sequences", rows)
    for kind, columns in _COLUMNS.items():
        if columns[0] in rows[0]:
            return TokenFile(path, kind, rows)
    expected = " or ".join(f"'{columns[0]}'" for columns in _COLUMNS.values())
    raise DataError(Location(path, 1), f"the keys {list(rows[0])}", expected, "rename the keys")


def _load_npy(path: Path) -> Any:
    """Memory map a plain array; unpickle an object array safely, past the header that says it is one.

    The format: magic, version, header length, a Python literal
    (https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html).
    """
    try:
        with open(path, "rb") as file:
            is_npy = file.read(6) == b"\x93NUMPY"
            major = file.read(2)[:1]
            size_of_length = 2 if major == b"\x01" else 4
            length = int.from_bytes(file.read(size_of_length), "little")
            if not is_npy or length > 10_000:  # numpy's own bound on a header
                raise ValueError("not a .npy header")
            encoding = "utf-8" if major == b"\x03" else "latin1"
            header = ast.literal_eval(file.read(length).decode(encoding))
            if header["descr"] == "|O":
                return safe_load(path, offset=file.tell())
            if 0 in header["shape"]:
                return []  # an empty file cannot be memory mapped
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except DataError:
        raise
    except (ValueError, SyntaxError, KeyError, TypeError, EOFError) as error:
        raise unreadable(path, f"a damaged .npy ({error})", "write it again with numpy.save") from error


def _token_rows(value: Any, location: Location) -> np.ndarray | Sequence[Any]:
    """What a token file held, as rows: an integer array `[rows, length]` or a sequence of id lists or dicts."""
    if isinstance(value, np.ndarray) and value.dtype.hasobject:
        value = value.tolist()
    if isinstance(value, dict):  # columns of rows, or a single row
        if not all(isinstance(column, list | tuple | np.ndarray) and len(column) for column in value.values()):
            raise DataError(location, show(value), "a dict of id lists", "store lists of token ids")
        is_columns = all(isinstance(column[0], list | tuple | np.ndarray) for column in value.values())
        if is_columns and len({len(column) for column in value.values()}) > 1:
            raise DataError(location, "columns of different lengths", "one entry per row in each", "repair the columns")
        if not is_columns:
            return [value]
        return [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if isinstance(value, list | tuple) and value and isinstance(value[0], int | np.integer):
        value = _token_ids(value, location)
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "iu" or value.ndim not in (1, 2):
            found = f"an array of {value.dtype} with shape {value.shape}"
            raise DataError(location, found, "integers of shape [tokens] or [rows, length]", "save token ids")
        return value[None] if value.ndim == 1 else value
    if not isinstance(value, list | tuple):
        raise DataError(location, show(value), "token ids, or a list of id lists or dicts", "save a list")
    return value


def _token_ids(value: Any, location: Location) -> np.ndarray:
    """Ids `[length]` as an integer array; only ids that came through a pickle are scanned for negative ones."""
    if isinstance(value, np.memmap):
        return value
    ids = np.empty(0)
    if isinstance(value, np.ndarray):
        ids = value
    elif isinstance(value, list | tuple) and (not value or type(value[0]) is not bool):
        # NOTE: `np.asarray` would go into lists inside the list, without end where one contains itself.
        with suppress(TypeError, OverflowError):  # something else than integers
            ids = np.array(array("q", value))
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or (ids.size and ids.min() < 0):
        raise DataError(location, show(value), "a flat list of non-negative integers", "store token ids")
    return ids
