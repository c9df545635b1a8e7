"""Paths -> rows, one at a time, each with the place it came from.

Text formats: `.txt`, `.jsonl`/`.ndjson`, `.json`, `.csv`, `.tsv` (each also compressed, `.gz` or `.zst`), `.parquet` and
`.arrow`; a folder of them, folders in it included; a pattern; or a dataset by name (`hub.py`). Everything but a `.json` array
streams, so memory does not grow with the file.
"""

import gzip
import json
import os
import zlib
from glob import glob
from pathlib import Path

from llm_trainer.data.read.errors import DataError, Location, unreadable
from llm_trainer.data.read.formats import COMPRESSED, READERS, OnError, Rows, records, suffix_of
from llm_trainer.data.read.hub import files_of_dataset, is_named, is_streamed, stream
from llm_trainer.data.read.token_files import TOKEN_SUFFIXES

TEXT_UNITS = ("auto", "file", "paragraph", "line", "endoftext")
_FORMATS = f"a file ending in {', '.join(READERS)} (or these with {' or '.join(COMPRESSED)})"


def read_rows(path: Path | str, text_unit: str = "auto", on_error: OnError | None = None) -> Rows:
    """Yield `(location, row)` for every row of a file, or of every data file that a path stands for, in name order.

    Rows are what the format holds: an object or list per JSON line, a dict per CSV line or parquet record, and
    `{"text": ...}` per document of a `.txt`. JSON lines named `.json`, a JSON array named `.jsonl` and a gzipped file
    without `.gz` are read as what they are. Blank lines are skipped.

    Args:
        path: a file, a pattern, or a folder: its files with a known suffix, and those of the folders in it.
        text_unit: what one document of a `.txt` is. `"file"`: the whole file, cut at blank lines when it is longer than
            `MAX_DOCUMENT` characters. `"paragraph"`: text between blank lines. `"line"`: each line. `"endoftext"`: what
            ends with `<|endoftext|>`. `"auto"`: `"file"` when the first 1 Mi characters have a blank line inside (a book, a
            play), else `"line"` (names, one article per line).
        on_error: called with the error of a row that cannot be read, which is then skipped; by default it is raised.

    Raises:
        DataError: no such file, unknown suffix, damaged, without a single row, or a bad row.
    """
    if text_unit not in TEXT_UNITS:
        raise ValueError(f"text_unit is {text_unit!r}; expected one of {', '.join(TEXT_UNITS)}")
    for file in data_files(path):
        is_empty = True
        try:
            for pair in _rows_of(file, text_unit, on_error or _raise):
                is_empty = False
                yield pair
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise unreadable(file, f"damaged gzip data ({error})", "fetch or write the file again") from error
        except OSError as error:
            if suffix_of(file) == file.suffix.lower():
                raise
            raise unreadable(file, f"damaged compressed data ({error})", "fetch or write the file again") from error
        if is_empty:
            found = "no rows (the file is empty)"
            raise DataError(Location(file), found, "at least one row", "remove or refill the file")


def _rows_of(file: Path, text_unit: str, on_error: OnError) -> Rows:
    if is_streamed(file):
        return records(stream(file), file, on_error)
    return READERS[suffix_of(file)](file, text_unit, on_error)


def data_files(path: Path | str) -> list[Path]:
    """The files that `read_rows(path)` reads, in name order: the file itself, a folder's, or those of a pattern.

    A dataset that is streamed has none: its name stands for them.

    Raises:
        DataError: nothing there, an unknown suffix, a token file, or a folder without data files.
    """
    path = Path(path)
    if is_named(path):
        return files_of_dataset(path)
    if is_streamed(path):
        return [path]
    expected = f"a folder, a pattern such as data/*.jsonl, or {_FORMATS}"
    if path.is_dir():
        return _files_in(path)
    if not path.exists():
        found = _matching(path)
        if not found:
            what = "no data file that matches" if _is_pattern(path) else "no such file"
            raise DataError(Location(path), what, expected, "check the path")
        return found
    if suffix_of(path) in TOKEN_SUFFIXES:
        raise DataError(Location(path), "a token file", expected, "open it with open_tokens(path)")
    if suffix_of(path) not in READERS:
        raise DataError(Location(path), f"the suffix {path.suffix!r}", expected, "rename or convert the file")
    return [path]


def files_of(path: Path) -> list[Path]:
    """The token file itself, those of a pattern, or the files that `read_rows(path)` reads."""
    if path.suffix not in TOKEN_SUFFIXES:
        return data_files(path)
    return _matching(path) or [path]


def _is_pattern(path: Path) -> bool:
    return any(mark in str(path) for mark in "*?[")


def _matching(path: Path) -> list[Path]:
    """The data files that match a pattern (`**`: folders at any depth), in name order; none where it is no pattern."""
    if not _is_pattern(path) or path.exists():
        return []
    found: dict[Path, Path] = {}
    for name in sorted(glob(str(path), recursive=True), key=len):
        is_data = suffix_of(Path(name)) in (*READERS, *TOKEN_SUFFIXES)
        if is_data and Path(name).is_file():
            found.setdefault(Path(name).resolve(), Path(name))  # a link to a folder above leads to the same files again
    return sorted(found.values())


def _files_in(folder: Path) -> list[Path]:
    """The data files of a folder and of the folders in it; of a folder that `datasets` saved, those it lists."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        return _only_split(folder, json.loads(splits.read_text(encoding="utf-8"))["splits"])
    if _is_saved(folder):
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [folder / entry["filename"] for entry in state["_data_files"]]
    files = []
    # NOTE: a link may lead back to a folder above, so folders are known by where they really are.
    for root, folders, names in os.walk(folder, followlinks=True):
        above = Path(root).resolve()
        folders[:] = [name for name in folders if not _is_skipped(above, name)]
        for name in list(folders):
            if (above / name / "dataset_dict.json").exists() or _is_saved(above / name):
                files += _files_in(Path(root) / name)
                folders.remove(name)
        files += [Path(root) / name for name in names if suffix_of(Path(name)) in READERS and name[0] != "."]
    if not files:
        fix = "check the path; token files are named one by one, or by a pattern such as data/*.npy"
        raise DataError(Location(folder), "a folder without data files", _FORMATS, fix)
    return sorted(files)


def _is_skipped(above: Path, name: str) -> bool:
    """Whether a folder is hidden, or a link to one that it lies in."""
    return name.startswith(".") or (above / name).resolve() in (above, *above.parents)


def _is_saved(folder: Path) -> bool:
    """Whether `datasets.Dataset.save_to_disk` wrote the folder; its `.json` files are no data."""
    return (folder / "state.json").exists() and (folder / "dataset_info.json").exists()


def _only_split(folder: Path, splits: list[str]) -> list[Path]:
    if len(splits) != 1:
        found = f"a saved dataset with the splits {', '.join(splits)}"
        raise DataError(Location(folder), found, "one of them", f"name its folder, such as {folder / splits[0]}")
    return _files_in(folder / splits[0])


def _raise(error: DataError) -> None:
    raise error
