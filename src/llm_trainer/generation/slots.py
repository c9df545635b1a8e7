"""Decoding of transformers models with plain attention over one preallocated cache.

Each row has a slot of the cache, filled from its beginning, so that rows of all lengths decode together, enter and leave
at any token. transformers runs the layers; it asks an attention function by name, and that one is ours.
Where several query heads share a key head, they become rows of one product with its keys.

Letters: `B` rows, `T` positions, `V` vocabulary, `H` query heads, `K` key heads, `D` width of a head, `N` flat tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_trainer.models.experts import Routes

ATTENTION = "llm_trainer_slots"
# Plain causal attention that gets the keyword arguments of the model's call; held equal to those of training by a test.
ARCHITECTURES = frozenset(
    {"glm4_moe", "llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
)
# Rotations that are a function of the position alone, not of the longest row of a batch.
ROTATIONS = (None, "default", "linear", "llama3", "yarn")
# On CPUs; `(query, key, value, dropout, is_causal, *, attn_mask, scale) -> (output, log normaliser)`.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
# Prompts are computed together up to this many tokens: larger products are hardly faster, and need more memory.
PREFILL_TOKENS = 4096


def reads_slots(model: nn.Module) -> bool:
    """Whether a transformers model can be read by `SlotReader`."""
    config: Any = model.config
    rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        slides = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    else:
        slides = set(kinds) != {"full_attention"}
    return config.model_type in ARCHITECTURES and rotation in ROTATIONS and not slides


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, slots: "SlotReader", **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `query [B, H, T, D]`, `key` and `value [B, K, T, D]` -> `[B, T, H, D]`."""
    return slots.attend(module.layer_idx, query, key, value, kwargs["scaling"]), None  # type: ignore[arg-type]


def no_mask(**asked: Any) -> None:
    """The slots know by themselves what a token may see."""


