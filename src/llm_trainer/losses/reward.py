"""Losses that train reward models: from comparisons of whole answers, or from a label per reasoning step.

Letters: `B` pairs or sequences, `T` positions.
"""

import torch.nn.functional as F
from torch import Tensor


def bradley_terry(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, center_coef: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Make the chosen answer score higher than the rejected one: `-log sigmoid(chosen - rejected - margin)`.

    Bradley and Terry 1952, as in InstructGPT (Ouyang et al. 2022, arXiv:2203.02155, eq. 1); the margin says how much
    better the chosen answer is (Touvron et al. 2023, Llama 2, arXiv:2307.09288, eq. 2). Only differences of rewards
    enter, so `center_coef * (chosen + rejected)^2` pins their level to 0 (Eisenstein et al. 2023, arXiv:2312.09244).

    Args:
        chosen: `[B]` rewards of the chosen answers.
        rejected: `[B]` rewards of the rejected answers.
        margin: `[B]` how much the rewards should differ at least; 0 if not given.
        center_coef: weight of the centering term.

    Returns:
        The losses `[B]`, of which the step takes the mean, and detached metrics per pair, `[B]`: "accuracy" (strictly
        higher; the margin does not count), "margin", "mean_reward", "min_reward", "max_reward". The last two are
        extremes within a pair: take the minimum and maximum over pairs, not the mean.
    """
    difference = chosen - rejected
    beyond_margin = difference if margin is None else difference - margin
    losses = -F.logsigmoid(beyond_margin) + center_coef * (chosen + rejected).square()
    metrics = {
        "accuracy": (difference > 0).to(chosen.dtype),
        "margin": difference.detach(),
        "mean_reward": ((chosen + rejected) / 2).detach(),
        "min_reward": chosen.minimum(rejected).detach(),
        "max_reward": chosen.maximum(rejected).detach(),
    }
    return losses, metrics


def process_reward(scores: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Judge every reasoning step right or wrong: binary cross-entropy at the last token of each step.

    Lightman et al. 2023, arXiv:2305.20050; labels between 0 and 1 are the share of continuations from the step that
    reach the right answer (Wang et al. 2023, Math-Shepherd, arXiv:2312.08935).

    Args:
        scores: `[B, T]` logit that the step ending at this token is right.
        labels: `[B, T]` in [0, 1], read where the mask is nonzero.
        mask: `[B, T]` nonzero on the last token of each step.

    Returns:
        The losses `[B, T]`, 0 outside the mask; the step divides their sum by the number of its steps. Detached metric
        "accuracy" `[B, T]`, likewise: does the score's sign agree with `label > 0.5`.
    """
    judged = mask.bool()
    scores = scores.masked_fill(~judged, 0.0)
    labels = labels.to(scores.dtype).masked_fill(~judged, 0.0)
    losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none").masked_fill(~judged, 0.0)
    agrees = (scores > 0) == (labels > 0.5)
    return losses, {"accuracy": (agrees & judged).to(losses.dtype)}
