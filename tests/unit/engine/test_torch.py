"""The engine of one process: what a step does to weights, and what it leaves alone."""

import math

import pytest
import torch

from llm_trainer.engine.torch import TorchEngine

CPU = torch.device("cpu")


def engine_and_model(precision: str = "fp32") -> tuple[TorchEngine, torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    engine = TorchEngine(CPU, precision)
    return engine, engine.prepare(model, model, optimizer), optimizer


def test_a_step_is_torchs_own_with_clipping() -> None:
    engine, model, _ = engine_and_model()
    _, other, optimizer = engine_and_model()
    for x in (torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 0.0, 1.0]])):
        with engine.micro_step(last=True):
            engine.backward(model(x).sum() * 100)
        grad_norm, finite = engine.step(max_grad_norm=0.5)
        (other(x).sum() * 100).backward()
        expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert finite and grad_norm == expected.item() > 100
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    engine, model, optimizer = engine_and_model()
    engine.backward(model(torch.ones(1, 3)).sum())
    engine.step(1.0)
    weights = [p.detach().clone() for p in model.parameters()]
    moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
    engine.backward(model(torch.full((1, 3), value)).sum())
    grad_norm, finite = engine.step(1.0)
    assert not finite and not math.isfinite(grad_norm)
    assert all(torch.equal(p, w) and p.grad is None for p, w in zip(model.parameters(), weights, strict=True))
    after = [v for state in optimizer.state.values() for v in state.values()]
    assert len(moments) == 6 and all(torch.equal(a, b) for a, b in zip(after, moments, strict=True))


def test_precision_is_what_was_asked_for() -> None:
    engine, model, _ = engine_and_model("bf16")
    with engine.precision():
        assert model(torch.ones(1, 3)).dtype == torch.bfloat16
