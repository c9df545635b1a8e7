"""Batched decoding: prompts in, completions out.

Transformers models decode with the cache class they choose themselves; any other module that maps ids to logits is run
on the whole sequence at each token. A row's completion depends on its prompt, the seed and the row's number, never on
what it is batched with.

Letters: `B` rows, `T` positions, `V` vocabulary, `K` candidates.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

NUM_CANDIDATES = 128  # top-p's first guess of how many tokens hold the wanted probability; then 8 times more


@dataclass(frozen=True)
class Completions:
    """What the model wrote after each prompt.

    Attributes:
        ids: New tokens per row, with the stop token that ended it, if one did; neither prompt nor padding.
        logprobs: Of each of them, under `softmax(logits / temperature)` of the whole vocabulary (temperature 0: of the
            logits), before top-k, top-p and suppression: what a trainer recomputes.
        finished: Whether a stop token ended the row; otherwise it was truncated.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How completions are chosen from logits, and where they end.

    Attributes:
        max_new_tokens: Per row; a row also ends where its context does.
        pad_token_id: Fills shorter rows; it is masked, so it may be any id of the vocabulary.
        stop_token_ids: A row ends after one of these.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Only the k most likely tokens; 0: all.
        top_p: Only the fewest most likely tokens whose probability (among the top k) reaches p (Holtzman et al. 2020,
            arXiv 1904.09751); 1: all.
        suppress_tokens: Ids that are never chosen.
        seed: Of the sampling noise; None draws one from torch's global generator.
        row_numbers: A row's noise is that of (seed, its number); None: its position.
        context_length: The most tokens the model takes; None: what its config says.
    """

    max_new_tokens: int
    pad_token_id: int = 0
    stop_token_ids: Sequence[int] = ()
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    suppress_tokens: Sequence[int] = ()
    seed: int | None = None
    row_numbers: Sequence[int] | None = None
    context_length: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_k={self.top_k}, "
                f"top_p={self.top_p}: expected max_new_tokens >= 1, temperature >= 0 (0: greedy), top_k >= 0 (0: all "
                "tokens) and 0 < top_p <= 1 (1: all tokens)"
            )

    def choose(self, logits: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Choose one token per row by inverting the cumulative distribution (a fifth of the time of `multinomial`).

        Args:
            logits: `[B, V]`.
            noise: `[B]`, uniform in [0, 1).

        Returns:
            ids `[B]` and their log-probabilities `[B]`; these are NaN where the logits are not finite.
        """
        logits = logits.float() / (self.temperature or 1.0)
        allowed = logits
        if self.suppress_tokens:
            allowed = logits.clone()
            allowed[:, list(self.suppress_tokens)] = -torch.inf
        if self.temperature == 0:
            chosen = allowed.argmax(-1, keepdim=True)
        else:
            probabilities, order = self._candidates(allowed)
            cumulative = probabilities.cumsum(-1)
            # 1 - 2**-24 is the largest float32 below 1: the target stays below the last entry, so a token of
            # probability 0 is never chosen.
            target = noise.float().clamp(max=1 - 2**-24)[:, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=cumulative.shape[1] - 1)
            if order is not None:
                chosen = order.gather(1, chosen)
        logprobs = logits.gather(1, chosen) - logits.logsumexp(-1, keepdim=True)
        return chosen[:, 0], logprobs[:, 0]

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unnormalised probabilities `[B, K]` and the ids `[B, K]` they belong to (None: every id, in order)."""
        vocabulary = logits.shape[1]
        if self.top_k == 0 and self.top_p == 1:
            return logits.softmax(-1), None
        if self.top_k:
            values, order = logits.topk(min(self.top_k, vocabulary))
            probabilities = values.softmax(-1)
        else:  # the vocabulary's head nearly always holds enough, and is 15 times faster than sorting it all
            num = min(NUM_CANDIDATES, vocabulary)
            total = logits.logsumexp(-1, keepdim=True)
            values, order = logits.topk(num)
            while num < vocabulary and not ((values - total).exp().sum(-1) >= self.top_p).all():  # host waits here
                num = min(8 * num, vocabulary)
                values, order = logits.topk(num)
            probabilities = (values - total).exp()
        before = probabilities.cumsum(-1) - probabilities
        return probabilities.masked_fill(before >= self.top_p, 0.0), order

    def noise(self, num_rows: int) -> Tensor:
        """Uniform numbers `[B, max_new_tokens]`; a row's are those of (seed, row number), whatever the others are."""
        seed = int(torch.randint(2**62, ())) if self.seed is None else self.seed % 2**64
        numbers = range(num_rows) if self.row_numbers is None else self.row_numbers
        if len(numbers) != num_rows:
            raise ValueError(f"row_numbers has {len(numbers)} entries for {num_rows} prompts; expected one per prompt")
        if self.temperature == 0:
            return torch.zeros(num_rows, self.max_new_tokens)
        rows = [np.random.default_rng([seed, number]).random(self.max_new_tokens) for number in numbers]
        return torch.tensor(np.array(rows), dtype=torch.float32).view(num_rows, self.max_new_tokens)

    def budgets(self, prompts: Sequence[Sequence[int]], context_length: int | None) -> list[int]:
        """How many tokens each row may get."""
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {row} is empty; a model continues at least one token (often the BOS token)")
            if context_length is not None and len(prompt) >= context_length:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens, but the model's context is {context_length} tokens: "
                    "shorten the prompt so that at least one new token fits"
                )
        if context_length is None:
            return [self.max_new_tokens] * len(prompts)
        return [min(self.max_new_tokens, context_length - len(prompt)) for prompt in prompts]


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], **settings: Any) -> Completions:
    """Write a completion of each prompt, all prompts in one batch.

    Precision is the caller's (autocast around the call). The model is in evaluation mode meanwhile.

    Args:
        model: A transformers causal LM, or any module whose `forward(ids [B, T])` gives causal logits `[B, T, V]`: a
            tensor, an object with `.logits`, or a mapping with `"logits"`.
        prompts: Token ids per row, without padding.
        **settings: Those of `Decoding`; `max_new_tokens` is required.

    Raises:
        ValueError: A prompt is empty or fills the context, a setting is out of range, or the logits are not finite.
    """
    decoding = Decoding(**settings)
    ids: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    for chosen in _decode(model, prompts, decoding):
        for row, (token, logprob) in chosen.items():
            ids[row].append(token)
            logprobs[row].append(logprob)
    finished = [bool(row) and row[-1] in decoding.stop_token_ids for row in ids]
    return Completions(ids, logprobs, finished)


