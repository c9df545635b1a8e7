"""The folder of token stores: what a store is found again by, and what lies there.

One folder for all runs of a user, so that a file is tokenized once and not once per run. A store is found by what it was made
of and how, and by nothing else: not by the file's path, so that a copy or another mount finds it too.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_trainer.config.env import environment
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.read.hub import fingerprint, is_streamed
from llm_trainer.disk import bytes_in, remove

HASHED_WHOLE = 16 << 20  # bytes of a file up to which all of it is in its key
SAMPLED_BLOCKS, SAMPLED_BLOCK = 256, 16 << 10  # of larger ones
PACKAGE = Path(__file__).parent
# The code that decides what a row becomes.
ENCODERS = (
    "read/**/*.py",
    "encode/**/*.py",
    "kinds/**/*.py",
    "ids.py",
    "unused.py",
    "images.py",
    "vision.py",
    "provided.py",
)


def default_folder() -> Path:
    """Where token stores lie unless a run names another folder (`LLM_TRAINER_CACHE`).

    Raises:
        ValueError: the user has no home folder.
    """
    wanted = Path(environment().cache_dir)
    try:
        return wanted.expanduser() / "stores"
    except RuntimeError as error:
        raise ValueError(f"{wanted}: {error}; expected a folder for tokenized data; set LLM_TRAINER_CACHE") from error


# --- what a store is found by


def key_of(path: Path, how: Sequence[Any], functions: Sequence[Callable[..., Any] | None], chat: ChatFormat) -> str:
    """Hash of everything that the encoding of a file depends on.

    Args:
        path: the file, or the name of a dataset that is streamed.
        how: options of reading and encoding.
        functions: that read and encode its rows; of those from outside this package the code counts.
        chat: its tokenizer, template and options count.
    """
    if is_streamed(path):
        file: list[Any] = [str(path), fingerprint(path)]
    else:
        file = ["".join(path.suffixes), path.stat().st_size, hash_of_content(path)]
    code = [hash_of_our_code(), *map(_hash_of_foreign_code, functions)]
    everything = [file, how, code, chat.facts()]
    return hashlib.sha256(json.dumps(everything, default=str).encode()).hexdigest()[:16]


def hash_of_content(path: Path) -> str:
    """Hash of a file's content; of a large one of its time, its head, its tail and blocks spread evenly over it.

    Size and time stamp alone miss an edit of equal size by a program that restores the time, or on a disk of coarse times.
    """
    stat, found = path.stat(), hashlib.sha256()
    with path.open("rb") as file:
        if stat.st_size <= HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        found.update(str(stat.st_mtime_ns).encode())
        starts = np.linspace(0, stat.st_size - SAMPLED_BLOCK, SAMPLED_BLOCKS).astype(int)
        for start in starts.tolist():
            file.seek(start)
            found.update(file.read(SAMPLED_BLOCK))
    return found.hexdigest()


@lru_cache
def hash_of_our_code() -> str:
    """Hash of the code that decides what a row becomes: nobody has to remember to raise a version."""
    found = hashlib.sha256()
    for pattern in ENCODERS:
        for file in sorted(PACKAGE.glob(pattern)):
            found.update(file.read_bytes())
    return found.hexdigest()


def _hash_of_foreign_code(function: Callable[..., Any] | None) -> str:
    """Hash of the file that a function of a user's stands in; '' for ours."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__module__", None) or ""
    if function is None or name.partition(".")[0] == __package__.partition(".")[0]:
        return ""
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is not None and Path(file).is_file():
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    code = getattr(function, "__code__", None)  # typed into a notebook
    return hashlib.sha256(repr((code and code.co_code, code and code.co_consts)).encode()).hexdigest()


# --- what lies there


@dataclass(frozen=True)
class Entry:
    """A finished store in a folder of them."""

    folder: Path
    source: str  # the file that it was made of
    bytes: int
    days: float  # since it was used

    def remove(self) -> None:
        """Remove it; runs that have opened it go on."""
        remove(self.folder)


def entries(cache: Path) -> Iterator[Entry]:
    """The finished stores in a folder, those used last first."""
    found = []
    for meta in cache.glob("*/meta.json"):
        folder = meta.parent
        if ".building-" in folder.name:
            continue
        days = (time.time() - folder.stat().st_mtime) / 86400
        found.append(Entry(folder, TokenStore(folder).meta.get("source", ""), bytes_in(folder), max(days, 0.0)))
    return iter(sorted(found, key=lambda entry: entry.days))
