"""The reward functions of a run: those of its section, those that are passed, or a `RewardFunctions` of the user's."""

from collections.abc import Callable
from typing import Any

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.reinforcement import RolloutOptions
from llm_trainer.rewards.functions import RewardFunctions
from llm_trainer.rewards.named import several

# Options of a section, and what `RewardFunctions` calls them.
LIMITS = {
    "reward_seconds": "seconds",
    "reward_memory_gb": "memory_gb",
    "reward_in_process": "in_process",
    "max_failed_rewards": "max_failed",
}


def functions_of(
    how: RolloutOptions, given: Any, weights: Any, note: Callable[[str], None], are_alone: bool
) -> RewardFunctions | None:
    """The reward functions of a run; None: there are none.

    Args:
        how: its section.
        given: a function, several, several by name, or `RewardFunctions`; None: those that the section names.
        weights: of those that are given.
        note: called with what the user should know.
        are_alone: nothing else judges completions; then weights without functions are of rewards that come with completions.

    Raises:
        ConfigError: something is said twice, so that one of both would do nothing.
    """
    if given is not None and how.rewards:
        note("WARNING: rewards of the section are not called: a reward_func is passed, which takes their place")
    if isinstance(given, RewardFunctions):
        _check_alone(how, weights)
        return given
    if given is None and how.rewards:
        if weights is not None:
            raise ConfigError(
                f"reward_weights: got {weights}, but rewards names functions, each with a weight of its own; expected rewards: "
                f"[{{name: ..., weight: 0.5}}, ...]"
            )
        given, weights = several(how.rewards)
    if given is None and weights is not None and not are_alone:
        raise ConfigError(
            f"reward_weights: got {weights}, but there is no reward function that they could be of; expected none, or a "
            f"reward_func too"
        )
    if given is None:
        return None
    return RewardFunctions(
        given,
        weights,
        seconds=how.reward_seconds,
        memory_gb=how.reward_memory_gb,
        in_process=how.reward_in_process,
        max_failed=how.max_failed_rewards,
    )


def _check_alone(how: RolloutOptions, weights: Any) -> None:
    """
    Raises:
        ConfigError: what a `RewardFunctions` of the user's says itself is said beside it.
    """
    unset, said = RolloutOptions(), {}
    if weights is not None:
        said["reward_weights"] = "weights", weights
    has_episodes = how.environment is not None or how.agent is not None or bool(how.tools)
    for ours, theirs in LIMITS.items():
        value = getattr(how, ours)
        is_of_episodes = ours == "max_failed_rewards" and has_episodes  # it is their share too
        if value != getattr(unset, ours) and not is_of_episodes:
            said[ours] = theirs, value
    for name, (theirs, value) in said.items():
        raise ConfigError(
            f"{name}: got {value}, but reward_func is a RewardFunctions, which says that itself; expected "
            f"RewardFunctions(..., {theirs}={value})"
        )
