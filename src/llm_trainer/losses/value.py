"""What PPO needs beside the policy's loss: rewards per token, advantages from a critic, the critic's loss, and state.

All functions take a padded batch `[B, T]` or one laid flat `[1, N]`, with `losses.sequences` saying which tokens count
(those that the policy wrote) and whose they are; what stands elsewhere is not read. Tokens in the middle that do not
count, such as what a tool has said, are stepped over: an episode is the row of tokens that the policy wrote.

Letters: `B` rows, `T` positions, `R` sequences. Source of the parts: InstructGPT (Ouyang et al. 2022, arXiv:2203.02155).
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_trainer.losses.language import mean_over
from llm_trainer.losses.policy import KL_ESTIMATORS
from llm_trainer.losses.sequences import Sequences


def token_rewards(
    scores: Tensor,
    sequences: Sequences,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    ended: Tensor | None = None,
    missing_eos_penalty: float | None = None,
) -> Tensor:
    """Rewards per token: the KL to the reference at each one, the score at the last one (InstructGPT, eq. 2).

    Args:
        scores: `[R]` of whole sequences; NaN: missing, and none is added (such a row should be masked).
        sequences: which tokens count.
        kl: `[B, T]`, estimates of each token's KL (`kl_estimates`); None: none.
        kl_coef: what it is multiplied by.
        ended: `[R]` bool, the sequence ended by itself; needed where there is a penalty.
        missing_eos_penalty: taken from the score of a sequence that did not; None: nothing is.

    Returns:
        `[B, T]`, 0 where nothing counts.
    """
    if missing_eos_penalty is not None:
        assert ended is not None, "a penalty for sequences without an end needs to know which have one"
        scores = torch.where(ended, scores, scores - missing_eos_penalty)
    rewards = torch.zeros(sequences.mask.shape, dtype=scores.dtype, device=sequences.mask.device)
    if kl is not None:
        rewards = rewards - kl_coef * kl
    compact = sequences.compact(rewards)  # (R, most)
    if compact.shape[1]:
        last = (sequences.counts - 1).clamp(min=0)[:, None]
        at_end = torch.where(sequences.counts > 0, scores.nan_to_num(nan=0.0), 0.0)[:, None].to(compact.dtype)
        compact = compact.scatter_add(1, last, at_end)
    return sequences.expand(compact)


def kl_estimates(logprobs: Tensor, ref_logprobs: Tensor, sequences: Sequences, estimator: str = "k1") -> Tensor:
    """Estimates of KL(policy || reference) at each token `[B, T]` by one of `KL_ESTIMATORS`, 0 where nothing counts."""
    return sequences.keep(KL_ESTIMATORS[estimator](sequences.keep(logprobs) - sequences.keep(ref_logprobs)))


def gae(
    rewards: Tensor, values: Tensor, sequences: Sequences, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438, eq. 16).

    `d_t = r_t + gamma V_{t+1} - V_t`, `A_t = d_t + gamma lam A_{t+1}`, over the tokens that count; behind the last one V
    and A are 0, also where the sequence was cut off.

    Args:
        rewards: `[B, T]` per token.
        values: `[B, T]` the critic's estimate before each token was written.
        sequences: which tokens count.
        gamma: discount per token.
        lam: 0 trusts the critic, 1 the rewards.

    Returns:
        Advantages and returns, `A_t + V_t`, both `[B, T]`, 0 where nothing counts.
    """
    rewards, values = sequences.compact(rewards), sequences.compact(values)  # (R, most)
    advantages = torch.zeros_like(values)
    ahead = next_value = values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        # Behind a sequence's end all of it is 0, so nothing comes back from there.
        ahead = delta + gamma * lam * ahead
        advantages[:, t], next_value = ahead, values[:, t]
    return sequences.expand(advantages), sequences.expand(advantages + values)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True, ddof: int = 1, eps: float = 1e-8) -> Tensor:
    """`(x - mean) / sqrt(var + eps)` over `mask`, 0 elsewhere; the mean is put back unless `shift_mean`. Any shape.

    All equal, or one alone, give 0 (or the mean).
    """
    mask = mask.bool()
    kept = torch.where(mask, values, 0.0)
    count = mask.sum().to(kept.dtype)
    mean = mean_over(kept.sum(), count)
    centred = torch.where(mask, kept - mean, 0.0)
    variance = mean_over(centred.square().sum(), (count - ddof).clamp(min=0))
    whitened = centred * (variance + eps).rsqrt()
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0.0)


