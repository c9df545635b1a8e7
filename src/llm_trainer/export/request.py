"""What a format is given, and what it hands back: see `formats.py`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from llm_trainer.export.gate import Limits
from llm_trainer.export.probe import Asked, Probe
from llm_trainer.export.source import Source


@dataclass(frozen=True)
class Request:
    """What is to be exported, and how.

    Attributes:
        source: the model.
        folder: empty; it gets its final name when the gate has passed, and is removed when it has not.
        dtype: that weights are to be written in; None: as they are.
        quantize: in how few bits, in the words of the format; None: in none.
        say: called with a line for people.
    """

    source: Source
    folder: Path
    dtype: torch.dtype | None
    quantize: str | None
    say: Callable[[str], None]


@dataclass(frozen=True)
class Written:
    """What a format has written into `Request.folder`.

    Attributes:
        expected: how the export has to answer. As a rule `source.ask(model)` of the very model that was written, rounded
            as it was: then rounding is in it, and the limits can be narrow.
        reopen: open the folder as other tools do, from itself alone.
        limits: how far its answers may be off.
        notes: what a reader of the model card has to know.
        library: that opens it, in the words of the hub.
    """

    expected: Probe
    reopen: Callable[[Path], Asked]
    limits: Limits
    notes: tuple[str, ...] = ()
    library: str = "transformers"


class Format(NamedTuple):
    """One line of the table.

    Attributes:
        write: fills the folder.
        options: those of the command that it knows, of 'dtype', 'quantize', 'weights', 'with' and 'combine'.
        help: what it makes, in a few words.
    """

    write: Callable[[Request], Written]
    options: frozenset[str]
    help: str
