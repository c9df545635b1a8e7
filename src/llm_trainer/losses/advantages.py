"""How much better a completion was than expected: advantages from rewards, for whole sequences.

Pure functions of the columns of a whole rollout, so that every process computes the same. A reward that is missing is
NaN; it leaves its group's statistics, and a completion without any leaves the loss (its advantage is 0, and
`is_missing` says so). A group whose rewards are all equal gives exactly 0, in any precision.

Letters: `R` completions, `F` reward functions. Source of all that compare within a group: DeepSeekMath (Shao et al. 2024,
arXiv:2402.03300, section 4.1.2).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llm_trainer.losses.language import mean_over

EPS = 1e-4  # added to standard deviations, which have ddof 1, as in TRL


class Group(NamedTuple):
    """Statistics of the group of each completion, over its members with a reward; all `[R]`.

    Attributes:
        mean: of the rewards.
        std: with ddof 1; 0 for one member.
        size: members with a reward.
        is_level: their rewards are all equal, found by comparison, since the rounding of a mean would hide it.
    """

    mean: Tensor
    std: Tensor
    size: Tensor
    is_level: Tensor


def group_statistics(rewards: Tensor, groups: Tensor, ddof: int = 1) -> Group:
    """`rewards [R]`, NaN where missing; `groups [R]`, equal numbers for completions of one prompt."""
    _, index = groups.unique(return_inverse=True)
    num_groups = int(index.max()) + 1 if len(index) else 0
    present = ~rewards.isnan()

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(num_groups).index_add(0, index, torch.where(present, values, 0.0))[index]

    def extreme(fill: float, reduce: str) -> Tensor:
        start = rewards.new_full((num_groups,), fill)
        return start.scatter_reduce(0, index, rewards.masked_fill(~present, fill), reduce)[index]

    count = total(torch.ones_like(rewards))
    mean = mean_over(total(rewards), count)
    variance = mean_over(total((rewards - mean).square()), (count - ddof).clamp(min=0))
    is_level = extreme(-torch.inf, "amax") <= extreme(torch.inf, "amin")
    return Group(mean, torch.where(is_level, 0.0, variance.sqrt()), count, is_level)


def _centred(rewards: Tensor, group: Group) -> Tensor:
    """Rewards less the mean of their group, exactly 0 where all are equal, NaN where missing."""
    return torch.where(group.is_level & ~rewards.isnan(), 0.0, rewards - group.mean)


def _scaled(centred: Tensor, std: Tensor, options: "Advantages") -> Tensor:
    """`centred / (std + eps)`, and 0 where it is 0, whatever the eps. `[R]`."""
    return torch.where(centred == 0, 0.0, centred / (std + options.eps))


def _of_all(rewards: Tensor) -> Group:
    """Statistics over all completions."""
    return group_statistics(rewards, torch.zeros(len(rewards), dtype=torch.long, device=rewards.device))


def group_advantages(rewards: Tensor, groups: Tensor, options: "Advantages") -> Tensor:
    """`(r - mean) / (std + eps)` of the group: GRPO (Shao et al. 2024, arXiv:2402.03300). `[R]`."""
    group = group_statistics(rewards, groups, options.ddof)
    return _scaled(_centred(rewards, group), group.std, options)


def dr_grpo_advantages(rewards: Tensor, groups: Tensor, options: "Advantages") -> Tensor:
    """`r - mean` of the group: Dr. GRPO (Liu et al. 2025, arXiv:2503.20783), without the bias to easy and hard prompts."""
    return _centred(rewards, group_statistics(rewards, groups))


def batch_advantages(rewards: Tensor, groups: Tensor, options: "Advantages") -> Tensor:
    """`r - mean` of the group over the std of all rewards (Liu et al. 2025, arXiv:2508.08221). `[R]`."""
    return _scaled(_centred(rewards, group_statistics(rewards, groups)), _of_all(rewards).std, options)


def rloo_advantages(rewards: Tensor, groups: Tensor, options: "Advantages") -> Tensor:
    """`r` less the mean of the others of the group: RLOO (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8). `[R]`."""
    group = group_statistics(rewards, groups)
    return _centred(rewards, group) * mean_over(group.size, group.size - 1)


def reinforce_advantages(rewards: Tensor, groups: Tensor, options: "Advantages") -> Tensor:
    """`(r - mean) / (std + eps)` over all completions: REINFORCE++ (Hu 2025, arXiv:2501.03262). `[R]`."""
    everything = _of_all(rewards)
    return _scaled(_centred(rewards, everything), everything.std, options)


def reinforce_baseline_advantages(rewards: Tensor, groups: Tensor, options: "Advantages") -> Tensor:
    """`r - mean` of the group, over the std of these differences: REINFORCE++-baseline (arXiv:2501.03262). `[R]`."""
    return reinforce_advantages(dr_grpo_advantages(rewards, groups, options), groups, options)


def remax_advantages(rewards: Tensor, groups: Tensor, options: "Advantages") -> Tensor:
    """`r` less the reward of the prompt's greedy completion: ReMax (Li et al. 2023, arXiv:2310.10505, eq. 8). `[R]`."""
    assert options.greedy_rewards is not None
    return rewards - options.greedy_rewards.to(rewards)


