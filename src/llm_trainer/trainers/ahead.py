"""Asynchronous mode: when a trainer's next rollout can be made while it learns from one."""

from typing import Any

from llm_trainer.config.errors import ConfigError
from llm_trainer.data.rollout_ahead import Ahead
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import GenerationService
from llm_trainer.rewards.functions import RewardFunctions


def ahead_of(
    how: Any, rewards: RewardFunctions | None, is_judged: bool, service: GenerationService | None
) -> Ahead | None:
    """What makes rollouts ahead; None: they take turns with learning.

    Args:
        how: a section (`config.reinforcement.RolloutOptions`).
        rewards: functions that judge completions.
        is_judged: whether these, a model or an environment do.
        service: that was given; None: the trainer makes one, with weights of its own.

    Raises:
        ConfigError: nothing is made, or it cannot be made beside the training.
    """
    if not how.max_staleness:
        return None
    asked = f"max_staleness: got {how.max_staleness}, but"
    if how.rollouts is not None:
        raise ConfigError(
            f"{asked} the rollouts of another run are learned from (rollouts), so that none is made; leave one of the two out"
        )
    if not is_judged:
        raise ConfigError(
            f"{asked} nothing judges completions, so that none are drawn; expected a reward_func (or reward_model), or leave "
            f"it out"
        )
    if isinstance(service, InProcess) and service.copy is None:
        raise ConfigError(
            f"{asked} generation_service draws with the trained weights in place, which change meanwhile; expected a copy: "
            f"InProcess(model, dtype), or leave generation_service out"
        )
    here = [] if rewards is None else list(rewards.called_here)
    if how.environment_in_process:
        here.append("the environment")
    if here:
        raise ConfigError(
            f"{asked} {', '.join(here)} would be called in the process that trains, beside the training, whose random numbers "
            f"it shares; expected processes of their own (without reward_in_process and environment_in_process), or "
            f"max_staleness: 0"
        )
    return Ahead(how.max_staleness)
