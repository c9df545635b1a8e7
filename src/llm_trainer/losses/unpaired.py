"""Losses that learn from single answers called good or bad: KTO and APO-zero. Letter: `B` completions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_trainer.losses.language import mean_over


def kto_loss(log_ratios: Tensor, labels: Tensor, kl: Tensor, beta: float) -> Tensor:
    """KTO (Ethayarajh et al. 2024, arXiv:2402.01306): `1 - sigmoid(+-beta (log_ratio - kl))`. `[B]`."""
    gain = beta * (log_ratios - kl)
    return torch.sigmoid(torch.where(labels, -gain, gain))


def apo_zero_unpaired_loss(log_ratios: Tensor, labels: Tensor, kl: Tensor, beta: float) -> Tensor:
    """APO-zero for unpaired data (arXiv:2408.06266): KTO with the reference point at 0; `kl` is not read. `[B]`."""
    return kto_loss(log_ratios, labels, torch.zeros_like(kl), beta)


# (log_ratios [B], labels [B] bool, kl [], beta) -> [B].
UNPAIRED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "kto": kto_loss,
    "apo_zero_unpaired": apo_zero_unpaired_loss,
}


@dataclass(frozen=True)
class UnpairedLoss:
    """A loss on completions that are desirable or not, with its settings.

    The weights balance unequal numbers of the two: the paper keeps (weight x number) of both within a factor 4/3.
    """

    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_type not in UNPAIRED_LOSSES:
            raise ValueError(
                f"loss_type {self.loss_type!r} is no loss on unpaired data; known: {list(UNPAIRED_LOSSES)}."
            )
        if self.beta <= 0:
            raise ValueError(f"beta={self.beta} must be above 0.")

    def __call__(self, log_ratios: Tensor, labels: Tensor, kl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Score `B` completions.

        Args:
            log_ratios: `[B]` summed log-probs, policy minus reference.
            labels: `[B]` bool, True where the completion is desirable.
            kl: `[]` from `kto_kl`, over the whole optimizer step.

        Returns:
            The losses `[B]`, of which the step takes the mean, and detached metrics: "kl" `[]` and the rewards of the
            two kinds, "rewards/chosen" `[num desirable]`, "rewards/rejected" `[num undesirable]` (either may be empty).
        """
        losses = UNPAIRED_LOSSES[self.loss_type](log_ratios, labels, kl, self.beta)
        losses = torch.where(labels, self.desirable_weight * losses, self.undesirable_weight * losses)
        rewards = self.beta * log_ratios.detach()  # selecting by a mask makes the host wait for the device
        return losses, {"rewards/chosen": rewards[labels], "rewards/rejected": rewards[~labels], "kl": kl}


def kto_kl(mismatched_log_ratios: Tensor, num_pairs: Tensor | int | None = None) -> Tensor:
    """KTO's reference point `[]`: the mean of the summed log-ratios of mismatched pairs, at least 0, no gradient.

    It is one for the optimizer step: a maximum with 0 per micro-batch would bias it upwards.

    Args:
        mismatched_log_ratios: `[N]`, those of all mismatched pairs, or totals of several.
        num_pairs: how many pairs these are; N if not given.
    """
    if num_pairs is None:
        num_pairs = mismatched_log_ratios.numel()
    total = mismatched_log_ratios.detach().sum()
    return mean_over(total, torch.as_tensor(num_pairs)).clamp(min=0)


def mismatched_order(prompts: Tensor) -> Tensor:
    """Choose, for every prompt of a batch, the row whose completion it is paired with to estimate KTO's KL.

    Row `i` gets another row, and one with another prompt wherever no prompt fills more than half of the batch; so it
    does not matter whether the sampler shuffles, or puts the completions of a prompt side by side.

    Args:
        prompts: `[B]` prompt ids or `[B, P]` prompt tokens; equal entries are the same prompt.

    Returns:
        `[B]`, a permutation: prompt `i` goes with completion `order[i]`.

    Raises:
        ValueError: `B` is below 2.
    """
    size = len(prompts)
    if size < 2:
        raise ValueError(
            f"KTO's KL needs mismatched pairs and so at least 2 rows in a batch, found {size}; raise batch_size."
        )
    _, group, counts = torch.unique(prompts, dim=0, return_inverse=True, return_counts=True)
    by_prompt = group.argsort(stable=True)
    # Equal prompts now lie in runs; rotating by the longest run (not by B, which is no rotation) leaves every run.
    rotated = by_prompt.roll(-min(int(counts.max()), size - 1))
    return torch.empty_like(by_prompt).scatter_(0, by_prompt, rotated)
