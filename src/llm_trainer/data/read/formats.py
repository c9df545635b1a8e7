"""How the rows of each format are read: a function per format, and one table of them by suffix."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from llm_trainer.config.errors import counted
from llm_trainer.data.read.errors import DataError, Location, show, unreadable

Rows = Iterator[tuple[Location, Any]]
OnError = Callable[[DataError], None]

MAX_DOCUMENT = 1 << 20  # characters; some 250k tokens, longer than any context window this package trains


def suffix_of(path: Path) -> str:
    """The suffix that names a file's format, in lower case: `.jsonl` of `rows.JSONL.gz`."""
    name = path.stem if path.suffix.lower() == ".gz" else path.name
    return Path(name).suffix.lower()


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
            raise unreadable(path, "binary data or UTF-16", fix)
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
        if _is_one_document(head, suffix_of(path)):
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
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
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
        raise unreadable(path, "a parquet file without pyarrow", "pip install 'llm_trainer[parquet]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=256)  # rows in memory at a time
            rows = chain.from_iterable(batch.to_pylist() for batch in batches)
            for number, row in enumerate(rows, start=1):
                yield Location(path, number), row
    except pyarrow.ArrowException as error:
        raise unreadable(path, f"damaged parquet data ({error})", "fetch or write the file again") from error


READERS: dict[str, Callable[[Path, str, OnError], Rows]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
}