def stream(model: nn.Module, prompt_ids: Sequence[int], **settings: Any) -> Iterator[int]:
    """Yield the completion of one prompt token by token: the ids that `generate` returns for the same settings.

    The model is in evaluation mode until the iterator ends or is closed.

    Args:
        prompt_ids: Token ids.
        **settings: Those of `Decoding`; `max_new_tokens` is required.
    """
    for chosen in _decode(model, [prompt_ids], Decoding(**settings)):
        yield chosen[0][0]


@torch.no_grad()
def _decode(
    model: nn.Module, prompts: Sequence[Sequence[int]], decoding: Decoding
) -> Iterator[dict[int, tuple[int, float]]]:
    """Yield, token by token, the (id, log-probability) of every row that has not ended."""
    # 1. what reads the model, and how far each row may go
    while isinstance(model, DistributedDataParallel) or "_orig_mod" in dict(model.named_children()):
        model = model.module if isinstance(model, DistributedDataParallel) else model.get_submodule("_orig_mod")
    make_reader: type[_CachedReader] | type[_UncachedReader] = _UncachedReader
    context_length = decoding.context_length
    if "past_key_values" in inspect.signature(model.forward).parameters:
        make_reader = _CachedReader
        context_length = context_length or _configured_context(model)
    budgets = decoding.budgets(prompts, context_length)
    device = next(chain(model.parameters(), model.buffers()), torch.empty(0)).device
    noise = decoding.noise(len(prompts)).to(device)  # [B, max_new_tokens]
    reader = make_reader(model, prompts, decoding.pad_token_id, device)

    # 2. token by token
    stops = frozenset(decoding.stop_token_ids)
    alive = [True] * len(prompts)
    new = None
    with _evaluating(model):
        for index in range(max(budgets, default=0)):
            logits = reader.read(new, torch.tensor(alive, device=device))
            new, logprobs = decoding.choose(logits, noise[:, index])
            tokens, scores = new.tolist(), logprobs.tolist()  # the host waits for the device, once per token
            for row in range(len(prompts)):
                if alive[row] and not math.isfinite(scores[row]):
                    raise ValueError(f"the model's logits are not finite at new token {index} of prompt {row}")
            yield {row: (tokens[row], scores[row]) for row in range(len(prompts)) if alive[row]}
            alive = [
                was and token not in stops and index + 1 < budget
                for was, token, budget in zip(alive, tokens, budgets, strict=True)
            ]
            if not any(alive):
                return


