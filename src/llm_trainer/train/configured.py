"""What a run is configured with: the optimizer's learning rate, weight decay, betas, ..., and what of it is new."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llm_trainer.algorithm import Algorithm
from llm_trainer.checkpoint.weights import IMPLEMENTATION
from llm_trainer.optim.schedules import Scheduler

Values = dict[str, Any]


class ConfiguredOptimizer:
    """The optimizer's options as the configuration (or the script) gives them, beside those of a checkpoint.

    A schedule or a hook changes options while a run goes on, so the checkpoint's own are what a resumed run goes on with:
    but for those that are configured otherwise than they were, which are meant to be new.

    Args:
        algorithm: whose optimizer it is, with its options as they are before the first step.

    Attributes:
        changes: what has been taken over from the configuration, for people.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.groups = [_options(group) for group in algorithm.optimizer.param_groups]
        self.changes: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """The options by parameter group, and whether a schedule changes the learning rate."""
        return {"groups": [dict(options) for options in self.groups], "schedule": self.algorithm.scheduler is not None}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take over what is configured otherwise than in `state`; the optimizer itself is loaded already.

        Args:
            state: None: the checkpoint does not know, so what its optimizer went on with counts as configured.
        """
        groups = self.algorithm.optimizer.param_groups
        before = [_options(group) for group in groups] if state is None else state["groups"]
        lost_schedule = state is not None and state["schedule"] and self.algorithm.scheduler is None
        for group, now, then in zip(groups, self.groups, before, strict=True):
            for name in sorted(now.keys() & then.keys()):
                if now[name] != then[name]:
                    self._take_over(group, name, now[name], then[name])
            if lost_schedule and group["lr"] != now["lr"]:
                self._take_over(group, "lr", now["lr"], float(group["lr"]))

    def _take_over(self, group: Values, name: str, new: Any, old: Any) -> None:
        said = f"{name} {_shown(old)} -> {_shown(new)}"
        scheduler = self.algorithm.scheduler
        if name == "lr" and scheduler is not None:
            # Ours is a function of the step and of what is configured; another one goes on from the rates it remembers.
            if not isinstance(scheduler, Scheduler):
                said = f"not lr {_shown(new)}, as {type(scheduler).__name__} goes on from the checkpoint's rates"
        elif isinstance(group[name], Tensor):
            group[name].fill_(new)
        else:
            group[name] = new
        if said not in self.changes:
            self.changes.append(said)


def _options(group: Mapping[str, Any]) -> Values:
    """The options of a parameter group that a configuration gives, as numbers and words."""
    options = {}
    for name, value in group.items():
        if isinstance(value, Tensor):
            value = value.item()
        if name not in IMPLEMENTATION | {"initial_lr"} and isinstance(value, int | float | str | tuple):
            options[name] = value
    if "initial_lr" in group:  # a schedule has begun to change the rate
        options["lr"] = float(group["initial_lr"])
    return options


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
