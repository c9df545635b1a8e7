"""Files -> rows, one at a time, each with the place it came from; token files -> memory-mapped arrays.

Text formats: `.txt`, `.jsonl`/`.ndjson`, `.json`, `.csv`, `.tsv` (also gzipped) and `.parquet`, or a folder of them.
Everything but a `.json` array streams, so memory does not grow with the file.
"""

import ast
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from llm_trainer.config.errors import counted
from llm_trainer.data.read.errors import DataError, Location, show
from llm_trainer.data.read.unpickle import safe_load

Rows = Iterator[tuple[Location, Any]]
OnError = Callable[[DataError], None]

TEXT_UNITS = ("auto", "file", "paragraph", "line")
MAX_DOCUMENT = 1 << 20  # characters; some 250k tokens, longer than any context window this package trains
TOKEN_SUFFIXES = (".npy", ".pkl")


def read_rows(path: Path | str, text_unit: str = "auto", on_error: OnError | None = None) -> Rows:
    """Yield `(location, row)` for every row of a file, or of every data file in a folder, in name order.

    Rows are what the format holds: an object or list per JSON line, a dict per CSV line or parquet record, and
    `{"text": ...}` per document of a `.txt`. JSON lines named `.json`, a JSON array named `.jsonl` and a gzipped file
    without `.gz` are read as what they are. Blank lines are skipped.

    Args:
        path: a file or a folder (its own files with a known suffix; folders inside it are not entered).
        text_unit: what one document of a `.txt` is. `"file"`: the whole file, cut at blank lines when it is longer than
            `MAX_DOCUMENT` characters. `"paragraph"`: text between blank lines. `"line"`: each line. `"auto"`: `"file"`
            when the first 1 Mi characters have a blank line inside (a book, a play), else `"line"` (names, one article
            per line).
        on_error: called with a row that is not valid JSON or CSV, which is then skipped; by default it is raised.

    Raises:
        DataError: no such file, unknown suffix, not UTF-8, damaged, without a single row, or a bad row.
    """
    if text_unit not in TEXT_UNITS:
        raise ValueError(f"text_unit is {text_unit!r}; expected one of {', '.join(TEXT_UNITS)}")
    for file in data_files(path):
        is_empty = True
        try:
            for pair in _READERS[_suffix(file)](file, text_unit, on_error or _raise):
                is_empty = False
                yield pair
        except UnicodeDecodeError as error:
            found = f"bytes that are not UTF-8 ({error.reason}: 0x{error.object[error.start]:02x})"
            raise _unreadable(file, found, "convert it, e.g. iconv -f <its encoding> -t utf-8") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _unreadable(file, f"damaged gzip data ({error})", "fetch or write the file again") from error
        if is_empty:
            found = "no rows (the file is empty)"
            raise DataError(Location(file), found, "at least one row", "remove or refill the file")


def data_files(path: Path | str) -> list[Path]:
    """The files that `read_rows(path)` reads: the file itself, or a folder's data files in name order.

    Raises:
        DataError: nothing there, an unknown suffix, a token file, or a folder without data files.
    """
    path = Path(path)
    known = f"a folder or a file ending in {', '.join(_READERS)} (or these with .gz)"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _suffix(file) in _READERS)
        if not files:
            raise DataError(Location(path), "a folder without data files", known, "check the path")
        return files
    if not path.exists():
        raise DataError(Location(path), "no such file", known, "check the path")
    if _suffix(path) in TOKEN_SUFFIXES:
        raise DataError(Location(path), "a token file", known, "open it with open_tokens(path)")
    if _suffix(path) not in _READERS:
        raise DataError(Location(path), f"the suffix {path.suffix!r}", known, "rename or convert the file")
    return [path]


def files_of(path: Path) -> list[Path]:
    """The token file itself, or the files that `read_rows(path)` reads."""
    return [path] if path.suffix in TOKEN_SUFFIXES else data_files(path)


def _suffix(path: Path) -> str:
    name = path.stem if path.suffix.lower() == ".gz" else path.name
    return Path(name).suffix.lower()


def _raise(error: DataError) -> None:
    raise error


