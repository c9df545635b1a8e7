"""Decoding of transformers models with plain attention over one preallocated cache.

Each row has a slot of the cache, filled from its beginning, so that rows of all lengths decode together, enter and leave
at any token. transformers runs the layers; it asks an attention function by name, and that one is ours.
Where several query heads share a key head, they become rows of one product with its keys.

Letters: `B` rows, `T` positions, `V` vocabulary, `H` query heads, `K` key heads, `D` width of a head, `N` flat tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION = "llm_trainer_slots"
# Plain causal attention that gets the keyword arguments of the model's call; held equal to those of training by a test.
ARCHITECTURES = frozenset({"llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
# Rotations that are a function of the position alone, not of the longest row of a batch.
ROTATIONS = (None, "default", "linear", "llama3", "yarn")
# Prompts are computed together up to this many tokens: larger products are hardly faster, and need more memory.
PREFILL_TOKENS = 4096


def reads_slots(model: nn.Module) -> bool:
    """Whether a transformers model can be read by `SlotReader`."""
    config: Any = model.config
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    slides = config.to_dict().get("sliding_window") is not None
    return config.model_type in ARCHITECTURES and rotation in ROTATIONS and not slides


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, slots: "SlotReader", **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `query [B, H, T, D]`, `key` and `value [B, K, T, D]` -> `[B, T, H, D]`."""
    return slots.attend(module.layer_idx, query, key, value, kwargs["scaling"]), None  # type: ignore[arg-type]


def no_mask(**asked: Any) -> None:
    """The slots know by themselves what a token may see."""


class SlotReader:
    """Reads at most `num_rows` rows of at most `num_tokens` tokens each; see `readers.Reader`."""

    def __init__(self, model: nn.Module, num_rows: int, num_tokens: int) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, no_mask)
        self.model = model
        self.device = next(model.parameters()).device
        self.num_rows, self.num_tokens = num_rows, num_tokens
        self.keys: dict[int, Tensor] = {}  # of each layer [slots, K, T, D]
        self.values: dict[int, Tensor] = {}
        self.lengths: list[int] = []
        self.prefilled: list[tuple[int, int, int]] = []  # start, stop, row of each document of the flat prompts
        self.reading: tuple[Tensor, Tensor, Tensor | None, int] | None = None

    def has_room(self) -> bool:
        return True

    def enter(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        found: list[Tensor] = []
        together: list[Sequence[int]] = []
        for prompt in prompts:
            if together and sum(map(len, together)) + len(prompt) > PREFILL_TOKENS:
                found.append(self._prefill(together))
                together = []
            together.append(prompt)
        found.append(self._prefill(together))
        return torch.cat(found)

    def fork(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        for source, length in zip(sources, lengths, strict=True):
            self._copy(source, len(self.lengths), length)
            self.lengths.append(length)

    def read(self, new: Tensor) -> Tensor:
        longest = max(self.lengths) + 1
        places = torch.tensor(self.lengths, device=self.device)  # [B], where the new token goes
        mask = None
        if min(self.lengths) + 1 < longest:
            mask = torch.arange(longest, device=self.device) <= places[:, None]
            mask = mask[:, None, None]  # [B, 1, 1, T]
        self.reading = torch.arange(len(new), device=self.device), places, mask, longest
        logits = self._forward(new[:, None], places[:, None], 0)[:, -1]
        self.lengths = [length + 1 for length in self.lengths]
        self.reading = None
        return logits

    def keep(self, order: Sequence[int]) -> None:
        for row, source in enumerate(order):
            if row != source:
                self._copy(source, row, self.lengths[source])
        self.lengths = [self.lengths[source] for source in order]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Keep `key` and `value`; the attention of `query` over all that its row has, `[B, T, H, D]`."""
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if layer not in self.keys:
            shape = self.num_rows, key.shape[1], self.num_tokens, key.shape[3]
            # NOTE: not empty: what a mask hides is still multiplied by 0, and 0 * NaN is NaN.
            self.keys[layer], self.values[layer] = key.new_zeros(shape), value.new_zeros(shape)
        keys, values = self.keys[layer], self.values[layer]
        if self.reading is None:
            return self._attend_prompts(keys, values, query, key, value, scale)
        rows, places, mask, longest = self.reading
        keys[rows, :, places] = key[:, :, 0]
        values[rows, :, places] = value[:, :, 0]
        num_rows, heads, _, width = query.shape
        folded = query.view(num_rows, keys.shape[1], -1, width)  # [B, K, H / K, D]
        seen = keys[:num_rows, :, :longest], values[:num_rows, :, :longest]
        output = F.scaled_dot_product_attention(folded, *seen, attn_mask=mask, scale=scale)
        return output.reshape(num_rows, 1, heads, width)

    def _attend_prompts(
        self, keys: Tensor, values: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> Tensor:
        """The same of flat prompts: `query [1, H, N, D]`, `key` and `value [1, K, N, D]` -> `[1, N, H, D]`."""
        output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        for start, stop, row in self.prefilled:
            own = slice(start, stop)
            keys[row, :, : stop - start], values[row, :, : stop - start] = key[0, :, own], value[0, :, own]
            parts = query[:, :, own], key[:, :, own], value[:, :, own]
            found = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)
            output[:, own] = found.transpose(1, 2)
        return output

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        ids: list[int] = []
        positions: list[int] = []
        self.prefilled = []
        for prompt in prompts:
            self.prefilled.append((len(ids), len(ids) + len(prompt), len(self.lengths)))
            ids.extend(prompt)
            positions.extend(range(len(prompt)))
            self.lengths.append(len(prompt))
        last = torch.tensor([stop - 1 for _, stop, _ in self.prefilled], device=self.device)
        flat = torch.tensor([ids], device=self.device), torch.tensor([positions], device=self.device)
        return self._forward(*flat, last)[0]

    def _forward(self, ids: Tensor, positions: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        with _attention_of_slots(self.model.config):
            output = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=logits_to_keep, slots=self
            )
        return output.logits

    def _copy(self, source: int, target: int, length: int) -> None:
        for cache in (*self.keys.values(), *self.values.values()):
            cache[target, :, :length] = cache[source, :, :length]


@contextmanager
def _attention_of_slots(config: Any) -> Iterator[None]:
    """The model's attention is ours meanwhile."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
