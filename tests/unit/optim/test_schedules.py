"""What the reference rates do not say: groups, resume, errors, and what people read."""

import pytest
import torch

from llm_trainer.optim.schedules import SHAPES, Schedule, create_schedule, create_scheduler
from reference_cases import learning_rates

COSINE = {"warmup_steps": 3, "total_steps": 10, "min_lr": 1e-3}


def sgd(*rates: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": rate} for rate in rates])


def test_groups_keep_the_ratio_of_their_rates() -> None:
    optimizer = sgd(0.1, 0.02)
    scheduler = create_scheduler(optimizer, "cosine", **COSINE)
    expected = learning_rates("cosine", 15, lr=0.1, **COSINE)
    for rate in expected:
        assert scheduler.get_last_lr() == pytest.approx([rate, rate / 5], rel=1e-12)
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
        scheduler.step()


@pytest.mark.parametrize("name", SHAPES)
def test_resume_is_a_seek(name: str) -> None:
    hyper = {"cosine_restarts": {"period": 3, "period_mul": 2}, "wsd": {"decay_steps": 4}}.get(name, {}) | COSINE
    whole, first = (create_scheduler(sgd(0.1), name, **hyper) for _ in range(2))
    for _ in range(7):
        whole.step()
        first.step()
    assert first.state_dict()["step"] == 7
    second = create_scheduler(sgd(0.1), name, **hyper)
    second.load_state_dict(first.state_dict())
    for _ in range(5):
        assert second.get_last_lr() == whole.get_last_lr()
        assert second.optimizer.param_groups[0]["lr"] == whole.get_last_lr()[0]
        whole.step()
        second.step()


def test_plateau_waits_for_losses_and_survives_resume() -> None:
    hyper = {"factor": 0.5, "patience": 0, "warmup_steps": 4}
    scheduler = create_scheduler(sgd(0.1), "reduce_on_plateau", **hyper)
    seen = []
    for loss in (2.0, 3.0, 1.0, 1.0):
        seen.append(scheduler.get_last_lr()[0])
        scheduler.observe(loss)
        scheduler.step()
    assert seen == pytest.approx([0.0, 0.025, 0.025, 0.0375])
    resumed = create_scheduler(sgd(0.1), "reduce_on_plateau", **hyper)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.get_last_lr() == scheduler.get_last_lr() == pytest.approx([0.025])
    assert resumed.state_dict() == scheduler.state_dict()


def test_other_schedules_do_not_listen_to_losses() -> None:
    scheduler = create_scheduler(sgd(0.1), "constant")
    for _ in range(50):
        scheduler.observe(1.0)
    assert scheduler.get_last_lr() == [0.1]


def test_no_restart_without_a_multiplier() -> None:
    rates = learning_rates("cosine_restarts", 30, lr=1.0, min_lr=0.1, period=8)
    assert rates[0] == 1.0
    assert rates[8:] == [0.1] * 22


def test_wsd_decay_ends_at_total_steps() -> None:
    rates = learning_rates("wsd", 21, lr=1.0, warmup_steps=2, total_steps=20, decay_steps=4)
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[16:] == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_rates_never_leave_their_bounds() -> None:
    for name in SHAPES:
        own = {"cosine_restarts": {"period": 5}, "wsd": {"decay_steps": 30}}.get(name, {})
        rates = learning_rates(
            name, 200, lr=0.1, min_lr=0.01, warmup_init_lr=0.01, warmup_steps=7, total_steps=90, **own
        )
        assert min(rates) >= 0.01 * (1 - 1e-12), name
        assert max(rates) == pytest.approx(0.1), name


def test_a_run_shorter_than_its_warmup() -> None:
    assert learning_rates("linear", 4, lr=1.0, warmup_steps=4, total_steps=2) == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"name": "cosin"}, "unknown schedule 'cosin'; known schedules: constant, linear, cosine"),
        ({"name": "cosine"}, "'cosine' needs total_steps"),
        ({"name": "cosine_restarts"}, "needs period"),
        ({"name": "cosine_restarts", "period": 0}, "period 0"),
        ({"name": "wsd", "decay_steps": 3}, "wsd needs stable_steps, or total_steps"),
        (
            {"name": "wsd", "decay_steps": 3, "stable_steps": 1, "decay_type": "exp"},
            "'exp'; known types: linear, cosine",
        ),
        ({"name": "linear", "total_steps": 5, "power": 2}, "'linear' has no option power; options: lr, min_lr"),
        ({"name": "constant", "min_lr": 2.0}, "min_lr is 2.0, expected 0 <= min_lr <= lr"),
        ({"name": "constant", "lr": 0.0}, "lr is 0.0, expected a number > 0"),
        ({"name": "constant", "warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_errors_come_at_once_and_say_what_was_found(hyper: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_schedule(**({"lr": 1.0} | hyper))


def test_description_for_people() -> None:
    text = create_scheduler(sgd(0.1), "cosine", **COSINE).describe()
    assert text == "cosine: 0 -> 0.1 in 3 warm-up steps, 0.001 at step 10"
    assert Schedule("polynomial", 0.1, total_steps=4, options={"power": 2}).describe() == (
        "polynomial: 0.1, 0 at step 4, power=2"
    )
