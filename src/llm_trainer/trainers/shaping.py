"""From the rewards of a rollout to what its tokens teach: KL, normalisation, advantages by a critic, and what they follow."""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_trainer.data.rollout_store import Row
from llm_trainer.data.rollouts import FINISHES, Finished, Maker, Plan, Prompt, Rollout
from llm_trainer.losses.sequences import Sequences
from llm_trainer.losses.value import (
    REWARD_NORMS,
    AdaptiveKL,
    FixedKL,
    RewardNorm,
    explained_variance,
    gae,
    kl_estimates,
    token_rewards,
    whiten,
)
from llm_trainer.trainers.rollouts import judged_of

if TYPE_CHECKING:
    from llm_trainer.config.ppo import PPOConfig

# Options that the advantages of a rollout depend on: one that was made with others is not used.
OF_SHAPING = (
    "gamma",
    "lam",
    "whiten_advantages",
    "kl_beta",
    "kl_estimator",
    "kl_target",
    "kl_horizon",
    "missing_eos_penalty",
    "normalize_rewards",
    "normalize_method",
    "whiten_rewards",
)


class Scored(NamedTuple):
    """A whole rollout of `R` completions and `N` tokens laid flat, in float64.

    Attributes:
        sequences: the tokens that the policy wrote; `[1, N]`.
        rewards: `[R]`, NaN where missing.
        ended: `[R]` bool, whether it ended by itself.
        values: `[1, N]` of the critic, before each token was written.
        old_logprobs: `[1, N]` under the policy that wrote them.
        ref_logprobs: `[1, N]` under the reference; None: there is none.
        of_tokens: `[1, N]` what tokens have earned themselves, which `rewards` are in part, 0 elsewhere; None: nobody has
            judged tokens.
    """

    sequences: Sequences
    rewards: Tensor
    ended: Tensor
    values: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor | None
    of_tokens: Tensor | None = None


def scored(rollout: Rollout, rewards: np.ndarray, columns: Mapping[str, Sequence[np.ndarray]]) -> Scored:
    """A rollout that has been scored, laid flat.

    Args:
        rollout: on disk.
        rewards: `[rows]`, NaN where missing.
        columns: `values`, `old_logprobs` and, where there is a reference, `ref_logprobs`: an array `[T]` per row; of a rollout
            that is not finished what a reward model gave, too.
    """
    lengths = torch.from_numpy(np.asarray(rollout.lengths, dtype=np.int64))
    finish = rollout.column("finish")
    rewards = np.where(finish < FINISHES.index("aborted"), np.asarray(rewards, dtype=np.float64), np.nan)
    trained = np.array(rollout.store["trained"].values, dtype=bool)
    trained[np.cumsum(rollout.lengths) - rollout.lengths] = False  # nothing predicts a first token

    def flat(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate(list(columns[name]))).double()[None]

    reference = flat("ref_logprobs") if "ref_logprobs" in columns else None
    earned, of_tokens = rollout.token_rewards(columns), None
    if earned is not None:
        of_tokens = torch.from_numpy(np.nan_to_num(np.concatenate(earned[0])))[None]
    return Scored(
        sequences=Sequences(torch.from_numpy(trained)[None], lengths),
        rewards=torch.from_numpy(rewards),
        ended=torch.from_numpy(finish == FINISHES.index("stop")),
        values=flat("values"),
        old_logprobs=flat("old_logprobs"),
        ref_logprobs=reference,
        of_tokens=of_tokens,
    )


class Shaped(NamedTuple):
    """What the tokens of a rollout teach.

    Attributes:
        advantages: `[1, N]`, 0 where the completion has no reward.
        returns: `[1, N]`, what the critic should have said; 0 there.
        is_missing: `[R]` bool, which have none, and are not to be learned from.
        metrics: name -> (total, count).
    """

    advantages: Tensor
    returns: Tensor
    is_missing: Tensor
    metrics: dict[str, tuple[float, float]]


