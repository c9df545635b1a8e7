"""Optimizers of both editions against ten-step trajectories that were computed at 60 digits (tests/reference/optim)."""

from collections.abc import Callable

import pytest
import torch

from llm_trainer.optim.optimizers import create_optimizer
from llm_trainer.tutorial import AdamWFromScratch, SGDFromScratch
from reference_cases import Case


def follow(case: Case, make: Callable, dtype: torch.dtype = torch.float64) -> None:
    """Take the case's steps with the optimizer that `make(weights, biases)` returns, and compare every parameter."""
    inputs, labels = case.inputs["X"].to(dtype), case.inputs["Y"].to(dtype)
    weights = case.inputs["W0"].to(dtype).clone().requires_grad_()
    biases = case.inputs["b0"].to(dtype).clone().requires_grad_()
    optimizer = make(weights, biases)
    for step, expected_loss in enumerate(case.expected["losses"]):
        case.assert_close(weights, case.outputs["W"][step], dtype, f"W[{step}]")
        case.assert_close(biases, case.outputs["b"][step], dtype, f"b[{step}]")
        optimizer.zero_grad()
        loss = ((inputs @ weights + biases - labels) ** 2).mean()
        case.assert_close(loss, expected_loss, dtype, f"loss {step}")
        loss.backward()
        optimizer.step()


def is_clipping(case: Case) -> bool:
    return case.loss == "clip_grad_norm"


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_production_edition(optim_case: Case, dtype: torch.dtype, fused: bool | None) -> None:
    if is_clipping(optim_case):
        pytest.skip("clipping belongs to the engine")
    hyper = dict(optim_case.hyper)
    exempt = hyper.pop("no_decay", [])
    name = optim_case.loss.removeprefix("optimizer/")
    if name == "lion" and dtype == torch.float32:
        pytest.skip("the sign of a rounded number may flip")

    def make(weights: torch.Tensor, biases: torch.Tensor) -> torch.optim.Optimizer:
        groups: list[dict] = [
            {"params": [param]} | ({"weight_decay": 0.0} if key in exempt else {})
            for key, param in (("W", weights), ("b", biases))
        ]
        return create_optimizer(groups, name, fused=fused, **hyper)

    follow(optim_case, make, dtype)


def test_tutorial_edition(optim_case: Case) -> None:
    hyper = dict(optim_case.hyper)
    if is_clipping(optim_case) or {"no_decay", "amsgrad"} & hyper.keys():
        pytest.skip("not in the tutorial's optimizers")
    edition = {"optimizer/adamw": AdamWFromScratch, "optimizer/sgd": SGDFromScratch}.get(optim_case.loss)
    if edition is None:
        pytest.skip("not in the tutorial's optimizers")
    follow(optim_case, lambda weights, biases: edition(params=[weights, biases], **hyper))
