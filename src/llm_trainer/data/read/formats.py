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
from llm_trainer.data.read.errors import DataError, Location, unreadable
from llm_trainer.data.read.json_text import not_utf8, parse_array, parse_json

Rows = Iterator[tuple[Location, Any]]
OnError = Callable[[DataError], None]

COMPRESSED = (".gz", ".zst")
END_OF_TEXT = "<|endoftext|>"  # what many corpora put between documents
MAX_DOCUMENT = 1 << 20  # characters; some 250k tokens, longer than any context window this package trains


def suffix_of(path: Path) -> str:
    """The suffix that names a file's format, in lower case: `.jsonl` of `rows.JSONL.gz`."""
    name = path.stem if path.suffix.lower() in COMPRESSED else path.name
    return Path(name).suffix.lower()


@contextmanager
def _open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Open as UTF-8 without its byte order mark, decompressed where the first bytes say so.

    `str.splitlines` would cut at U+2028, which JSON strings may contain; iterating a file cuts at line ends only.
    """
    with _open_bytes(path) as stream:
        head = stream.peek(4096)
        if head[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in head:
            fix = "convert it to UTF-8 text, or give the file its right suffix"
            raise unreadable(path, "binary data or UTF-16", fix)
        # NOTE: a byte that is not UTF-8 becomes half of a surrogate pair, so that its row can be named.
        yield io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def _open_bytes(path: Path) -> Any:
    """A buffered reader of what a file holds, perhaps compressed."""
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic[:2] == b"\x1f\x8b":
        return gzip.open(path, "rb")
    if magic == b"\x28\xb5\x2f\xfd":
        pyarrow = import_pyarrow(path, "a .zst file")
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return open(path, "rb")


def import_pyarrow(path: Path, what: str) -> Any:
    """pyarrow, which reads what Python alone does not.

    Raises:
        DataError: it is not installed.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise unreadable(path, f"{what} without pyarrow", "pip install 'llm_trainer[parquet]'") from error
    return pyarrow


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
        documents = _ended_documents(lines) if unit == "endoftext" else _documents(lines, unit)
        for number, text in documents:
            undecodable = not_utf8(text, Location(path, number))
            if undecodable is not None:
                on_error(undecodable)
            else:
                yield Location(path, number), {"text": text}


def _numbered_lines(file: IO[str]) -> Iterator[tuple[int, str]]:
    """`(number, line)`; a line beyond MAX_DOCUMENT comes in pieces, so a file without line ends streams as well."""
    number = 1
    while line := file.readline(MAX_DOCUMENT):
        yield number, line
        number += line.endswith("\n")


def split_documents(text: str) -> list[str]:
    """The documents of a text in which each but the last ends with `<|endoftext|>`; empty ones are left out."""
    return [piece.strip("\n") for piece in text.split(END_OF_TEXT) if piece.strip()]


def _ended_documents(lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Group lines into `(number of the first line, text)` of documents that end with `<|endoftext|>`, anywhere in a line."""
    text, first = "", 1
    for number, line in lines:
        if not text.strip():
            text, first = "", number
        looked_at = max(0, len(text) - len(END_OF_TEXT))  # a mark may lie in two pieces of a long line
        text += line
        if text.find(END_OF_TEXT, looked_at) >= 0:
            *ended, text = text.split(END_OF_TEXT)
        elif len(text) >= 2 * MAX_DOCUMENT:  # text without any end still has to be cut somewhere
            stop = len(text)
            if not text.endswith("\n"):
                stop -= len(END_OF_TEXT)
            ended, text = [text[:stop]], text[stop:]
        else:
            continue
        for document in ended:
            if document.strip():
                yield first, document.strip("\n")
            first = number
    if text.strip():
        yield first, text.strip("\n")


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
    if not head:
        return
    with _open_text(path) as file:
        if _is_one_document(head, suffix_of(path)):
            yield from _document_rows(file.read(), path, on_error)
            return
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = parse_json(line, Location(path, number))
            except DataError as error:
                on_error(error)
            else:
                yield Location(path, number), row


def _is_one_document(head: list[str], suffix: str) -> bool:
    """Whether the file is one JSON value rather than a value per line, judged by its first two non-blank lines."""
    try:
        value = json.loads(head[0])
    except (ValueError, RecursionError):
        # a pretty-printed value breaks its lines after a bracket, comma or colon, never inside a string
        return suffix == ".json" or head[0][-1] in "[{,:"
    if len(head) > 1 or not isinstance(value, list):
        return False
    # one line with one list: in .jsonl a row may be a bare list of messages
    is_messages = bool(value) and isinstance(value[0], dict) and not value[0].keys().isdisjoint(("role", "from"))
    return suffix == ".json" or (bool(value) and isinstance(value[0], dict | list) and not is_messages)


def _document_rows(text: str, path: Path, on_error: OnError) -> Rows:
    if not text.lstrip().startswith("["):
        yield Location(path, 1), parse_json(text, Location(path))
        return
    for number, row in parse_array(text, Location(path)):
        if isinstance(row, DataError):
            on_error(row)
        else:
            yield Location(path, number), row


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
            undecodable = not_utf8("\n".join(cells), location)
            if undecodable is not None:
                on_error(undecodable)
            elif len(cells) == len(header):
                yield location, dict(zip(header, cells, strict=True))
            elif cells:
                fix = "quote cells that contain the delimiter, and give the file a header line"
                on_error(DataError(location, counted(len(cells), "cell"), f"{len(header)}, as in the header", fix))


def _parquet_rows(path: Path, unit: str, on_error: OnError) -> Rows:
    pyarrow = import_pyarrow(path, "a parquet file")
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from records(file.iter_batches(batch_size=256), path, on_error)  # rows in memory at a time
    except pyarrow.ArrowException as error:
        raise unreadable(path, f"damaged parquet data ({error})", "fetch or write the file again") from error


def _arrow_rows(path: Path, unit: str, on_error: OnError) -> Rows:
    """Arrow's format between processes (IPC), as a file or as a stream; `datasets` saves the latter."""
    pyarrow = import_pyarrow(path, "an Arrow file")
    try:
        with pyarrow.memory_map(str(path)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                file = pyarrow.ipc.open_file(source)
                batches = map(file.get_batch, range(file.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(source))
            yield from records(batches, path, on_error)
    except pyarrow.ArrowException as error:
        raise unreadable(path, f"damaged Arrow data ({error})", "fetch or write the file again") from error


def records(batches: Iterable[Any], path: Path, on_error: OnError) -> Rows:
    """The rows of Arrow's record batches, each as a dict."""
    number = 0
    for batch in batches:
        for first in range(0, len(batch), 256):  # rows in memory at a time
            some = batch.slice(first, 256)
            try:
                rows = some.to_pylist()
            except UnicodeDecodeError:
                rows = [None] * len(some)  # one of them cannot be read: each is read again alone
            for i, row in enumerate(rows):
                number += 1
                if row is not None:
                    yield Location(path, number), row
                    continue
                try:
                    yield Location(path, number), some.slice(i, 1).to_pylist()[0]
                except UnicodeDecodeError as error:
                    found = f"bytes that are not UTF-8 ({error.reason}: 0x{error.object[error.start]:02x})"
                    on_error(DataError(Location(path, number), found, "UTF-8 text", "repair the row", "not_utf8"))


READERS: dict[str, Callable[[Path, str, OnError], Rows]] = {
    ".txt": _text_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