class Slots:
    """Keys and values of all layers: slots of so many tokens, each filled from its beginning."""

    def __init__(self, num_slots: int, num_tokens: int) -> None:
        self.num_slots, self.num_tokens = num_slots, num_tokens
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # of each [slots, K, T, D] twice

    def of(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a layer whose keys and values are like `key` and `value [B, K, T, D]`."""
        if layer not in self.layers:
            shape = self.num_slots, key.shape[1], self.num_tokens, key.shape[3]
            # NOTE: not empty: what a mask hides is still multiplied by 0, and 0 * NaN is NaN.
            self.layers[layer] = key.new_zeros(shape), value.new_zeros(shape)
        return self.layers[layer]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of one slot to another."""
        for both in self.layers.values():
            for tensor in both:
                tensor[target, :, :length] = tensor[source, :, :length]


class Reading(NamedTuple):
    """What attention has to know while every row reads one token.

    Attributes:
        rows: `[B]`, 0 to B - 1.
        places: `[B]`, where in its slot each row's token goes.
        longest: Of the rows' slots with it.
        mask: `[B, 1, 1, longest]`, added to scores; None: all rows are equally long.
    """

    rows: Tensor
    places: Tensor
    longest: int
    mask: Tensor | None


class Sharing(NamedTuple):
    """Which rows go on from which prompt; it changes when rows enter or leave.

    Attributes:
        members: `[prompts, S]`, the rows of each prompt; the shorter ones repeat their first.
        prompt: `[B]`, of each row.
        sample: `[B]`, where in `members` each row is.
        lengths: `[B]`, of each row's prompt.
        longest: Of the prompts.
        mask: `[prompts, 1, 1, longest]`, added to scores; None: all prompts are equally long.
    """

    members: Tensor
    prompt: Tensor
    sample: Tensor
    lengths: Tensor
    longest: int
    mask: Tensor | None


class SlotReader:
    """Reads rows of at most `longest_prompt` and `longest_budget` more tokens; see `readers.Reader`.

    Args:
        num_rows: At most.
        shares: Rows that were forked from one prompt attend to its only copy together, and to their own tokens alone;
            otherwise each has a copy of the prompt in front of its own tokens.
    """

    def __init__(
        self, model: nn.Module, num_rows: int, longest_prompt: int, longest_budget: int, shares: bool = False
    ) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(ATTENTION, attention)
        AttentionMaskInterface.register(ATTENTION, no_mask)
        self.model = model
        self.device = next(model.parameters()).device
        self.shares = shares and self.device.type == "cpu"
        own = longest_budget if self.shares else longest_prompt + longest_budget
        self.own = Slots(num_rows, own)
        self.lengths: list[int] = []  # of the slot of each row
        self.prompts = Slots(num_rows, longest_prompt)  # used where they are shared
        self.prompt_lengths: list[int] = []
        self.prompt_of: list[int] = []  # of each row
        self.prefilled: list[tuple[int, int, int]] = []  # start, stop, slot of each of the flat prompts
        self.reading: Reading | None = None
        self.sharing: Sharing | None = None
        self.routes: Routes | None = None  # sees whom the tokens that are read are sent to
        self.sent_to: list[Tensor] = []  # [tokens, L * K] of each forward since somebody last took them

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
        self.sharing = None
        for source, length in zip(sources, lengths, strict=True):
            if self.shares:
                self.prompt_of.append(self.prompt_of[source])
                self.lengths.append(0)
            else:
                self.own.copy(source, len(self.lengths), length)
                self.lengths.append(length)

    def read(self, new: Tensor) -> Tensor:
        longest = max(self.lengths) + 1
        places = torch.tensor(self.lengths, device=self.device)
        mask = None
        if min(self.lengths) + 1 < longest:
            mask = self._mask(places + 1, longest)
        rows = torch.arange(len(new), device=self.device)
        self.reading = Reading(rows, places, longest, mask)
        positions = places
        if self.shares:
            self.sharing = self.sharing or self._arranged()
            positions = places + self.sharing.lengths
        logits = self._forward(new[:, None], positions[:, None], 0)[:, -1]
        self.lengths = [length + 1 for length in self.lengths]
        self.reading = None
        return logits

    def keep(self, order: Sequence[int]) -> None:
        # 1. the rows' own tokens
        for row, source in enumerate(order):
            if row != source:
                self.own.copy(source, row, self.lengths[source])
        self.lengths = [self.lengths[source] for source in order]
        if not self.shares:
            return

        # 2. prompts that no row goes on from: the last ones move to their places
        self.sharing = None
        self.prompt_of = [self.prompt_of[source] for source in order]
        used = sorted(set(self.prompt_of))
        gaps = [slot for slot in range(len(used)) if slot not in used]
        movers = [slot for slot in used if slot >= len(used)]
        moved = dict(zip(movers, gaps, strict=True))
        for source, target in moved.items():
            self.prompts.copy(source, target, self.prompt_lengths[source])
            self.prompt_lengths[target] = self.prompt_lengths[source]
        self.prompt_of = [moved.get(slot, slot) for slot in self.prompt_of]
        self.prompt_lengths = self.prompt_lengths[: len(used)]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Keep `key` and `value`; the attention of `query` over all that its row has, `[B, T, H, D]`."""
        if torch.is_autocast_enabled(query.device.type):
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if self.reading is None:
            return self._attend_prompts(layer, query, key, value, scale)

        # 1. the new token is kept
        rows, places, longest, mask = self.reading
        keys, values = self.own.of(layer, key, value)
        keys[rows, :, places] = key[:, :, 0]
        values[rows, :, places] = value[:, :, 0]

        # 2. its attention over the row's own tokens, and over the prompt where that is elsewhere
        num_rows, heads, _, width = query.shape
        folded = query.view(num_rows, keys.shape[1], -1, width)  # [B, K, H / K, D]
        seen = keys[:num_rows, :, :longest], values[:num_rows, :, :longest]
        if mask is not None:
            mask = mask.to(query.dtype)
        if self.sharing is None:
            output = F.scaled_dot_product_attention(folded, *seen, attn_mask=mask, scale=scale)
        else:
            over_own = flash(folded, *seen, 0.0, False, attn_mask=mask, scale=scale)
            output = _merged(over_own, self._attend_shared(self.sharing, layer, folded, scale))
        return output.reshape(num_rows, 1, heads, width)

    def _attend_shared(self, sharing: Sharing, layer: int, folded: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Attention of `folded [B, K, H / K, D]` over the prompts, and the log normalisers `[B, K, H / K]`.

        All rows of a prompt are further rows of its queries, so its keys are read once.
        """
        keys, values = self.prompts.layers[layer]
        num_prompts, num_samples = sharing.members.shape
        mask = None if sharing.mask is None else sharing.mask.to(folded.dtype)
        seen = keys[:num_prompts, :, : sharing.longest], values[:num_prompts, :, : sharing.longest]
        queries = folded[sharing.members].transpose(1, 2)  # [prompts, K, S, H / K, D]
        output, log_normaliser = flash(queries.flatten(2, 3), *seen, 0.0, False, attn_mask=mask, scale=scale)
        places = sharing.prompt, slice(None), sharing.sample
        return output.unflatten(2, (num_samples, -1))[places], log_normaliser.unflatten(2, (num_samples, -1))[places]

    def _attend_prompts(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """The same of flat prompts: `query [1, H, N, D]`, `key` and `value [1, K, N, D]` -> `[1, N, H, D]`."""
        slots = self.prompts if self.shares else self.own
        keys, values = slots.of(layer, key, value)
        output = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        for start, stop, slot in self.prefilled:
            own = slice(start, stop)
            keys[slot, :, : stop - start], values[slot, :, : stop - start] = key[0, :, own], value[0, :, own]
            parts = query[:, :, own], key[:, :, own], value[:, :, own]
            found = F.scaled_dot_product_attention(*parts, is_causal=True, scale=scale, enable_gqa=True)
            output[:, own] = found.transpose(1, 2)
        return output

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Logits `[len(prompts), V]` after new rows, in one forward of all of them laid flat."""
        self.sharing = None
        ids: list[int] = []
        positions: list[int] = []
        self.prefilled = []
        for prompt in prompts:
            slot = len(self.prompt_lengths) if self.shares else len(self.lengths)
            self.prefilled.append((len(ids), len(ids) + len(prompt), slot))
            ids.extend(prompt)
            positions.extend(range(len(prompt)))
            if self.shares:
                self.prompt_of.append(slot)
                self.prompt_lengths.append(len(prompt))
                self.lengths.append(0)
            else:
                self.lengths.append(len(prompt))
        last = torch.tensor([stop - 1 for _, stop, _ in self.prefilled], device=self.device)
        flat = torch.tensor([ids], device=self.device), torch.tensor([positions], device=self.device)
        return self._forward(*flat, last)[0]

    def _forward(self, ids: Tensor, positions: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        with _attention_of_slots(self.model.config):
            output = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=logits_to_keep, slots=self
            )
        if self.routes is not None:
            self.sent_to.append(torch.cat(self.routes.chosen, dim=1).short())
        return output.logits

    def _arranged(self) -> Sharing:
        """Which rows go on from which prompt, now."""
        members: list[list[int]] = [[] for _ in self.prompt_lengths]
        sample = []
        for row, slot in enumerate(self.prompt_of):
            sample.append(len(members[slot]))
            members[slot].append(row)
        most = max(map(len, members))
        padded = [rows + rows[:1] * (most - len(rows)) for rows in members]
        lengths = torch.tensor(self.prompt_lengths)
        prompt = torch.tensor(self.prompt_of)
        longest = max(self.prompt_lengths)
        mask = None
        if min(self.prompt_lengths) < longest:
            mask = self._mask(lengths, longest)
        return Sharing(torch.tensor(padded), prompt, torch.tensor(sample), lengths[prompt], longest, mask)

    def _mask(self, lengths: Tensor, longest: int) -> Tensor:
        """0 for the first `lengths [B]` tokens and -inf after that, `[B, 1, 1, longest]`."""
        hidden = torch.arange(longest, device=self.device) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)
        return mask[:, None, None]


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Attention over two sets of keys from that over each: outputs `[..., D]` and log normalisers `[...]`.

    The outputs are averaged by their sums of weights, as in FlashAttention (Dao et al. 2022, section 3.1).
    """
    share = (second[1] - first[1]).sigmoid_()[..., None]
    merged = torch.lerp(first[0].to(share.dtype), second[0].to(share.dtype), share)
    return merged.to(first[0].dtype)


@contextmanager
def _attention_of_slots(config: Any) -> Iterator[None]:
    """The model's attention is ours meanwhile."""
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
