"""The way of an export: opened, written under a private name, asked again, and only then called by its own name."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from llm_trainer.disk import bytes_in, explained, flush, remove
from llm_trainer.export.card import write_card
from llm_trainer.export.formats import FORMATS
from llm_trainer.export.gate import Comparison, Refused, compare
from llm_trainer.export.probe import record
from llm_trainer.export.request import Request, Written
from llm_trainer.export.source import find_source
from llm_trainer.models.adapter_sums import COMBINATIONS, SUM


def export(
    path: str | Path,
    to: str,
    out: str | Path,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    weights: Mapping[str, float] | None = None,
    others: Mapping[str, float] | None = None,
    combine: str = SUM,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a model in one of the `FORMATS` and prove it; the folder is there when it answers as the model in training did.

    Args:
        path: a run, a checkpoint, or a model's folder.
        to: name of the format.
        out: the folder to be; it must not exist.
        dtype: that weights are written in; None: the one that the format finds usual.
        quantize: in how few bits, in the words of the format.
        weights: of several adapters by name.
        others: weights of the adapters of other runs on the same base, by their folders.
        combine: how several adapters become one, of `COMBINATIONS`.
        say: called with a line for people, as things are found out.

    Raises:
        ValueError: a wrong path or option.
        Refused: it does not answer as it should; nothing is left of it.
        DiskError: the disk is full or cannot be written.
    """
    # 1. what is asked for
    wanted = FORMATS.get(to)
    if wanted is None:
        raise ValueError(f"--to: got {to!r}, expected one of {', '.join(FORMATS)}")
    if combine not in COMBINATIONS:
        raise ValueError(f"--combine: got {combine!r}, expected one of {', '.join(COMBINATIONS)}")
    given = {"dtype": dtype, "quantize": quantize, "weights": weights, "with": others, "combine": combine != SUM}
    for name, value in given.items():
        if value and name not in wanted.options:
            takes = ", ".join(f"--{option}" for option in sorted(wanted.options)) or "none"
            raise ValueError(f"--{name}: --to {to} does not have this option; expected {takes}")
    out = Path(out)
    if out.exists():
        raise ValueError(f"--out: {out} exists already; expected a new folder. Name another one, or remove it")
    source = find_source(path, say, weights, others, combine)

    # 2. write, ask again, and give it its name
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        with explained(out, partial, needed=bytes_in(source.folder)):
            partial.mkdir(parents=True)
            request = Request(source, partial, dtype, quantize, say)
            written = wanted.write(request)
            result = pass_gate(partial, written)
            say(f"gate: {result}")
            write_card(source, to, written, result, partial)
            _flush_all(partial)
            partial.rename(out)
            flush(out.parent)
    finally:
        remove(partial)
    return out


def pass_gate(folder: Path, written: Written) -> Comparison:
    """Open an export again and ask it everything.

    Raises:
        Refused: it does not open, or does not answer as was expected; the message has a line for every difference.
    """
    asked = written.reopen(folder)
    found = record(asked, written.expected.questions, made={"from": "the export"})
    result = compare(written.expected, found, written.limits)
    if result.differences:
        lines = "\n  ".join(result.differences)
        raise Refused(f"the export does not answer as the model does:\n  {lines}")
    return result


def _flush_all(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        flush(path)
