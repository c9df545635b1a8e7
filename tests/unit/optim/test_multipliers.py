"""Learning rates that are multiples of the run's."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer.optim.extend import add_groups
from llm_trainer.optim.multipliers import describe_multiples, rate_of_run
from llm_trainer.optim.optimizers import configure_optimizer
from llm_trainer.optim.schedules import create_scheduler
from optimizers_here import HERE


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 3), "table": nn.Embedding(5, 4)})


def take_steps(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("name", HERE)
def test_a_multiple_is_an_optimizer_of_that_rate(name: str) -> None:
    module = model()
    apart = copy.deepcopy(module)
    take_steps(module, configure_optimizer(module, name, lr=1e-2, lr_multipliers={"head": 4, r"\.bias$": 0.5}))
    for pattern, rate in (("head", 4e-2), ("body.weight", 1e-2), ("body.bias", 5e-3), ("table", 1e-2)):
        expected = copy.deepcopy(apart)
        take_steps(expected, configure_optimizer(expected, name, lr=rate))
        for parameter_name, parameter in module.named_parameters():
            if pattern in parameter_name:
                torch.testing.assert_close(parameter, expected.get_parameter(parameter_name), rtol=1e-6, atol=1e-7)


def test_without_multiples_nothing_changes() -> None:
    module = model()
    one, other = configure_optimizer(module, lr=1e-2), configure_optimizer(module, lr=1e-2, lr_multipliers={})
    assert [sorted(group) for group in one.param_groups] == [sorted(group) for group in other.param_groups]
    assert describe_multiples(other) == ""


def test_decay_and_rate_are_independent() -> None:
    module = model()
    optimizer = configure_optimizer(module, lr=1e-2, weight_decay=0.1, lr_multipliers={"head": 4})
    found = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in optimizer.param_groups}
    assert found == {(1e-2, 0.1): 2, (1e-2, 0.0): 1, (4e-2, 0.1): 1, (4e-2, 0.0): 1}
    assert describe_multiples(optimizer) == "x 4 for 2 of 5 tensors"


@pytest.mark.parametrize("multipliers", [{"head": 4}, {"head": 0.1}, {".": 3}])
def test_a_schedule_follows_the_rate_of_the_run(multipliers: dict[str, float]) -> None:
    optimizer = configure_optimizer(model(), lr=1e-2, lr_multipliers=multipliers)
    scheduler = create_scheduler(optimizer, "cosine", warmup_steps=2, total_steps=10, min_lr=1e-3)
    plain = create_scheduler(
        configure_optimizer(model(), lr=1e-2), "cosine", warmup_steps=2, total_steps=10, min_lr=1e-3
    )
    assert scheduler.describe() == plain.describe()
    (factor,) = multipliers.values()
    for _ in range(10):
        assert rate_of_run(optimizer) == pytest.approx(plain.schedule(scheduler.last_epoch), rel=1e-12)
        largest = max(group["lr"] for group in optimizer.param_groups)
        assert largest == pytest.approx(plain.schedule(scheduler.last_epoch) * max(1, factor), rel=1e-12)
        scheduler.step()


def test_a_critic_learns_at_the_rate_of_the_run() -> None:
    optimizer = configure_optimizer(model(), lr=1e-2, lr_multipliers={"body": 4, "table": 4})
    (matrices, biases) = add_groups(optimizer, nn.Linear(4, 1))
    assert matrices["lr"] == biases["lr"] == 1e-2 and "lr_multiplier" not in matrices
    every = configure_optimizer(model(), lr=1e-2, lr_multipliers={".": 4})
    assert add_groups(every, nn.Linear(4, 1))[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    ("multipliers", "message"),
    [
        ({"hed": 2}, "'hed' is found in the name of no parameter; there are head.weight"),
        ({"body": 2, "body.weight": 3}, "all parameters that 'body.weight' names are named by others before it"),
        ({"table": 2}, "'table' names parameters that are not trained, such as table.weight; remove it"),
        ({"(": 2}, r"'\(' is no regular expression"),
        ({"head": 0}, "got 0 for 'head', expected a number above 0"),
    ],
)
def test_multiples_that_cannot_be_meant(multipliers: dict[str, Any], message: str) -> None:
    module = model()
    module.get_submodule("table").requires_grad_(False)
    with pytest.raises(ValueError, match=f"lr_multipliers: {message}"):
        configure_optimizer(module, lr_multipliers=multipliers)