def gdpo_advantages(rewards: Tensor, groups: Tensor, options: "Advantages") -> Tensor:
    """Each function's rewards normalised in their group, summed by weight, normalised over all completions. `[R]`.

    GDPO (Liu et al. 2026, arXiv:2601.05242), so that functions of different spread count alike. `rewards [R, F]`.
    """
    columns = [group_advantages(column, groups, options) for column in rewards.unbind(1)]
    normalised = torch.stack(columns, 1).masked_fill(rewards.isnan(), torch.nan)
    return reinforce_advantages(weighted_rewards(normalised, options.weights), groups, options)


# (rewards [R] with NaN, groups [R], options) -> [R]; those of `PER_FUNCTION` take rewards [R, F].
ADVANTAGES: dict[str, Callable[[Tensor, Tensor, "Advantages"], Tensor]] = {
    "group": group_advantages,
    "dr_grpo": dr_grpo_advantages,
    "batch": batch_advantages,
    "rloo": rloo_advantages,
    "reinforce++": reinforce_advantages,
    "reinforce++_baseline": reinforce_baseline_advantages,
    "remax": remax_advantages,
    "gdpo": gdpo_advantages,
}
PER_FUNCTION = ("gdpo",)
# Those that also say what a reward of a token is among the rewards of other tokens: see `token_advantages`.
OF_TOKENS = ("group", "dr_grpo", "batch", "reinforce++", "reinforce++_baseline")


def weighted_rewards(rewards: Tensor, weights: Tensor | None = None) -> Tensor:
    """The reward of each completion: the weighted sum of those that it has, NaN where it has none.

    Args:
        rewards: `[R, F]`, one column per function, NaN where it does not apply or has failed.
        weights: `[F]`; None: 1 each.

    Raises:
        ValueError: there are more or fewer weights than functions.
    """
    if weights is None:
        weights = rewards.new_ones(rewards.shape[1])
    if weights.shape != rewards.shape[1:]:
        raise ValueError(f"found {len(weights)} weights for {rewards.shape[1]} reward functions; expected one for each")
    total = (rewards * weights.to(rewards)).nansum(1)
    return total.masked_fill(rewards.isnan().all(1), torch.nan)


