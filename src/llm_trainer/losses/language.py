"""Language-modelling losses: pure functions of logits and labels.

Conventions. `labels` are un-shifted: the label of position t is the token AT t, and the logits of position t - 1
predict it, so the label of position 0 never counts. Positions that do not count hold `IGNORE`. A mean is taken over
the supervised tokens; over no tokens it is 0 with zero gradients, not NaN. Tokens may have weights: then it is
sum(weight * loss) / sum(weight).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


@dataclass(frozen=True)
class LanguageLoss:
    """What one token contributes to the loss.

    With p the model's distribution, y the label, and f = p_y held constant for `dft` (else f = 1):
    `c * (f * ((1 - e) * -log p_y + e * mean_v(-log p_v)) + z * logsumexp(logits)^2)`.

    Attributes:
        label_smoothing: e, the share of the target spread evenly over the vocabulary (Szegedy et al. 2016).
        z_loss_coef: z, keeps the softmax normaliser near 1 (PaLM, Chowdhery et al. 2022, section 5).
        critical_tokens: token ids whose losses are multiplied by `critical_alpha`; the mean's denominator stays the
            number of tokens.
        critical_alpha: c for the critical tokens; 1 for all others.
        dft: dynamic fine-tuning, the loss weighted by the probability of the label (arXiv 2508.05629).
    """

    label_smoothing: float = 0.0
    z_loss_coef: float = 0.0
    critical_tokens: tuple[int, ...] = ()
    critical_alpha: float = 1.0
    dft: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1), e.g. 0.1")
        if self.z_loss_coef < 0.0:
            raise ValueError(f"z_loss_coef is {self.z_loss_coef}; it must not be negative, e.g. 1e-4")

    def token_weights(self, labels: Tensor) -> Tensor:
        """The factor c of every label. `labels [...]` -> `[...]` float32."""
        weights = torch.ones(labels.shape, device=labels.device)
        if self.critical_tokens:
            critical = torch.isin(labels, torch.tensor(self.critical_tokens, device=labels.device))
            weights = weights.masked_fill(critical, self.critical_alpha)
        return weights


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precision raised to float32; float32 and float64 as they are. Any shape."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def mean_over(total: Tensor, count: Tensor) -> Tensor:
    """`total / count`, and `total` where the count is 0, which is then 0. Both of one shape; a count may be a fraction."""
    return total / torch.where(count == 0, 1, count)


def num_supervised(labels: Tensor) -> Tensor:
    """How many tokens of `labels [B, T]` are predicted from a position before them. -> scalar int64."""
    return (labels[:, 1:] != IGNORE).sum()


def weight_sum(labels: Tensor, weights: Tensor | None) -> Tensor:
    """What the loss of `labels [B, T]` is a mean over: the sum of `weights [B, T]` where something is predicted.

    Without weights the number of these tokens. -> scalar, int64 or float32.

    Raises:
        ValueError: the shapes differ.
    """
    if weights is None:
        return num_supervised(labels)
    if weights.shape != labels.shape:
        raise ValueError(
            f"loss_weights: found the shape {tuple(weights.shape)}; expected that of labels, {tuple(labels.shape)}: how "
            "much the loss of each label counts, at the same position; fix: pad and cut both alike"
        )
    return (weights[:, 1:].float() * (labels[:, 1:] != IGNORE)).sum()


def flat_losses(
    logits: Tensor, labels: Tensor, loss: LanguageLoss, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Losses, times their `weights [N]`, and log-probabilities of N tokens.

    `logits [N, V]`, `labels [N]` all token ids -> `[N]` twice.
    """
    logits = at_least_float32(logits)
    log_normaliser = logits.logsumexp(-1)
    logprobs = logits.gather(-1, labels[:, None]).squeeze(-1) - log_normaliser
    values = -(1 - loss.label_smoothing) * logprobs
    if loss.label_smoothing:
        values = values + loss.label_smoothing * (log_normaliser - logits.mean(-1))
    if loss.dft:
        values = values * logprobs.detach().exp()
    if loss.z_loss_coef:
        values = values + loss.z_loss_coef * log_normaliser.square()
    values = values * loss.token_weights(labels)
    if weights is not None:
        values = values * weights
    return values, logprobs
