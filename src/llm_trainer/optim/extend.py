"""Another model's parameters for an optimizer that is there already: groups of their own, with options of their own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.optim.groups import get_parameter_groups
from llm_trainer.optim.multipliers import MULTIPLIER, factor_of
from llm_trainer.optim.own import Muon, separate, vocabulary_tables
from llm_trainer.optim.schedules import Scheduler

_OF_A_GROUP = ("params", "param_names", "initial_lr", MULTIPLIER)


def add_groups(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    options: Mapping[str, Any] | None = None,
    scheduler: Any = None,
) -> list[dict[str, Any]]:
    """Give `optimizer` the trained parameters of `model` that it does not have yet; matrices decay, biases and norms do not.

    Args:
        optimizer: of another model.
        model: the one that is to learn too; it may share parameters with the other one.
        options: of the new groups (`lr`, `weight_decay`, `betas`, ...), as far as its groups have such; what is not there or
            None is as in the groups that it has.
        scheduler: what follows the optimizer already, if anything does.

    Returns:
        The new groups; none where it has all of them.

    Raises:
        ValueError: the scheduler, or an optimizer of several kinds, cannot take groups in.
    """
    known = set[Tensor]()
    for group in optimizer.param_groups:
        known.update(group["params"])
    wanted = []
    for group in get_parameter_groups(model):
        new = [parameter for parameter in group["params"] if parameter not in known]
        if new:
            wanted.append({**group, "params": new})
    if not wanted:
        return []
    if scheduler is not None and not isinstance(scheduler, Scheduler):
        raise ValueError(
            f"scheduler: a {type(scheduler).__name__} was made before the optimizer had the parameters of the "
            f"{type(model).__name__}, and cannot take them in; make optimizer and scheduler of both models, or use "
            f"create_scheduler of llm_trainer.optim.schedules"
        )
    if isinstance(optimizer, Muon):
        no_matrices = vocabulary_tables(model) | {parameter for parameter in model.parameters() if parameter.ndim != 2}
        wanted = sum((separate(group, no_matrices) for group in wanted), [])
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return [_add(optimizer, group, options or {}, names, scheduler) for group in wanted]


def _add(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    options: Mapping[str, Any],
    names: Mapping[Tensor, str],
    scheduler: Scheduler | None,
) -> dict[str, Any]:
    """Add one group, alike one that decays as this one does."""
    decays = group["weight_decay"] > 0
    alike = [g for g in optimizer.param_groups if g.get("use_muon") == group.get("use_muon")]
    if not alike:
        raise ValueError(
            f"optimizer: this {type(optimizer).__name__} has no group that the parameters {names[group['params'][0]]}, ... "
            f"could be like; make it of both models"
        )
    alike.sort(key=lambda g: MULTIPLIER in g)  # those of the run's own rate first
    model_group = next((g for g in alike if bool(g.get("weight_decay")) == decays), alike[0])
    new = {name: value for name, value in model_group.items() if name not in _OF_A_GROUP}
    new["lr"] = model_group.get("initial_lr", new["lr"]) / factor_of(model_group)
    new.update({name: value for name, value in options.items() if value is not None and name in new})
    if not decays and "weight_decay" in new:
        new["weight_decay"] = 0.0
    new["params"] = group["params"]
    if "param_names" in model_group:
        new["params"] = [(names[parameter], parameter) for parameter in group["params"]]
    optimizer.add_param_group(new)
    added = optimizer.param_groups[-1]
    if scheduler is not None:
        scheduler.take_in(added)
    return added