def value_loss(
    values: Tensor, returns: Tensor, mask: Tensor, old_values: Tensor | None = None, clip: float | None = None
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The critic's squared error per token, with half in it, clipped as the policy is (Schulman et al. 2017, baselines).

    `0.5 max((v - R)^2, (clip(v, old +- clip) - R)^2)`; the caller takes the mean over tokens and multiplies by `vf_coef`.

    Args:
        values: `[B, T]` of the critic that learns; gradients flow into it.
        returns: `[B, T]` what they should be.
        mask: `[B, T]` the tokens that count.
        old_values: `[B, T]` when the update began.
        clip: how far from them a value counts; None: no clipping.

    Returns:
        Losses `[B, T]`, 0 outside the mask, and as (total, count) "val/clipfrac_avg" and "val/mean".
    """
    mask = mask.bool()
    values = torch.where(mask, values.to(torch.promote_types(values.dtype, torch.float32)), 0.0)
    returns = torch.where(mask, returns.to(values.dtype), 0.0)
    losses = (values - returns).square()
    count = mask.sum()
    metrics = {"val/mean": (values.detach().sum(), count)}
    if clip is not None:
        assert old_values is not None, "clipping needs the values when the update began"
        old = torch.where(mask, old_values.to(values.dtype), 0.0)
        clipped = (values.clamp(old - clip, old + clip) - returns).square()
        metrics["val/clipfrac_avg"] = ((clipped > losses).detach().sum(), count)
        losses = torch.maximum(losses, clipped)
    return 0.5 * losses, metrics


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """`1 - var(returns - values) / var(returns)` over `mask`: 1 where the critic knows all, 0 for a constant; any shape.

    NaN where the returns do not vary. Of a whole rollout: it is no mean of those of its parts.
    """
    mask = mask.bool()
    returns, values = returns[mask].double(), values[mask].double()
    if len(returns) < 2 or returns.max() == returns.min():
        return float("nan")
    return float(1 - (returns - values).var() / returns.var())


# State that follows a run; what a checkpoint holds of it is JSON.


class FixedKL:
    """A KL coefficient that stays.

    Attributes:
        coef: the coefficient.
    """

    def __init__(self, coef: float) -> None:
        self.coef = coef

    def update(self, kl: float, num_sequences: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the coefficient is the configuration's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was saved."""


class AdaptiveKL:
    """A KL coefficient that keeps the KL near a target (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    Attributes:
        coef: the coefficient now.
        target: KL per sequence, in nats, that is aimed at.
        horizon: sequences over which the coefficient follows.
    """

    def __init__(self, coef: float, target: float, horizon: float) -> None:
        if not (target > 0 and horizon > 0):
            raise ValueError(f"an adaptive KL needs target and horizon above 0, found {target} and {horizon}")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, num_sequences: int) -> None:
        """Follow `kl`, the mean over `num_sequences` of the KL summed over each one's tokens."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * num_sequences / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """The coefficient."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the coefficient of `state`."""
        self.coef = state["coef"]


class RewardNorm(Protocol):
    """Something that brings rewards to one scale."""

    def __call__(self, rewards: Tensor) -> Tensor: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class BatchStd:
    """Rewards `[R]` less their mean, over their standard deviation (ddof 1); NaN stays. All equal: 0."""

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps

    def __call__(self, rewards: Tensor) -> Tensor:
        """-> `[R]`."""
        present = ~rewards.isnan()
        return whiten(rewards, present, eps=self.eps).masked_fill(~present, torch.nan)

    def state_dict(self) -> dict[str, Any]:
        """Nothing follows the run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing was saved."""


class RunningMeanStd:
    """Rewards `[R]` less the mean of all rewards so far, these included, over their standard deviation; NaN stays.

    Counted by Chan's formula for merging (Chan, Golub and LeVeque 1979), in float64.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        self.eps = eps
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: sum of squared differences from the mean

    def __call__(self, rewards: Tensor) -> Tensor:
        """Take `rewards` in, then normalise them: `[R]` -> `[R]`."""
        new = rewards[~rewards.isnan()].double()
        if len(new):
            count = self.count + len(new)
            difference = float(new.mean()) - self.mean
            self.squares += float((new - new.mean()).square().sum()) + difference**2 * self.count * len(new) / count
            self.mean += difference * len(new) / count
            self.count = count
        variance = self.squares / max(self.count - 1, 1)
        return (rewards - self.mean) / (variance + self.eps) ** 0.5

    def state_dict(self) -> dict[str, Any]:
        """Number, mean and spread of the rewards so far."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


# What `normalize_method` may be.
REWARD_NORMS: dict[str, Callable[[], RewardNorm]] = {"RunningMeanStd": RunningMeanStd, "BatchStd": BatchStd}
