"""Schedules against tests/reference/lr (fifty rates each), and against the schedulers of torch."""

import pytest
import torch

from llm_trainer.optim.schedules import create_scheduler
from reference_cases import Case, learning_rates


def name_and_hyper(case: Case) -> tuple[str, dict]:
    """Our name and arguments of a reference case."""
    hyper = {key: value for key, value in case.hyper.items() if key not in ("optional", "warmup_from")}
    if "lr_end" in hyper:
        hyper["min_lr"] = hyper.pop("lr_end")
    file = case.name.split("/")[-1]
    if "num_cycles" in hyper:
        return "hard_restarts", hyper
    if "period" in hyper:
        return "cosine_restarts", hyper
    known = ("constant", "linear", "cosine", "wsd", "inverse_sqrt", "polynomial")
    return next(name for name in known if file.startswith(name)), hyper


def test_rates_of_every_reference_schedule(lr_case: Case) -> None:
    name, hyper = name_and_hyper(lr_case)
    expected = lr_case.expected["lr"]
    lr_case.assert_close(learning_rates(name, len(expected), **hyper), expected)


def test_optimizer_uses_the_rate_of_its_update(lr_case: Case) -> None:
    name, hyper = name_and_hyper(lr_case)
    param = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([param], lr=hyper.pop("lr"))
    scheduler = create_scheduler(optimizer, name, **hyper)
    used = []
    for _ in lr_case.expected["lr"]:
        param.grad = torch.ones_like(param)
        before = param.item()
        optimizer.step()
        scheduler.step()
        used.append(before - param.item())
    torch.testing.assert_close(used, lr_case.expected["lr"], rtol=1e-9, atol=1e-15)


def test_wsd_warmup_from_zero(lr_case: Case) -> None:
    if "lr_if_warmup_from_zero" not in lr_case.expected:
        pytest.skip("one convention only")
    name, hyper = name_and_hyper(lr_case)
    rates = learning_rates(name, 50, warmup_init_lr=0.0, **hyper)
    lr_case.assert_close(rates, lr_case.expected["lr_if_warmup_from_zero"])


def test_reduce_on_plateau_is_torchs() -> None:
    losses = [3.0, 2.0, 2.5, 1.99995, 2.1, 1.0, float("nan"), 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 0.5]
    theirs_on, ours_on = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1) for _ in range(2))
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(theirs_on, factor=0.5, patience=2, min_lr=0.02)
    ours = create_scheduler(ours_on, "reduce_on_plateau", factor=0.5, patience=2, min_lr=0.02)
    curve = []
    for loss in losses:
        theirs.step(loss)
        ours.observe(loss)
        ours.step()
        curve.append(ours.get_last_lr()[0])
        assert curve[-1] == pytest.approx(theirs_on.param_groups[0]["lr"], rel=1e-12)
    assert sorted(set(curve)) == pytest.approx([0.02, 0.025, 0.05, 0.1])