class _CachedReader:
    """Reads a transformers model's logits one token at a time; prompts, token ids per row, are padded on the left."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> None:
        longest = max(map(len, prompts), default=0)
        padded = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        steps = torch.arange(longest, device=device)
        self.model, self.cache = model, None
        self.ids = torch.tensor(padded, device=device)  # [B, T], later [B, 1]
        self.positions = (steps - (longest - lengths)[:, None]).clamp(min=0)  # [B, T], later [B, 1]
        # Without a mask attention takes its faster path, so there is one only if something is padded.
        is_padded = any(len(prompt) < longest for prompt in prompts)
        self.mask = (steps >= (longest - lengths)[:, None]).long() if is_padded else None  # [B, T so far]
        self.accepted = inspect.signature(model.forward).parameters

    def read(self, new: Tensor | None, alive: Tensor) -> Tensor:
        """Logits `[B, V]` after the prompts, or after `new` `[B]`; rows not `alive` `[B]` stay at their position."""
        if new is not None:
            self.ids = new[:, None]
            self.positions = self.positions[:, -1:] + alive[:, None].long()
            if self.mask is not None:
                self.mask = torch.cat([self.mask, self.mask.new_ones(len(new), 1)], dim=1)
        inputs = {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.positions,
            "past_key_values": self.cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        output = self.model(**{name: value for name, value in inputs.items() if name in self.accepted})
        self.cache = output.past_key_values
        return output.logits[:, -1]


class _UncachedReader:
    """Reads any causal module's logits by running it on all tokens so far; padding is on the right, out of its sight."""

    def __init__(self, model: nn.Module, prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> None:
        longest = max(map(len, prompts), default=0)
        self.model, self.pad = model, pad
        self.ids = torch.tensor([[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts], device=device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [B]

    def read(self, new: Tensor | None, alive: Tensor) -> Tensor:
        """Logits `[B, V]` after the prompts, or after `new` `[B]` was appended to the rows that are `alive` `[B]`."""
        if new is not None:
            longest = int((self.lengths + alive).max())
            if longest > self.ids.shape[1]:
                self.ids = nn.functional.pad(self.ids, (0, 1), value=self.pad)
            rows = alive.nonzero()[:, 0]
            self.ids[rows, self.lengths[rows]] = new[rows]
            self.lengths = self.lengths + alive
        output = self.model(self.ids)
        if not isinstance(output, Tensor):
            output = output["logits"] if isinstance(output, Mapping) else output.logits
        return output[torch.arange(len(output), device=output.device), self.lengths - 1]


def _configured_context(model: nn.Module) -> int | None:
    """The context of a transformers model; some kinds (relative positions, recurrent) have no limit and no such key."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is back in its own mode (a frozen part may have been in another)."""
    was_training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training:
            module.training = training