class Shaping:
    """Makes advantages of rewards, and follows the rewards and the KL of a run. Its state is in every checkpoint.

    Everything is a function of a whole rollout, so that all ranks find the same and no cut of it into updates matters.

    Args:
        how: the section of PPO.
    """

    def __init__(self, how: "PPOConfig") -> None:
        self.how = how
        self.kl: FixedKL | AdaptiveKL = FixedKL(how.kl_beta)
        if how.kl_target is not None:
            self.kl = AdaptiveKL(how.kl_beta, how.kl_target, how.kl_horizon)
        self.norm: RewardNorm | None = REWARD_NORMS[how.normalize_method]() if how.normalize_rewards else None

    def __call__(self, rollout: Scored, follows: bool = True) -> Shaped:
        """What a rollout teaches.

        Args:
            rollout: all of it.
            follows: take its rewards and KL into the statistics of the run; False in evaluation.
        """
        how = self.how

        # 1. Rewards of completions; those that are missing leave everything.
        norm = self.norm if follows else deepcopy(self.norm)
        rewards = rollout.rewards if norm is None else norm(rollout.rewards)
        is_missing = rewards.isnan()
        everything = rollout.sequences
        counted = everything.mask & ~everything.spread(is_missing)
        sequences = Sequences(counted, everything.lengths, everything.order)

        # 2. Rewards of tokens. What they have earned themselves is no part of what the last one gets.
        earned = None
        if rollout.of_tokens is not None:
            refuse_norm(norm)
            earned = sequences.keep(rollout.of_tokens)
            rewards = rewards - sequences.sum(earned)
        kl = None
        if rollout.ref_logprobs is not None:
            kl = kl_estimates(rollout.old_logprobs, rollout.ref_logprobs, sequences, how.kl_estimator)
        coef = self.kl.coef
        of_tokens = token_rewards(rewards, sequences, kl, coef, rollout.ended, how.missing_eos_penalty)
        if earned is not None:
            of_tokens = of_tokens + earned
        if how.whiten_rewards:
            of_tokens = whiten(of_tokens, counted, shift_mean=False)

        # 3. Advantages of tokens.
        advantages, returns = gae(of_tokens, rollout.values, sequences, how.gamma, how.lam)
        metrics = self._metrics(rollout, sequences, kl, advantages, returns)
        if how.whiten_advantages:
            advantages = whiten(advantages, counted)
        if follows and kl is not None:
            total, count = metrics["objective/kl"]
            if count:
                self.kl.update(total / count, int(count))
        return Shaped(advantages, returns, is_missing, metrics)

    def _metrics(
        self, rollout: Scored, sequences: Sequences, kl: Tensor | None, advantages: Tensor, returns: Tensor
    ) -> dict[str, tuple[float, float]]:
        """As they are before advantages are whitened; those of TRL by its names, per completion."""
        rows, tokens = float((sequences.counts > 0).sum()), float(sequences.mask.sum())
        present = ~rollout.rewards.isnan()
        entropy = -sequences.sum(rollout.old_logprobs).sum()
        found = {
            "objective/scores": (float(rollout.rewards[present].sum()), float(present.sum())),
            "objective/entropy": (float(entropy), rows),  # a sample of it
            "advantage/mean": (float(advantages.sum()), tokens),
            "val/returns": (float(returns.sum()), tokens),
        }
        if kl is not None:
            in_all = float(kl.sum())
            found["objective/kl"] = (in_all, rows)
            found["objective/non_score_reward"] = (-self.kl.coef * in_all, rows)
            scores = float(rollout.rewards[present & (sequences.counts > 0)].sum())
            found["objective/rlhf_reward"] = (scores - self.kl.coef * in_all, rows)
            found["objective/kl_coef"] = (self.kl.coef, 1.0)
        explained = explained_variance(rollout.values, returns, sequences.mask)
        if not math.isnan(explained):  # nothing varies
            found["val/explained_variance"] = (explained, 1.0)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What it has followed so far, in JSON types."""
        return {"kl": self.kl.state_dict(), "rewards": {} if self.norm is None else self.norm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`; what was not followed before begins now."""
        if state["kl"]:
            self.kl.load_state_dict(state["kl"])
        if self.norm is not None and state["rewards"]:
            self.norm.load_state_dict(state["rewards"])


def refuse_norm(norm: RewardNorm | None) -> None:
    """
    Raises:
        ValueError: rewards of completions are normalised, and tokens have some of their own.
    """
    if norm is not None:
        raise ValueError(
            "normalize_rewards: it brings the rewards of whole completions to one scale, and a reward function (a list), or a "
            "reward model by reward_model_steps, gives tokens rewards of their own; expected one number for each completion, "
            "or whiten_rewards, which scales the rewards of tokens"
        )


@dataclass(eq=False)
class Followed:
    """A maker of rollouts (`data.rollouts.Maker`) whose rollouts a `Shaping` follows.

    Its statistics take a rollout in when learning from it begins, which is once, whether it was made or found again; a
    checkpoint from its middle on has them so.

    Args:
        maker: makes them.
        shaping: follows them.
        training: False: of an evaluation, which changes no statistic.
        totals: of a rollout and its judged columns, `[rows]` rewards.
    """

    maker: Maker
    shaping: Shaping
    training: bool
    totals: Callable[[Rollout, Mapping[str, Any]], np.ndarray]

    def settings(self, training: bool) -> Mapping[str, Any]:
        of_tokens = {name: getattr(self.shaping.how, name) for name in OF_SHAPING}
        return {**self.maker.settings(training), "shaping": of_tokens}

    @property
    def updates_in_flight(self) -> bool:
        return self.maker.updates_in_flight

    def begin(self, plan: Plan) -> None:
        self.maker.begin(plan)

    def make(self, plan: Plan, prompts: Sequence[Prompt]) -> Sequence[Row] | None:
        return self.maker.make(plan, prompts)

    def finish(self, rollout: Rollout) -> Finished:
        return self.maker.finish(rollout)

    def metrics(self, rollout: Rollout) -> Mapping[str, tuple[float, float]]:
        columns: dict[str, Sequence[np.ndarray]] = {}
        for name in ("values", "old_logprobs", "ref_logprobs"):
            if name in rollout.store.columns:
                columns[name] = [rollout.store[name].values]
        totals = self.totals(rollout, judged_of(rollout))
        shaped = self.shaping(scored(rollout, totals, columns), follows=self.training)
        return {**self.maker.metrics(rollout), **shaped.metrics}
