"""Rollouts of which no completion is learned from: why, and what a run says that makes nothing else."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from llm_trainer.config.errors import counted
from llm_trainer.data.rollout_making import TOO_OLD
from llm_trainer.data.rollouts import FAILED, LEFT_OUT, LEVEL, NO_REWARD, NOTHING_WRITTEN, Rollout

PATIENCE = 10  # rollouts without an update, after which a run ends that has made none at all
# What to do, by why most of the completions were left out.
FIXES = {
    LEVEL: (
        "look at the completions (llm-trainer rollouts) and at what the reward function gives them; take easier or harder "
        "prompts, a larger group_size or a higher gen_temperature, or a reward with more steps"
    ),
    NO_REWARD: "look at what the reward functions give, and at what failed (llm-trainer rollouts)",
    NOTHING_WRITTEN: (
        "responses that are given need tokens: response_attention_mask is 1 on them, and without it all that is not the "
        "padding of tokenizer or model counts"
    ),
    FAILED: "look at why they failed (llm-trainer rollouts): the environment, the tools or the server that wrote them",
    TOO_OLD: "raise max_staleness, or make fewer updates of a rollout",
}


class NothingLearned(ValueError):
    """A run has made no update, and would make none."""


class Unlearned:
    """Rollouts in a row that gave no update.

    Args:
        say: prints.

    Attributes:
        count: how many there were.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.count = 0
        self._why, self._last = "", ""

    def forget(self) -> None:
        """Begin anew: something has been learned from."""
        self.count = 0

    def add(self, rollout: Rollout, has_learned: bool) -> None:
        """Note one, and say so now and then.

        Args:
            has_learned: the run has made an update before.

        Raises:
            NothingLearned: it has not, and too many rollouts came in vain.
        """
        self.count += 1
        self._why, self._last = described(rollout)
        if not has_learned and self.count == PATIENCE:
            raise self.error(f"the first {counted(self.count, 'rollout')}")
        if self.count % PATIENCE == 1:
            self._say(f"WARNING: no update on {self._last}")

    def error(self, what: str) -> NothingLearned:
        """What ends a run that has made no update; `what`: all of its rollouts, in words."""
        fix = FIXES.get(self._why, "look at the completions (llm-trainer rollouts)")
        return NothingLearned(
            f"nothing was learned: {what} gave no update, and the weights are what they were. The last was {self._last}; {fix}"
        )


def described(rollout: Rollout) -> tuple[str, str]:
    """Why most completions of a rollout are left out, and in words how many there are, and how they were rewarded."""
    # 1. why, by completion
    numbers, reasons = rollout.column(LEFT_OUT), rollout.store.meta["reasons"]
    why = Counter(reasons[number - 1][1] for number in numbers.tolist())
    causes = [f"{reason} ({count})" for reason, count in why.most_common()]

    # 2. what they are worth, and how often they were drawn
    groups = len(np.unique(rollout.column("group")))
    rewards = rollout.column("rewards")
    known = rewards[~np.isnan(rewards)]
    facts = "no rewards"
    if len(known):
        low, high = float(known.min()), float(known.max())
        facts = f"rewards from {low:g} to {high:g}"
        if low == high:
            facts = f"all rewards {low:g}"
    rows = [rollout.facts(row) for row in range(len(rollout))]
    drawn = 1 + max(row.get("attempt", 0) for row in rows)
    if drawn > 1:
        facts += f", every group drawn up to {drawn} times"
    errors: list[str] = []
    for row in rows:
        errors += row.get("errors", {}).values()
    if errors:
        facts += f", {counted(len(errors), 'error')}, the first: {errors[0]}"
    size = f"{counted(len(rollout), 'completion')} of {counted(groups, 'prompt')}"
    return why.most_common(1)[0][0], f"rollout {rollout.name} ({size}; {facts}), left out because: {', '.join(causes)}"
