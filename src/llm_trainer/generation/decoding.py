"""From logits to a token: which distribution is drawn from, and the noise that draws.

Letters: `B` rows, `V` vocabulary, `K` candidates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NUM_CANDIDATES = 128  # the first guess of how many tokens a cut by probability leaves; then 8 times more
# 1 - 2**-24 is the largest float32 below 1: the target stays below the last entry of the cumulative distribution, so a
# token of probability 0 is never chosen.
BELOW_ONE = 1 - 2**-24
# A stop string of so many bytes spans at most so many tokens, but for tokens without text and an unfinished character.
SPARE_TOKENS = 8
PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer makes of a part of a character
BYTES_OF_CHARACTER = 4  # at most


class Draw(NamedTuple):
    """One token per row.

    Attributes:
        ids: `[B]`.
        logprobs: `[B]`, of them under the distribution they were drawn from; NaN where the logits are not finite.
        cut: What the distribution was cut to; None: it was not.
    """

    ids: Tensor
    logprobs: Tensor
    cut: "Cut | None" = None


class Cut(NamedTuple):
    """A distribution over the likeliest tokens.

    Attributes:
        ids: `[B, K]`, the likeliest first.
        logprobs: `[B, K]`, normalised over what is left; -inf after that.
        num_left: `[B]`; the ids that are left come first.
    """

    ids: Tensor
    logprobs: Tensor
    num_left: Tensor


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How completions are chosen from logits, and where they end.

    The repetition penalty comes first, then suppression, temperature, top-k, top-p and min-p.

    Attributes:
        max_new_tokens: Per row; a row also ends where its context does.
        pad_token_id: Fills shorter rows; it is masked, so it may be any id of the vocabulary.
        stop_token_ids: A row ends after one of these.
        stop_strings: A row ends after the token that completes one of these in its text; needs `decode`.
        decode: Ids to text, for stop strings.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Only the k most likely tokens; 0: all.
        top_p: Only the fewest most likely tokens whose probability (among the top k) reaches p (Holtzman et al. 2020,
            arXiv 1904.09751); 1: all.
        min_p: Only tokens at least this share as probable as the likeliest (Nguyen et al. 2024, arXiv 2407.01082);
            0: all.
        repetition_penalty: Logits of tokens that stand in the prompt or completion already are divided by it where
            positive and multiplied where negative (Keskar et al. 2019, arXiv 1909.05858); 1: none.
        suppress_tokens: Ids that are never chosen.
        seed: Of the sampling noise; None draws one from torch's global generator.
        row_numbers: A row's noise is that of (seed, its number); None: its position. Requests bring their own numbers.
        context_length: The most tokens the model takes; None: what its config says.
    """

    max_new_tokens: int
    pad_token_id: int = 0
    stop_token_ids: Sequence[int] = ()
    stop_strings: Sequence[str] = ()
    decode: Callable[[list[int]], str] | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppress_tokens: Sequence[int] = ()
    seed: int | None = None
    row_numbers: Sequence[int] | None = None
    context_length: int | None = None

    def __post_init__(self) -> None:
        is_valid = self.max_new_tokens >= 1 and self.temperature >= 0 and self.top_k >= 0
        is_valid = is_valid and 0 < self.top_p <= 1 and 0 <= self.min_p <= 1 and self.repetition_penalty > 0
        if not is_valid:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens}, temperature={self.temperature}, top_k={self.top_k}, "
                f"top_p={self.top_p}, min_p={self.min_p}, repetition_penalty={self.repetition_penalty}: expected "
                "max_new_tokens >= 1, temperature >= 0 (0: greedy), top_k >= 0 (0: all tokens), 0 < top_p <= 1 (1: all "
                "tokens), 0 <= min_p <= 1 (0: all tokens) and repetition_penalty > 0 (1: none)"
            )
        if self.stop_strings and self.decode is None:
            raise ValueError(
                f"stop_strings={list(self.stop_strings)} are looked for in text, but decode is None: give a function "
                "that turns ids into text, such as tokenizer.decode"
            )

    @property
    def is_cut(self) -> bool:
        """Whether fewer tokens than all that are allowed are drawn from."""
        may_cut = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return may_cut and self.temperature > 0

    def says_stop(self, ids: Sequence[int]) -> bool:
        """Whether a row's text holds a stop string, where it held none before the last of its `ids`.

        As few of the last tokens become text as it takes: a text of n tokens would else be made n times.
        """
        assert self.decode is not None
        longest = max(len(string) for string in self.stop_strings)
        num_tokens = max(len(string.encode()) for string in self.stop_strings) + SPARE_TOKENS
        while True:
            first = max(0, len(ids) - num_tokens)
            # NOTE: the first token may be the rest of a character, which can spoil all that is spelled in bytes behind it.
            for start in range(first, max(-1, first - BYTES_OF_CHARACTER), -1):
                text = self.decode(list(ids[start:]))
                if any(string in text for string in self.stop_strings):
                    return True
                if PARTIAL not in text:
                    break
            # The string may begin further in front where tokens have no text. What a text begins with may be left out of it.
            if first == 0 or len(self.decode(list(ids[first:-1]))) > longest:
                return False
            num_tokens *= 2

    def choose(self, logits: Tensor, noise: Tensor, seen: Tensor | None = None) -> Draw:
        """Choose one token per row by inverting the cumulative distribution (a fifth of the time of `multinomial`).

        Args:
            logits: `[B, V]`.
            noise: `[B]`, uniform in [0, 1).
            seen: `[B, V]`, whether a token stands in a row already; for the repetition penalty.
        """
        logits = self._adjusted(logits, seen)
        target = noise.float().clamp(max=BELOW_ONE)[:, None]
        if self.is_cut:
            cut = self._cut(logits)
            place = _invert(cut.logprobs.exp().cumsum(-1), target)
            return Draw(cut.ids.gather(1, place)[:, 0], cut.logprobs.gather(1, place)[:, 0], cut)
        # In place from here on: over a whole vocabulary new memory takes longer than the arithmetic.
        highest = logits.amax(-1, keepdim=True)
        cumulative = (logits - highest).exp_().cumsum_(-1)
        total = cumulative[:, -1:]
        chosen = logits.argmax(-1, keepdim=True) if self.temperature == 0 else _invert(cumulative, target)
        logprobs = logits.gather(1, chosen) - highest - total.log()
        return Draw(chosen[:, 0], logprobs[:, 0])

    def logprobs(self, logits: Tensor, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        """Log-probabilities `[B]` of `ids [B]` under what `choose` draws from; -inf: it would not draw that token."""
        logits = self._adjusted(logits, seen)
        if not self.is_cut:
            return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)
        cut = self._cut(logits)
        is_it = cut.ids == ids[:, None]
        return cut.logprobs.masked_fill(~is_it, -torch.inf).amax(-1)

    def _adjusted(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits in float32 under repetition penalty, suppression and temperature. `[B, V]`"""
        logits = logits.float()
        if self.repetition_penalty != 1:
            assert seen is not None
            weaker = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, weaker, logits)
        if self.suppress_tokens:
            logits = logits.index_fill(1, id_tensor(tuple(self.suppress_tokens), logits.device), -torch.inf)
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        return logits

    def _cut(self, logits: Tensor) -> Cut:
        """What top-k, top-p and min-p leave of `logits [B, V]`."""
        # 1. candidates: the head of the vocabulary nearly always holds enough, and is 15 times faster than sorting all
        vocabulary = logits.shape[1]
        if self.top_k:
            values, ids = logits.topk(min(self.top_k, vocabulary))
            total = values.logsumexp(-1, keepdim=True)
        else:
            num = min(NUM_CANDIDATES, vocabulary)
            total = logits.logsumexp(-1, keepdim=True)
            values, ids = logits.topk(num)
            while num < vocabulary and not self._holds_enough(values, total):  # the host waits here
                num = min(8 * num, vocabulary)
                values, ids = logits.topk(num)

        # 2. how many of them are left: the first always is
        probabilities = (values - total).exp()
        before = probabilities.cumsum(-1) - probabilities
        is_left = before < self.top_p
        if self.min_p:
            is_left &= values >= values[:, :1] + math.log(self.min_p)
        is_left[:, 0] = True
        num_left = is_left.sum(-1)
        left = values.masked_fill(~is_left, -torch.inf)
        return Cut(ids, left - left.logsumexp(-1, keepdim=True), num_left)

    def _holds_enough(self, values: Tensor, total: Tensor) -> bool:
        """Whether the tokens that are left are among the likeliest ones, `values [B, K]`; `total [B, 1]` normalises."""
        enough = torch.zeros_like(values[:, 0], dtype=torch.bool)
        if self.top_p < 1:
            enough |= (values - total).exp().sum(-1) >= self.top_p
        if self.min_p:
            enough |= values[:, -1] < values[:, 0] + math.log(self.min_p)
        return bool(enough.all())

    def base_seed(self) -> int:
        """The seed, or one drawn from torch's global generator."""
        if self.seed is None:
            return int(torch.randint(2**62, ()))
        return self.seed % 2**64

    def budgets(self, prompts: Sequence[Sequence[int]], context_length: int | None) -> list[int]:
        """How many tokens each row may get."""
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {row} is empty; a model continues at least one token (often the BOS token)")
            if context_length is not None and len(prompt) >= context_length:
                raise ValueError(
                    f"prompt {row} has {len(prompt)} tokens, but the model's context is {context_length} tokens: "
                    "shorten the prompt so that at least one new token fits"
                )
        if context_length is None:
            return [self.max_new_tokens] * len(prompts)
        return [min(self.max_new_tokens, context_length - len(prompt)) for prompt in prompts]


def noise(seed: int, number: int, sample: int, num_tokens: int) -> np.ndarray:
    """Uniform numbers in [0, 1) of (seed, number, sample), one per token; a longer row begins with the same. `[T]`"""
    if sample == 0:
        return np.random.default_rng([seed, number]).random(num_tokens, dtype=np.float64)
    sequence = np.random.SeedSequence([seed, number], spawn_key=(sample,))
    return np.random.default_rng(sequence).random(num_tokens, dtype=np.float64)


@lru_cache(maxsize=64)
def id_tensor(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Ids as a tensor that is made once, not once per token."""
    return torch.tensor(ids, device=device)


def _invert(cumulative: Tensor, target: Tensor) -> Tensor:
    """The place `[B, 1]` where a cumulative sum of probabilities, `[B, K]`, passes the share `target [B, 1]` of all."""
    chosen = torch.searchsorted(cumulative, target * cumulative[:, -1:], right=True)
    return chosen.clamp_(max=cumulative.shape[1] - 1)
