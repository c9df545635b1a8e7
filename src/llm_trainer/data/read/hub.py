"""Datasets by name, through the Hugging Face `datasets` library: the Arrow files that it keeps of them, or a stream.

`hf:` names the files, which the library downloads, converts and keeps; a later run finds them. Of `hf-stream:` nothing is kept
but the token store: rows are tokenized while they come.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_trainer.data.read.errors import DataError, Location, unreadable

PREFIX, STREAM_PREFIX = "hf:", "hf-stream:"
ROWS_AT_ONCE = 256


def is_named(path: Path) -> bool:
    """Whether a path is the name of a dataset: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`."""
    return str(path).startswith(PREFIX)


def is_streamed(path: Path) -> bool:
    """Whether a path is the name of a dataset that is to be streamed, `hf-stream:` before the same."""
    return str(path).startswith(STREAM_PREFIX)


def files_of_dataset(path: Path) -> list[Path]:
    """The Arrow files of one split of a dataset; the library fetches and converts it first, if it has not yet.

    Args:
        path: `hf:NAME:CONFIG:SPLIT`; the name is one of the hub, or a folder that the library can load. Without a split, the
            only one there is; without a configuration, the default one.

    Raises:
        DataError: the library is not installed or refuses the dataset, or there are several splits and none is named.
    """
    name, config, _ = _parts(path)
    datasets = _import(path)
    try:
        found: Any = datasets.load_dataset(name, config)
    except Exception as error:  # whatever the library, its readers and the network raise
        raise _does_not_load(path, error) from error
    return [Path(file["filename"]) for file in found[_split_of(path, found)].cache_files]


def stream(path: Path) -> Iterator[Any]:
    """The rows of one split of a dataset as Arrow's record batches, as they come; nothing is kept.

    Raises:
        DataError: as `files_of_dataset`; or the stream broke off.
    """
    found = _streams(path)[1]
    dataset = found[_split_of(path, found)].with_format("arrow")
    num_rows = 0
    try:
        for table in dataset.iter(batch_size=ROWS_AT_ONCE):
            yield from table.to_batches()
            num_rows += len(table)
    except Exception as error:  # of the library, its readers or the network
        what = f"the stream broke off behind row {num_rows} ({_first_line(error)})"
        raise DataError(Location(path), what, "all rows", "check the network, and start again", "unreadable") from error


def fingerprint(path: Path) -> str:
    """What a stream's rows depend on: which files of which revision, or of which time, and what reads them."""
    builder, found = _streams(path)
    split = _split_of(path, found)
    files = (builder.config.data_files or {}).get(split)
    facts = [split, builder.hash, builder.config_id, list(files or ()), getattr(files, "origin_metadata", None)]
    return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def _streams(path: Path) -> tuple[Any, Any]:
    """What the library reads a dataset with, and its streams by split."""
    name, config, _ = _parts(path)
    datasets = _import(path)
    try:
        builder = datasets.load_dataset_builder(name, config)
        return builder, builder.as_streaming_dataset()
    except Exception as error:  # whatever the library and the network raise
        raise _does_not_load(path, error) from error


def _import(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise unreadable(
            path, "the name of a dataset, without `datasets`", "pip install 'llm_trainer[datasets]'"
        ) from error
    return datasets


def _does_not_load(path: Path, error: Exception) -> DataError:
    found = f"a dataset that `datasets` cannot load ({_first_line(error)})"
    return unreadable(path, found, "check name, network and login")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _split_of(path: Path, found: Any) -> str:
    """The split that is named, or the only one there is."""
    name, _, split = _parts(path)
    if split is None and len(found) == 1:
        (split,) = found
    if split not in found:
        example = f"{_prefix_of(path)}{name}:{next(iter(found))}"
        raise DataError(Location(path), f"the splits {', '.join(found)}", "one of them", f"name it, such as {example}")
    return str(split)


def _prefix_of(path: Path) -> str:
    return STREAM_PREFIX if is_streamed(path) else PREFIX


def _parts(path: Path) -> tuple[str, str | None, str | None]:
    """Name, configuration and split.

    A part of a split, such as `train[:10%]`, is refused: its files hold all of it.
    """
    prefix = _prefix_of(path)
    name, *rest = str(path).removeprefix(prefix).split(":")
    if not name or len(rest) > 2 or not all(re.fullmatch(r"[\w.-]+", part) for part in rest):
        expected = f"{prefix}NAME, {prefix}NAME:SPLIT or {prefix}NAME:CONFIG:SPLIT"
        raise DataError(Location(path), f"the source '{path}'", expected, "name a whole split")
    split = rest.pop() if rest else None
    config = rest.pop() if rest else None
    return name, config, split
