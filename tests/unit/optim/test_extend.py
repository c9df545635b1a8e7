"""A second model's parameters come into an optimizer that is there: in groups of their own, on the same schedule."""

from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer.optim.extend import add_groups
from llm_trainer.optim.optimizers import configure_optimizer
from llm_trainer.optim.schedules import create_scheduler
from optimizers_here import HERE


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 1))


def step(optimizer: torch.optim.Optimizer, *models: nn.Module) -> None:
    torch.stack([one(torch.ones(2, 4)).square().sum() for one in models]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("name", HERE)
def test_both_take_the_steps_that_each_would_take_alone(name: str) -> None:
    first, second = model(), model(1)
    optimizer = configure_optimizer(model=first, optimizer_type=name, lr=0.1, weight_decay=0.1)
    added = add_groups(optimizer, second, {"lr": 0.01, "weight_decay": None})
    assert {parameter for group in added for parameter in group["params"]} == set(second.parameters())
    assert [(group["lr"], bool(group["weight_decay"])) for group in added] == [(0.01, True), (0.01, False)]
    alone = [model(), model(1)]
    apart = [configure_optimizer(model=alone[0], optimizer_type=name, lr=0.1, weight_decay=0.1)]
    apart.append(configure_optimizer(model=alone[1], optimizer_type=name, lr=0.01, weight_decay=0.1))
    for _ in range(3):
        step(optimizer, first, second)
        for one, of_one in zip(alone, apart, strict=True):
            step(of_one, one)
    for one, other in zip((first, second), alone, strict=True):
        for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert add_groups(optimizer, second) == []


def test_what_is_shared_stays_where_it_is_and_the_schedule_follows() -> None:
    first = model()
    second = nn.Sequential(first, nn.Linear(1, 1))
    optimizer = configure_optimizer(model=first, lr=0.1)
    scheduler = create_scheduler(optimizer, "linear", total_steps=10)
    added = add_groups(optimizer, second, {"lr": 0.4, "betas": (0.5, 0.5), "momentum": 0.9}, scheduler)
    assert [list(group["params"]) for group in added] == [[second[1].weight], [second[1].bias]]
    assert added[0]["betas"] == (0.5, 0.5) and "momentum" not in added[0]
    for _ in range(5):
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05, 0.2, 0.2])


def test_a_schedule_of_torch_cannot_take_them_in() -> None:
    first = model()
    optimizer: Any = torch.optim.SGD(first.named_parameters(), lr=0.1)
    with pytest.raises(ValueError, match="LambdaLR was made before the optimizer had the parameters of the Sequential"):
        add_groups(optimizer, model(1), scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
    (matrices, others) = add_groups(optimizer, model(1))
    assert matrices["param_names"] == ["0.weight", "2.weight"] and others["param_names"][0] == "0.bias"
