"""Datasets by name, through the Hugging Face `datasets` library: the Arrow files that it keeps of them."""

import re
from pathlib import Path
from typing import Any

from llm_trainer.data.read.errors import DataError, Location, unreadable

PREFIX = "hf:"


def is_named(path: Path) -> bool:
    """Whether a path is the name of a dataset: `hf:NAME`, `hf:NAME:SPLIT` or `hf:NAME:CONFIG:SPLIT`."""
    return str(path).startswith(PREFIX)


def files_of_dataset(path: Path) -> list[Path]:
    """The Arrow files of one split of a dataset; the library fetches and converts it first, if it has not yet.

    Args:
        path: `hf:NAME:CONFIG:SPLIT`; the name is one of the hub, or a folder that the library can load. Without a split, the
            only one there is; without a configuration, the default one.

    Raises:
        DataError: the library is not installed or refuses the dataset, or there are several splits and none is named.
    """
    name, config, split = _parts(path)
    try:
        import datasets
    except ImportError as error:
        raise unreadable(
            path, "the name of a dataset, without `datasets`", "pip install 'llm_trainer[datasets]'"
        ) from error
    try:
        found: Any = datasets.load_dataset(name, config)
    except Exception as error:  # whatever the library, its readers and the network raise
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise unreadable(
            path, f"a dataset that `datasets` cannot load ({what})", "check name, network and login"
        ) from error
    if split is None and len(found) == 1:
        (split,) = found
    if split not in found:
        example = f"{PREFIX}{name}:{next(iter(found))}"
        raise DataError(Location(path), f"the splits {', '.join(found)}", "one of them", f"name it, such as {example}")
    return [Path(file["filename"]) for file in found[split].cache_files]


def _parts(path: Path) -> tuple[str, str | None, str | None]:
    """Name, configuration and split.

    A part of a split, such as `train[:10%]`, is refused: its files hold all of it.
    """
    name, *rest = str(path).removeprefix(PREFIX).split(":")
    if not name or len(rest) > 2 or not all(re.fullmatch(r"[\w.-]+", part) for part in rest):
        expected = f"{PREFIX}NAME, {PREFIX}NAME:SPLIT or {PREFIX}NAME:CONFIG:SPLIT"
        raise DataError(Location(path), f"the source '{path}'", expected, "name a whole split")
    split = rest.pop() if rest else None
    config = rest.pop() if rest else None
    return name, config, split