def _unreadable(path: Path, found: str, fix: str) -> DataError:
    return DataError(Location(path), found, "a readable data file", fix, reason="unreadable")


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open as UTF-8 without its byte order mark, through gzip where the first bytes say so.

    `str.splitlines` would cut at U+2028, which JSON strings may contain; iterating a file cuts at line ends only.
    """
    with open(path, "rb") as file:
        opener: Callable[..., Any] = gzip.open if file.read(2) == b"\x1f\x8b" else open
    with opener(path, "rb") as stream:
        head = stream.peek(4096)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
            fix = "convert it to UTF-8 text, or give the file its right suffix"
            raise _unreadable(path, "binary data or UTF-16", fix)
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


# --- text


def _text_rows(path: Path, unit: str, on_error: OnError) -> Rows:
    with _open_text(path) as file:
        lines = _numbered_lines(file)
        if unit == "auto":
            # the start of the file decides, and is then read again
            head, size = [], 0
            while size < MAX_DOCUMENT and (pair := next(lines, None)):
                head.append(pair)
                size += len(pair[1])
            has_blank_line = re.search(r"\n[^\S\n]*\n", "".join(line for _, line in head).strip())
            lines = chain(head, lines)
            unit = "file" if has_blank_line else "line"
        for number, text in _documents(lines, unit):
            yield Location(path, number), {"text": text}


def _numbered_lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """`(number, line)`; a line beyond MAX_DOCUMENT comes in pieces, so a file without line ends streams as well."""
    number = 1
    while line := file.readline(MAX_DOCUMENT):
        yield number, line
        number += line.endswith("\n")


def _documents(lines: Iterable[tuple[int, str]], unit: str) -> Iterator[tuple[int, str]]:
    """Group lines into `(number of the first line, text)`."""
    document: list[str] = []
    first, size = 1, 0
    for number, line in lines:
        is_blank = not line.strip()
        if not document:
            first = number
        if document or not is_blank:
            document.append(line)
            size += len(line)
        at_paragraph = is_blank and (unit == "paragraph" or size >= MAX_DOCUMENT)
        # text without paragraphs still has to be cut somewhere: at a line end
        if document and (unit == "line" or at_paragraph or size >= 2 * MAX_DOCUMENT):
            if is_blank:
                document.pop()
            yield first, "".join(document).rstrip("\n")
            document, size = [], 0
    text = "".join(document).rstrip("\n")
    if text:
        yield first, text


# --- JSON


def _json_rows(path: Path, unit: str, on_error: OnError) -> Rows:
    with _open_text(path) as file:
        head = list(islice((line.strip() for line in file if line.strip()), 2))
        file.seek(0)
        if not head:
            return
        if _is_one_document(head, _suffix(path)):
            yield from _document_rows(file, path)
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                on_error(_bad_json(Location(path, number), error))
            else:
                yield Location(path, number), row


def _is_one_document(head: list[str], suffix: str) -> bool:
    """Whether the file is one JSON value rather than a value per line, judged by its first two non-blank lines."""
    try:
        value = json.loads(head[0])
    except json.JSONDecodeError:
        # a pretty-printed value breaks its lines after a bracket, comma or colon, never inside a string
        return suffix == ".json" or head[0][-1] in "[{,:"
    if len(head) > 1 or not isinstance(value, list):
        return False
    # one line with one list: in .jsonl a row may be a bare list of messages
    is_messages = bool(value) and isinstance(value[0], dict) and not value[0].keys().isdisjoint(("role", "from"))
    return suffix == ".json" or (bool(value) and isinstance(value[0], dict | list) and not is_messages)


def _document_rows(file: IO[str], path: Path) -> Rows:
    try:
        document = json.load(file)
    except json.JSONDecodeError as error:
        raise _bad_json(Location(path, error.lineno), error) from error
    rows = document if isinstance(document, list) else [document]
    for number, row in enumerate(rows, start=1):
        yield Location(path, number), row


def _bad_json(location: Location, error: json.JSONDecodeError) -> DataError:
    text = error.doc[max(error.pos - 40, 0) : error.pos + 10]
    found = f"broken JSON ({error.msg} at line {error.lineno}, column {error.colno}, near {show(text)})"
    return DataError(location, found, "one complete JSON value", "repair or delete it; it may be cut short", "bad_json")


# --- tables


def _csv_rows(path: Path, unit: str, on_error: OnError) -> Rows:
    csv.field_size_limit(2**31 - 1)  # documents are longer than csv's default of 128 KiB a cell
    delimiter = "\t" if _suffix(path) == ".tsv" else ","
    with _open_text(path, newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = next(reader, [])
        line = reader.line_num + 1
        while True:
            location = Location(path, line)
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(location, f"broken CSV ({error})", "closed quotes", "repair the row") from error
            line = reader.line_num + 1
            if len(cells) == len(header):
                yield location, dict(zip(header, cells, strict=True))
            elif cells:
                fix = "quote cells that contain the delimiter, and give the file a header line"
                on_error(DataError(location, counted(len(cells), "cell"), f"{len(header)}, as in the header", fix))


def _parquet_rows(path: Path, unit: str, on_error: OnError) -> Rows:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise _unreadable(path, "a parquet file without pyarrow", "pip install 'llm_trainer[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)  # rows in memory at a time
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield Location(path, number), row
    except pyarrow.ArrowException as error:
        raise _unreadable(path, f"damaged parquet data ({error})", "fetch or write the file again") from error


_READERS: dict[str, Callable[[Path, str, OnError], Rows]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}


# --- token files

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
        raise _unreadable(path, f"a damaged .npy ({error})", "write it again with numpy.save") from error


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
    try:
        ids = np.asarray(value) if len(value) else np.empty(0, np.int64)
    except (ValueError, TypeError):  # nested to different depths, or not a sequence
        ids = np.empty(0)
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or (ids.size and ids.min() < 0):
        raise DataError(location, show(value), "a flat list of non-negative integers", "store token ids")
    return ids
