"""Reads the logits of rows that grow token by token, by the fastest way that a model allows.

Rows enter, may be forked (the completions of one prompt share its computation), are read once per token, and leave.
Row numbers are places in the batch: who enters is put at the end, `keep` closes the gaps.

Letters: `B` rows, `T` positions, `V` vocabulary, `H` query heads, `K` key heads, `D` width of a head, `N` flat tokens.
"""

import inspect
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llm_trainer.generation.slots import SlotReader, reads_slots


class Reader(Protocol):
    """What decodes rows needs of a model."""

    def has_room(self) -> bool:
        """Whether rows may enter now."""

    def enter(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Add a row for each prompt; their logits `[len(prompts), V]`."""

    def fork(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Add rows that begin with as many tokens of the rows `sources`; their next logits are those after that."""

    def read(self, new: Tensor) -> Tensor:
        """Append `new [B]` to all rows; their logits `[B, V]`."""

    def keep(self, order: Sequence[int]) -> None:
        """Drop rows: `order[i]` is the row that is row i from now on."""


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are."""
    return next(chain(model.parameters(), model.buffers()), torch.empty(0)).device


def knows_cache(model: nn.Module) -> bool:
    """Whether a model is one of transformers' that takes a cache."""
    return "past_key_values" in inspect.signature(model.forward).parameters


def cache_bytes(model: nn.Module) -> int:
    """What keys and values of a token take, for models that are read from a cache of a known shape; others: 1."""
    if not knows_cache(model) or not reads_slots(model):
        return 1
    config: Any = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    return numbers * next(model.parameters()).element_size()


def make_reader(
    model: nn.Module, num_rows: int, longest_prompt: int, longest_budget: int, pad: int, shares: bool
) -> Reader:
    """A reader of at most `num_rows` rows; `shares`: many of them are forked."""
    if not knows_cache(model):
        return UncachedReader(model, pad)
    if reads_slots(model):
        return SlotReader(model, num_rows, longest_prompt, longest_budget, shares)
    return CachedReader(model, pad)


class CachedReader:
    """Any transformers model, with the cache class that it chooses itself. Prompts are padded on the left.

    All rows are equally long in such a cache, so rows enter only where none is left.
    """

    def __init__(self, model: nn.Module, pad: int) -> None:
        self.model, self.pad, self.device = model, pad, device_of(model)
        self.cache: Any = None
        self.positions = torch.empty(0, 1)  # [B, 1], of the last token of each row
        self.mask: Tensor | None = None  # [B, T so far]; without one attention takes its faster path
        self.accepted = inspect.signature(model.forward).parameters

    def has_room(self) -> bool:
        return self.cache is None

    def enter(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        return self._forward(*self._padded(prompts))

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and positions `[B, T]` of prompts, and their mask."""
        longest = max(map(len, prompts))
        padded = [[self.pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        num_pads = torch.tensor([longest - len(prompt) for prompt in prompts], device=self.device)
        steps = torch.arange(longest, device=self.device)
        positions = (steps - num_pads[:, None]).clamp(min=0)
        is_padded = any(len(prompt) < longest for prompt in prompts)
        self.mask = (steps >= num_pads[:, None]).long() if is_padded else None
        return torch.tensor(padded, device=self.device), positions

    def fork(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        # Here rows are only forked before anything was read after their prompt, so `lengths` are theirs.
        self._select([*range(len(self.positions)), *sources])

    def read(self, new: Tensor) -> Tensor:
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(new), 1)], dim=1)
        return self._forward(new[:, None], self.positions + 1)

    def keep(self, order: Sequence[int]) -> None:
        if order:
            self._select(order)
        else:
            self.cache = None

    def _select(self, order: Sequence[int]) -> None:
        rows = torch.tensor(order, device=self.device)
        self.positions = self.positions[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.cache.reorder_cache(rows)

    def _forward(self, ids: Tensor, positions: Tensor, **inputs: Any) -> Tensor:
        inputs |= {
            "input_ids": ids,
            "attention_mask": self.mask,
            "position_ids": positions,
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self.model(**{name: value for name, value in inputs.items() if name in self.accepted})
        self.cache, self.positions = output.past_key_values, positions[:, -1:]
        return output.logits[:, -1]


class UncachedReader:
    """Any causal module, run on all tokens so far; padding is on the right, out of its sight."""

    def __init__(self, model: nn.Module, pad: int) -> None:
        self.model, self.pad, self.device = model, pad, device_of(model)
        self.rows: list[list[int]] = []

    def has_room(self) -> bool:
        return True

    def enter(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        entered = [list(prompt) for prompt in prompts]
        self.rows += entered
        return self._forward(entered)

    def fork(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        self.rows += [self.rows[source][:length] for source, length in zip(sources, lengths, strict=True)]

    def read(self, new: Tensor) -> Tensor:
        for row, token in zip(self.rows, new.tolist(), strict=True):
            row.append(token)
        return self._forward(self.rows)

    def keep(self, order: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in order]

    def _forward(self, rows: list[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        padded = [[*row, *[self.pad] * (longest - len(row))] for row in rows]
        logits = all_logits(self.model, torch.tensor(padded, device=self.device))
        last = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
        return logits[torch.arange(len(rows), device=logits.device), last]


def all_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """`[B, T, V]` of `ids [B, T]` from whatever a model returns."""
    output = model(ids, use_cache=False) if knows_cache(model) else model(ids)
    if isinstance(output, Tensor):
        return output
    return output["logits"] if isinstance(output, Mapping) else output.logits
