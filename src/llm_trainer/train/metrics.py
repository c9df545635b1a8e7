"""Metrics: accumulated on the device, summed over ranks and read when they are logged."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_trainer.state import Progress

_SLOTS = 2048  # rows of the table of names that ranks sum; a run has tens of names
_WORDS, _BYTES = 16, 5  # a name is 16 integers of 5 bytes: float64 adds 2^13 of them exactly


class Metrics:
    """Weighted means by name. `add` never waits for the device; `reduce` waits once and talks to other ranks once.

    Ranks may add different names (the loss of a dataset that one rank met and another did not): every name has a slot
    in a table of fixed size, by its hash, and carries its spelling along, so the sum of the tables says on every rank
    which names there are. If two names share a slot (2 % for ten), all ranks see it and repeat with a larger table.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        """`device`: where the collective runs; None: where the first added tensor is, else the CPU."""
        self._device = torch.device(device) if device is not None else None
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}
        self._recording = True

    @contextmanager
    def recording(self, counts: bool) -> Iterator[None]:
        """What is added while the block runs counts, or is dropped (that of a filler, see `state.MicroBatch`)."""
        before = self._recording
        self._recording = counts
        try:
            yield
        finally:
            self._recording = before

    @property
    def is_recording(self) -> bool:
        """Whether what is added now counts."""
        return self._recording

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Adds `total` `[]`, a sum over `count` `[]` terms, to the metric `name`."""
        if not self._recording:
            return
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + self._wide(total), old_count + self._wide(count))

    def include(self, other: Metrics) -> None:
        """Adds everything that was added to `other`, which keeps it."""
        for name, (total, count) in other._sums.items():
            self.add(name, total, count)

    def copy(self) -> Metrics:
        """The same as it is now, apart; sums are never changed in place."""
        copied = Metrics(self._device)
        copied._sums = dict(self._sums)
        return copied

    def go_back(self, earlier: Metrics) -> None:
        """Forget what was added since `earlier` was copied."""
        self._sums = dict(earlier._sums)

    def take(self) -> Metrics:
        """Everything that was added since the last `reduce` or `take`, apart; nothing of it is left here."""
        taken = Metrics(self._device)
        taken._sums, self._sums = self._sums, {}
        return taken

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """What has been added stays apart while the block runs, and what the block adds is gone after it."""
        before = self.take()
        try:
            yield
        finally:
            self._sums = before._sums

    def _wide(self, value: Tensor | float) -> Tensor | float:
        """Double precision, so that counts of tokens stay exact; Apple's GPUs have none."""
        if not isinstance(value, Tensor):
            return float(value)
        self._device = self._device or value.device
        widest = torch.float32 if value.device.type == "mps" else torch.float64
        return value.detach().to(widest)

    def state_dict(self, all_reduce: Callable[[Tensor], Tensor] = lambda table: table) -> dict[str, list[float]]:
        """What was added since the last `reduce`, `[total, count]` over all ranks, for a resumed run to go on from."""
        return {name: [total, count] for name, (total, count) in self._totals(all_reduce).items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], share: float = 1.0) -> None:
        """Puts back what `state_dict` gave; each of several ranks takes its `share`, one over their number."""
        self._sums = {name: (total * share, count * share) for name, (total, count) in state.items()}

    def reduce(self, all_reduce: Callable[[Tensor], Tensor] = lambda table: table) -> dict[str, float]:
        """The means over all ranks since the last call, by name; a name without any terms is left out.

        Args:
            all_reduce: the sum of a tensor over ranks; all ranks must call `reduce` together.
        """
        totals = self._totals(all_reduce)
        self._sums = {}
        return {name: total / count for name, (total, count) in totals.items() if count}

    def _totals(self, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """Sums and counts over all ranks, in the order of their names."""
        device = torch.device("cpu")
        if self._device is not None and self._device.type != "mps":
            device = self._device
        double: dict[str, Any] = {"dtype": torch.float64, "device": device}

        # 1. A row per name, `[total, count, code ...]`.
        names = list(self._sums)
        rows = torch.zeros(len(names), 4 + _WORDS, **double)
        for row, pair in zip(rows, self._sums.values(), strict=True):
            for column, value in enumerate(pair):
                row[column] = value.to(device) if isinstance(value, Tensor) else value
        codes = torch.tensor([_encode(name) for name in names], dtype=torch.float64).view(len(names), 2 + _WORDS)
        rows[:, 2:] = codes.to(device)

        # 2. The sum over ranks, with a larger table until no two names share a slot.
        num_slots = _SLOTS
        while True:
            slots = torch.tensor([_slot(name, num_slots) for name in names], dtype=torch.int64, device=device)
            table = torch.zeros(num_slots, rows.shape[1], **double).index_add_(0, slots, rows)
            table = all_reduce(table).cpu()  # the host waits for the device here
            found = {_decode(code): (total, count) for total, count, *code in table[table[:, 2] > 0].tolist()}
            if None not in found:
                return {name: found[name] for name in sorted(filter(None, found))}
            num_slots *= 2


def _slot(name: str, num_slots: int) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % num_slots


def _encode(name: str) -> list[float]:
    """`[presence, checksum, spelling ...]`; rows of equal names add up to a multiple of it."""
    raw = name.encode()
    if not name or len(raw) > _WORDS * _BYTES:
        raise ValueError(f"metric name {name!r}: expected 1 to {_WORDS * _BYTES} bytes, got {len(raw)}")
    padded = raw.ljust(_WORDS * _BYTES, b"\0")
    words = (int.from_bytes(padded[i : i + _BYTES], "big") for i in range(0, len(padded), _BYTES))
    return [1.0, float(zlib.crc32(raw)), *map(float, words)]


def _decode(row: Sequence[float]) -> str | None:
    """The name that `row`, a sum of equal codes, spells; None when different names met."""
    presence, checksum, *words = row
    if any(word % presence for word in words):
        return None
    raw = b"".join(int(word // presence).to_bytes(_BYTES, "big") for word in words).rstrip(b"\0")
    return raw.decode() if zlib.crc32(raw) * presence == checksum else None


class Shares(NamedTuple):
    """Of the peak of all devices.

    Attributes:
        token: that is reached by training on one token per second.
        pixel: by a tower that is shown one number of pixels per second.
    """

    token: float
    pixel: float


@dataclass
class Clock:
    """Tokens, pixels and seconds of the steps since the last log line.

    Evaluating, sampling and saving are no part of a step.
    """

    tokens: float = 0.0
    pixels: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: float, seconds: float, pixels: float = 0.0) -> None:
        """Count a step; pixels are those of this rank."""
        self.tokens += tokens
        self.pixels += pixels
        self.seconds += seconds

    def read(self, progress: Progress, epoch_size: int | None, shares: Shares | None) -> dict[str, float]:
        """Learning rate, epoch, tokens, tokens/s and MFU for a log line; begins anew.

        Args:
            epoch_size: position at the end of an epoch; None: not known.
            shares: of the peak; None: not known.
        """
        epoch_share = progress.position / epoch_size if epoch_size else 0.0
        values = {
            "learning_rate": progress.learning_rate,
            "epoch": progress.epoch + epoch_share,
            "num_tokens": float(progress.tokens),
        }
        if progress.skipped_steps:
            values["skipped_steps"] = float(progress.skipped_steps)
        if self.seconds:
            values["tokens_per_second"] = self.tokens / self.seconds
            if shares is not None:
                of_images = self.pixels / self.seconds * shares.pixel
                values["mfu"] = values["tokens_per_second"] * shares.token + of_images
        self.tokens = self.pixels = self.seconds = 0.0
        return values
