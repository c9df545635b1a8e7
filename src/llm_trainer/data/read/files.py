"""Paths -> rows, one at a time, each with the place it came from.

Text formats: `.txt`, `.jsonl`/`.ndjson`, `.json`, `.csv`, `.tsv` (also gzipped) and `.parquet`, or a folder of them.
Everything but a `.json` array streams, so memory does not grow with the file.
"""

import gzip
import zlib
from pathlib import Path

from llm_trainer.data.read.errors import DataError, Location, unreadable
from llm_trainer.data.read.formats import READERS, OnError, Rows, suffix_of
from llm_trainer.data.read.token_files import TOKEN_SUFFIXES

TEXT_UNITS = ("auto", "file", "paragraph", "line")


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
            for pair in READERS[suffix_of(file)](file, text_unit, on_error or _raise):
                is_empty = False
                yield pair
        except UnicodeDecodeError as error:
            found = f"bytes that are not UTF-8 ({error.reason}: 0x{error.object[error.start]:02x})"
            raise unreadable(file, found, "convert it, e.g. iconv -f <its encoding> -t utf-8") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise unreadable(file, f"damaged gzip data ({error})", "fetch or write the file again") from error
        if is_empty:
            found = "no rows (the file is empty)"
            raise DataError(Location(file), found, "at least one row", "remove or refill the file")


def data_files(path: Path | str) -> list[Path]:
    """The files that `read_rows(path)` reads: the file itself, or a folder's data files in name order.

    Raises:
        DataError: nothing there, an unknown suffix, a token file, or a folder without data files.
    """
    path = Path(path)
    known = f"a folder or a file ending in {', '.join(READERS)} (or these with .gz)"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and suffix_of(file) in READERS)
        if not files:
            raise DataError(Location(path), "a folder without data files", known, "check the path")
        return files
    if not path.exists():
        raise DataError(Location(path), "no such file", known, "check the path")
    if suffix_of(path) in TOKEN_SUFFIXES:
        raise DataError(Location(path), "a token file", known, "open it with open_tokens(path)")
    if suffix_of(path) not in READERS:
        raise DataError(Location(path), f"the suffix {path.suffix!r}", known, "rename or convert the file")
    return [path]


def files_of(path: Path) -> list[Path]:
    """The token file itself, or the files that `read_rows(path)` reads."""
    return [path] if path.suffix in TOKEN_SUFFIXES else data_files(path)


def _raise(error: DataError) -> None:
    raise error