@dataclass(frozen=True)
class Advantages:
    """How advantages are made of rewards.

    Attributes:
        kind: one of `ADVANTAGES`.
        weights: `[F]` of the reward functions; None: 1 each.
        eps: added to standard deviations.
        ddof: of the group's standard deviation: 1 estimates it, 0 describes it.
        greedy_rewards: `[R]`, for `remax`: the reward of the greedy completion of each one's prompt.
    """

    kind: str = "group"
    weights: Tensor | None = None
    eps: float = EPS
    ddof: int = 1
    greedy_rewards: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in ADVANTAGES:
            raise ValueError(f"advantages {self.kind!r} are not known; known: {', '.join(ADVANTAGES)}")

    def __call__(self, rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages of `R` completions.

        Args:
            rewards: `[R, F]`; what is not finite is missing. KL in the reward is already taken from them.
            groups: `[R]` int64, equal for completions of one prompt; in any order.

        Returns:
            Advantages `[R]`, 0 where there is no reward, and `is_missing [R]` bool: these completions leave the loss.

        Raises:
            ValueError: `remax` without the rewards of greedy completions.
        """
        if self.kind == "remax" and self.greedy_rewards is None:
            raise ValueError(
                "advantages 'remax' compare with the reward of the greedy completion of a prompt (greedy_rewards), which "
                "completions that are given do not have; give their advantages, or take another kind"
            )
        rewards = rewards.where(rewards.isfinite(), torch.nan)
        total = weighted_rewards(rewards, self.weights)
        compared = rewards if self.kind in PER_FUNCTION else total
        advantages = ADVANTAGES[self.kind](compared, groups, self)
        is_missing = total.isnan() | advantages.isnan()
        return advantages.masked_fill(is_missing, 0.0), is_missing


def greedy_rewards(rewards: Tensor, groups: Tensor, is_greedy: Tensor) -> Tensor:
    """For `remax`: `[R]` of each completion the reward of its group's greedy one, NaN where there is none.

    Args:
        rewards: `[R]`, NaN where missing.
        groups: `[R]`.
        is_greedy: `[R]` bool, at most one in each group.
    """
    _, index = groups.unique(return_inverse=True)
    of_groups = rewards.new_full((int(index.max()) + 1,), torch.nan) if len(index) else rewards
    of_groups[index[is_greedy]] = rewards[is_greedy]
    return of_groups[index]


def token_advantages(rewards: list[Tensor], groups: Tensor, options: Advantages) -> list[Tensor]:
    """What tokens earn themselves, as advantages of tokens: process supervision of DeepSeekMath.

    Each reward is compared with those of all tokens of the group, and a token has the sum of what comes from it on:
    `r~ = (r - mean) / (std + eps)`, `A_t = sum of r~ at t and behind` (Shao et al. 2024, arXiv:2402.03300, section 4.1.3).
    Kinds other than `group` centre and scale them as they do rewards of completions.

    Args:
        rewards: of each of R completions `[T]`, NaN at tokens without a reward of their own.
        groups: `[R]`.
        options: their `kind` is one of `OF_TOKENS`.

    Returns:
        Of each completion `[T]`; 0 behind the last reward.
    """
    # 1. the rewards that there are, laid end to end
    lengths = torch.tensor([len(row) for row in rewards])
    flat = torch.cat(rewards)
    is_judged = ~flat.isnan()
    of_groups = groups.repeat_interleave(lengths)
    # 2. compared
    compared = torch.zeros_like(flat)
    if is_judged.any():
        compared[is_judged] = ADVANTAGES[options.kind](flat[is_judged], of_groups[is_judged], options)
    # 3. to go
    return [row.flip(0).cumsum(0).flip(0) for row in compared.split(lengths.tolist())]


def level_share(rewards: Tensor, groups: Tensor) -> tuple[float, float]:
    """For `frac_reward_zero_std`: (groups whose rewards `[R]` are all equal, groups with a reward); NaN is missing."""
    group = group_statistics(rewards, groups)
    each = mean_over(torch.ones_like(group.size), group.size).masked_fill(rewards.isnan(), 0.0)  # sums to 1 per group
    return float(each[group.is_level].sum()), float(each.sum())
