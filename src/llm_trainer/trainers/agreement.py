"""What must hold before a rollout is learned from: who draws and who learns are the same distribution."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from llm_trainer.losses.sequences import Sequences
from llm_trainer.trainers.given import gather

# Mean difference of log-probs per token that rounding explains: of two forwards in a precision, and of sampler and trainer,
# whose products are other ones.
SAME_WEIGHTS, SAME_WEIGHTS_HALF = 1e-4, 2e-2
SAMPLER, SAMPLER_HALF = 0.01, 0.1


class DisagreementError(ValueError):
    """Numbers that must be equal are not: what would be learned is something else than what was drawn."""


class Difference(NamedTuple):
    """How far log-probs are from others, over tokens."""

    total: Tensor
    tokens: Tensor
    largest: Tensor


class Agreement:
    """Compares the policy's log-probs with those that were drawn with, with older ones and with the reference's.

    Args:
        precision: 'fp32', 'bf16' or 'fp16'.
        limit: of the mean difference between sampler and trainer; None: what rounding explains.
        is_sampled_here: whether the completions are the policy's own of this moment; else a difference is no mistake, unless
            there is a limit.
    """

    def __init__(self, precision: str, limit: float | None, is_sampled_here: bool) -> None:
        is_exact = precision == "fp32"
        self.precision, self.is_limited = precision, is_sampled_here or limit is not None
        self.limit = limit if limit is not None else (SAMPLER if is_exact else SAMPLER_HALF)
        self.same_weights = SAME_WEIGHTS if is_exact else SAME_WEIGHTS_HALF
        self._seen: dict[str, Difference] = {}

    def forget(self) -> None:
        """Begin a step."""
        self._seen = {}

    def see(self, name: str, logprobs: Tensor, others: Tensor, sequences: Sequences) -> None:
        """Note the differences of two `[B, T]`, under one of the names of `CAUSES`."""
        differences = sequences.keep(logprobs.detach() - others).abs()
        found = Difference(differences.sum(), sequences.mask.sum(), differences.amax())
        before = self._seen.get(name)
        if before is not None:
            largest = torch.maximum(before.largest, found.largest)
            found = Difference(before.total + found.total, before.tokens + found.tokens, largest)
        self._seen[name] = found

    def check(
        self, device: torch.device, rank: int, sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> dict[str, tuple[float, float]]:
        """Mean and largest difference of the step over all ranks, by name; all ranks ask together.

        Raises:
            DisagreementError: one is larger than it may be.
        """
        table = torch.zeros(1, len(CAUSES), 3, device=device)
        for number, name in enumerate(CAUSES):
            if name in self._seen:
                table[0, number] = torch.stack([value.float() for value in self._seen[name]])
        (everything,), _ = gather([table], rank, sum_over_ranks)
        totals, largest = everything.sum(0).tolist(), everything.amax(0).tolist()
        found = {}
        for number, name in enumerate(CAUSES):
            total, count, _ = totals[number]
            if count:
                found[name] = total / count, largest[number][2]
        for name, (mean, most) in found.items():
            limit = self.limit if name == "sampler" else self.same_weights
            may_differ = name == "sampler" and not self.is_limited
            if mean > limit and not may_differ:
                raise DisagreementError(
                    f"{CAUSES[name][0]} differ by {mean:.2e} per token on average, at most {most:.2e}; expected at most "
                    f"{limit:g}, which rounding in {self.precision} explains. Nothing was updated in this step. Likely causes: "
                    f"{CAUSES[name][1]}"
                )
        return found


# name -> what differs, and why it may
CAUSES = {
    "sampler": (
        "log-probs of the tokens as they were drawn and as the policy scores them",
        "the sampler has other weights, or uses some that did not arrive; dropout in the policy (set attention_dropout and "
        "the like to 0); another temperature, chat template or precision on one side. For a sampler that differs by nature "
        "raise max_logp_difference, and set off_policy_correction",
    ),
    "ratio": (
        "log-probs before the first update of a rollout and in it",
        "dropout in the policy (set attention_dropout and the like to 0); a model whose forward is not the same twice; a "
        "mixture of experts whose routes change with the rows beside",
    ),
    "reference": (
        "log-probs of policy and reference, which are the same model before the first update,",
        "dropout in the policy (set attention_dropout and the like to 0); a model that was changed after the trainer was made; "
        "if they are meant to differ, pass ref_model",
    ),
}
