"""What makes up for tokens that another policy drew than the one that learns: an older one, or another engine's."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llm_trainer.losses.language import mean_over
from llm_trainer.losses.policy import Level, bounded_exp
from llm_trainer.losses.sequences import Sequences


@dataclass(frozen=True)
class Correction:
    """Weights for tokens that another policy drew than the one whose ratios the loss takes: an older one, another engine.

    With w = exp(log pi_old(y) - log pi_sampled(y)), of a token or of its whole sequence (the product):

    Attributes:
        mode: "truncate", min(w, `cap`) (truncated importance sampling, Yao et al. 2025), or "mask", w where
            `floor` <= w <= `cap` and else 0 (IcePop, Ling Team 2025, arXiv:2510.18855).
        level: "token" or "seq".
        cap: the largest weight.
        floor: below it "mask" drops a token or sequence.
    """

    mode: Literal["truncate", "mask"] = "truncate"
    level: Level = "token"
    cap: float = 2.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.mode not in ("truncate", "mask"):
            raise ValueError(f"correction mode {self.mode!r} is not known; expected 'truncate' or 'mask'")
        if self.level not in ("token", "seq"):
            raise ValueError(f"correction level {self.level!r} is not known; expected 'token' or 'seq'")
        if not 0 <= self.floor < 1 <= self.cap:
            raise ValueError(f"a correction needs 0 <= floor < 1 <= cap, found floor={self.floor} and cap={self.cap}")

    @torch.no_grad()
    def __call__(
        self, old_logprobs: Tensor, sampled_logprobs: Tensor, sequences: Sequences
    ) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """The weights and what to watch.

        Args:
            old_logprobs: `[B, T]` under the policy that learns, when the update began.
            sampled_logprobs: `[B, T]` under the policy that drew the tokens; NaN where nobody knows: their weight is 1.
            sequences: which tokens count.

        Returns:
            Weights `[B, T]`, 0 where nothing counts; and, as (total, count): "sampling/importance_weight",
            "sampling/corrected_share" (tokens, or sequences, that were truncated or masked) and
            "sampling/effective_sample_size", the share (sum w)^2 / (n sum w^2) of the micro-batch (Kish 1965), in which
            every one of its n tokens, or sequences, counts.
        """
        log_weights = sequences.keep(old_logprobs - sampled_logprobs)
        log_weights = torch.where(
            sampled_logprobs.isnan(), 0.0, log_weights
        )  # given, not drawn: nothing to make up for
        counted = sequences.mask
        if self.level == "seq":
            log_weights, counted = sequences.sum(log_weights), sequences.counts > 0
        weights = bounded_exp(log_weights)
        is_off = weights > self.cap
        if self.mode == "mask":
            is_off = is_off | (weights < self.floor)
            weights = weights.masked_fill(is_off, 0.0)
        weights = torch.where(counted, weights.clamp(max=self.cap), 0.0)
        count = counted.sum()
        share = mean_over(weights.sum().square(), weights.square().sum())  # effective number: 0 where all are masked
        metrics = {
            "sampling/importance_weight": (weights.sum(), count),
            "sampling/corrected_share": ((is_off & counted).sum(), count),
            "sampling/effective_sample_size": (share, count),
        }
        return sequences.keep(sequences.spread(weights)), metrics
