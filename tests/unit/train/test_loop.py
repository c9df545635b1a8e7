"""The loop: what is trained on, what is refused, and what a signal does."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer.engine.torch import TorchEngine
from llm_trainer.train.guards import NonFiniteError, broken_tensor
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from regression import Regression

GOOD = torch.tensor([[1.0, 2.0], [0.5, 0.5]])
BAD = torch.tensor([[1.0, float("inf")], [0.5, 0.5]])


def make(folder: Path, batches: Any, kind: type[Regression] = Regression, **options: Any) -> Regression:
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    given = {"max_epochs": 1, "log_interval": 1, "use_amp": False, "progress": False, "device": "cpu"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    return kind(model, optimizer, batches, save_dir=str(folder), **(given | options))


def state(trainer: Regression) -> list[torch.Tensor]:
    """Weights and optimizer state, copied."""
    moments = [v for entry in trainer.optimizer.state.values() for v in entry.values()]
    return [t.detach().clone() for t in [*trainer.base_model.parameters(), *moments]]


def test_a_bad_step_is_skipped_kept_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[list[torch.Tensor]] = []
    watch = Hook("watch", lambda run: seen.append(state(run.trainer)), every_steps=1)
    trainer = make(tmp_path, [GOOD, BAD, GOOD], hooks=[watch])
    scheduler = trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
    last = trainer.train()
    for before, after in zip(seen[0], seen[1], strict=True):
        assert torch.equal(before, after)
    assert len(seen[0]) == 8 and not torch.equal(seen[1][0], seen[2][0])
    assert scheduler.state_dict()["last_epoch"] == 2 and last["skipped_steps"] == 1
    assert torch.equal(torch.load(tmp_path / "bad_steps" / "step-2-rank-0.pt")[0], BAD)
    assert "step 2: loss inf, gradient not finite; the update was skipped" in capsys.readouterr().out


def test_a_bad_step_does_not_hide_the_metrics_of_the_good_ones(tmp_path: Path) -> None:
    trainer = make(tmp_path, [GOOD, BAD], log_interval=2)
    assert 0 < trainer.train()["loss"] < 10


def test_too_many_bad_steps_in_a_row_stop_and_name_the_cause(tmp_path: Path) -> None:
    trainer = make(tmp_path, [GOOD, BAD, GOOD, BAD, BAD, GOOD], max_bad_steps=2)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row.*broken rows in the kept batches.*checkpoint: none"):
        trainer.train()
    assert trainer.run.progress.step == 4 and trainer.run.progress.skipped_steps == 3


def test_weights_that_broke_on_the_way_are_named(tmp_path: Path) -> None:
    def breaks(run: Any) -> None:
        run.trainer.base_model.bias.data.fill_(float("nan"))

    trainer = make(tmp_path, [GOOD] * 5, hooks=[Hook("breaks", breaks, every_steps=2)])
    with pytest.raises(NonFiniteError, match=r"the weights are broken, by an update before: bias \(1 of 1 values"):
        trainer.train()


def test_a_batch_that_cannot_be_kept_does_not_stop_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad_steps").touch()
    trainer = make(tmp_path, [BAD, GOOD])
    trainer.train()
    assert trainer.run.progress.step == 2 and "its batch could not be kept" in capsys.readouterr().out


def test_micro_batches_without_terms_change_nothing(tmp_path: Path) -> None:
    """Their loss is 0 / 0. Three terms and one are weighted 3 : 1, whatever lies between them."""
    first, second, empty = torch.rand(2, 3), torch.rand(2, 1), torch.empty(2, 0)
    cut = make(tmp_path / "cut", [first, empty, second], grad_accum_steps=3)
    whole = make(tmp_path / "whole", [torch.cat([first, second], 1)])
    losses = [trainer.train()["loss"] for trainer in (cut, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # an empty sum has a gradient of 0, but a loss of NaN
    assert cut.run.progress.skipped_steps == 0
    for a, b in zip(state(cut), state(whole), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_a_step_without_any_term_is_no_error(tmp_path: Path) -> None:
    trainer = make(tmp_path, [torch.empty(2, 0), GOOD])
    trainer.train()
    assert trainer.run.progress.step == 2 and trainer.run.progress.skipped_steps == 0
    assert all(t.isfinite().all() for t in state(trainer))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_a_second_start_goes_on(number: signal.Signals, tmp_path: Path) -> None:
    heard = []

    def send(run: Any) -> None:
        if run.progress.step == 2:
            machine = run.trainer.machine
            heard.append((machine.save_dir, machine.stop_requested()))
            os.kill(os.getpid(), number)
            heard.append((machine.save_dir, machine.stop_requested()))

    batches, before = [torch.rand(2, 2) for _ in range(6)], signal.getsignal(number)
    stopped = make(tmp_path / "stopped", batches, hooks=[Hook("send", send, every_steps=1)])
    with pytest.raises(TrainingInterrupted) as interruption:
        stopped.train()
    assert interruption.value.code == 75 and stopped.run.progress.step == 3 and signal.getsignal(number) is before
    assert heard == [(tmp_path / "stopped", False), (tmp_path / "stopped", True)]  # as the algorithm may ask it
    resumed, whole = make(tmp_path / "stopped", batches, resume="auto"), make(tmp_path / "whole", batches)
    for trainer in (resumed, whole):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(state(resumed), state(whole), strict=True))


def test_an_interrupted_trainer_can_be_trained_on_in_the_same_process(tmp_path: Path) -> None:
    send = Hook("send", lambda run: run.progress.step == 1 and os.kill(os.getpid(), signal.SIGTERM), every_steps=1)
    trainer = make(tmp_path, [GOOD] * 4, hooks=[send])
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    trainer.train()
    assert trainer.run.progress.step == 4


def test_a_second_interrupt_does_not_wait(tmp_path: Path) -> None:
    def send(run: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, [GOOD] * 4, hooks=[Hook("send", send, every_steps=1)]).train()


def test_a_hook_that_stops_a_run_lets_it_end_as_if_it_were_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last metrics are logged, the model is evaluated and saved, and the checkpoint says that this was the end."""
    stop = Hook("stop", lambda run: run.progress.step == 3 and run.stop("that is enough"), every_steps=1)
    options: dict[str, Any] = {"val_loader": [GOOD], "log_interval": 2, "eval_interval": 100}
    saves: dict[str, Any] = {
        "save_interval_steps": 3
    }  # a checkpoint of this very step is there when the hook is called
    make(tmp_path, [GOOD] * 8, hooks=[stop], **options, **saves).train()
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 3]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3]
    again = make(tmp_path, [GOOD] * 8, resume="auto", **options, **saves)
    again.train()
    assert again.run.progress.step == 3
    assert "already finished at step 3, nothing to do: stopped early" in capsys.readouterr().out


def test_an_evaluation_after_an_interrupted_run_sees_all_data(tmp_path: Path) -> None:
    send = Hook("send", lambda run: run.progress.step == 1 and os.kill(os.getpid(), signal.SIGTERM), every_steps=1)
    held_out = [GOOD, 3 * GOOD, 5 * GOOD]
    trainer = make(tmp_path, [GOOD] * 4, val_loader=held_out, hooks=[send])
    with pytest.raises(TrainingInterrupted):
        trainer.train()
    inputs, targets = torch.cat(held_out, 1)
    with torch.no_grad():
        expected = (trainer.base_model(inputs[:, None])[:, 0] - targets).pow(2).mean().item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_an_evaluation_that_fails_leaves_mode_and_metrics_as_they_were(tmp_path: Path) -> None:
    trainer = make(tmp_path, [GOOD], val_loader=[GOOD, "no batch"])
    trainer.record("mine", 2.0)
    with pytest.raises(AttributeError, match="'str' object has no attribute 'shape'"):
        trainer.evaluate()
    assert trainer.model.training
    trainer.run.val_sources = {}
    assert trainer.train()["mine"] == 2.0


def test_words_of_the_algorithm_follow_the_log_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Talking(Regression):
        def _get_extra_log_info(self, batch: torch.Tensor) -> str:
            return f"largest input {batch[0].max():g}"

    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"max_epochs": 1, "log_interval": 1, "progress": False, "device": "cpu"}
    Talking(model, optimizer, [GOOD, 3 * GOOD], save_dir=str(tmp_path), use_amp=False, **options).train()
    shown = capsys.readouterr().out
    assert "step 1  largest input 2\n" in shown and "step 2  largest input 6\n" in shown
    assert (tmp_path / "log" / "log.txt").read_text().splitlines()[1].endswith(" step=1 largest input 2")


@pytest.mark.parametrize("names", [("mine", "mine"), ("save",)])
def test_two_hooks_of_one_name_are_an_error(names: tuple[str, ...], tmp_path: Path) -> None:
    hooks = [Hook(name, lambda run: None, every_steps=1) for name in names]
    with pytest.raises(ValueError, match=rf"hooks: 2 are called '{names[0]}'.*taken are log, evaluate, sample, save"):
        make(tmp_path, [GOOD], hooks=hooks)


class Weighed(Regression):
    """Whose terms count a hundredth each."""

    def _loss_weight(self, batch: torch.Tensor) -> float:
        return 0.01 * batch.shape[1]


def test_fractions_as_loss_weights_change_nothing(tmp_path: Path) -> None:
    batches = [torch.rand(2, 3), torch.rand(2, 1)]
    ends = []
    for kind in (Regression, Weighed):
        trainer = make(tmp_path / kind.__name__, batches, kind, grad_accum_steps=2, val_loader=batches)
        ends.append([trainer.train(), state(trainer)])
    (plain, weights), (weighed, same_weights) = ends
    for name in ("loss", "grad_norm", "eval_loss"):
        assert weighed[name] == pytest.approx(plain[name], rel=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(weights, same_weights, strict=True))


def test_evaluation_is_a_mean_over_terms(tmp_path: Path) -> None:
    """Of three terms and one, and batches without any in between: neither a mean of means, nor NaN."""
    first, second, empty = torch.rand(2, 3), torch.rand(2, 1), torch.empty(2, 0)
    trainer = make(tmp_path, [GOOD], val_loader=[empty, first, empty, second])
    loss = trainer.train()["eval_loss"]
    inputs, targets = torch.cat([first, second], 1)
    with torch.no_grad():
        errors = (trainer.base_model(inputs[:, None])[:, 0] - targets).pow(2)
    assert loss == pytest.approx(errors.mean().item(), rel=1e-6)
    assert abs(loss - (errors[:3].mean() + errors[3]).item() / 2) > 1e-3
    assert trainer.run.progress.best_loss == loss and (tmp_path / "best_model.pt").exists()


def test_an_evaluation_without_any_term_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is neither NaN nor a lack of progress."""
    held_out = {"empty": [torch.empty(2, 0)], "full": [GOOD]}
    options: dict[str, Any] = {"eval_interval": 1, "early_stopping_patience": 1}
    nothing = make(tmp_path / "nothing", [GOOD] * 3, val_loader=held_out["empty"], **options)
    last = nothing.train()
    assert nothing.run.progress.step == 3 and not any(name.startswith("eval") for name in last)
    assert "WARNING: step 1: eval_loss could not be measured, since nothing in this val" in capsys.readouterr().out
    trainer = make(tmp_path / "some", [GOOD], val_loader=held_out)
    last = trainer.train()
    assert last["eval_loss"] == last["eval_full_loss"] == trainer.run.progress.best_loss
    shown = capsys.readouterr().out
    assert "step 1: eval_empty_loss could not be measured" in shown and "eval_full_loss could" not in shown


def test_no_clipping_is_0_or_none(tmp_path: Path) -> None:
    """The norm is measured all the same."""
    ends = {}
    for limit in (None, 0, 1e-3):
        trainer = make(tmp_path / str(limit), [GOOD] * 3, max_grad_norm=limit)
        norm = trainer.train()["grad_norm"]
        ends[limit] = [norm, *state(trainer)]
    (norm, *plain), (same_norm, *same), (_, *clipped) = ends.values()
    assert norm == same_norm > 0.1 and all(map(torch.equal, plain, same))
    assert not torch.equal(plain[-1], clipped[-1])  # the last of Adam's moments
    for wrong in (-1.0, float("nan")):
        with pytest.raises(
            ValueError, match=r"max_grad_norm: got .*, expected a number of at least 0; 0 or None: no cl"
        ):
            make(tmp_path, [GOOD], max_grad_norm=wrong)


class Forgetful(Regression):
    """Which drops half of its inputs while it learns."""

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        inputs = torch.nn.functional.dropout(batch[0], 0.5, self.model.training)
        return self.model(inputs[:, None])[:, 0]


def test_evaluation_is_without_dropout(tmp_path: Path) -> None:
    held_out = torch.rand(2, 50)
    trainer = make(tmp_path, [GOOD], Forgetful, val_loader=[held_out])
    loss = trainer.train()["eval_loss"]
    with torch.no_grad():
        expected = (trainer.base_model(held_out[0][:, None])[:, 0] - held_out[1]).pow(2).mean()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert trainer.model.training  # as it was before


def test_the_noise_of_a_step_is_its_own(tmp_path: Path) -> None:
    """Whoever stops and goes on drops what he would have dropped without; and what others draw between steps is no matter."""
    batches = [torch.rand(2, 9) for _ in range(6)]
    whole = make(tmp_path / "whole", batches, Forgetful)
    whole.train()
    draws = Hook("draws", lambda run: torch.rand(7), every_steps=1)
    first = make(tmp_path / "parts", batches, Forgetful, max_steps=3, hooks=[draws])
    first.train()
    rest = make(tmp_path / "parts", batches, Forgetful, resume="auto", hooks=[draws])
    rest.train()
    assert rest.run.progress.step == 6
    assert all(torch.equal(a, b) for a, b in zip(state(rest), state(whole), strict=True))


def test_the_best_model_is_the_one_with_the_lowest_loss(tmp_path: Path) -> None:
    """Of weights that come near the answer and leave it again; equal losses are no progress."""
    losses = iter([3.0, 1.0, 2.0, 1.0])
    trainer = make(tmp_path, [GOOD] * 4, val_loader=[GOOD], eval_interval=1)
    trainer.run.evaluate = lambda: {"eval_loss": next(losses)}  # type: ignore[method-assign]
    trainer.train()
    progress = trainer.run.progress
    assert (progress.best_loss, progress.best_step, progress.evals_without_progress) == (1.0, 2, 2)


def test_weights_that_are_broken_before_the_first_step_are_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, [GOOD])
    trainer.base_model.weight.data.fill_(float("inf"))  # type: ignore[union-attr, operator]
    with pytest.raises(NonFiniteError, match=r"the weights are broken before the first step: weight \(1 of 1 values"):
        trainer.train()
    assert trainer.run.progress.step == 0


def test_finite_weights_whose_sum_is_not_are_not_broken(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    torch.nn.init.constant_(model.weight, 3e38)
    engine = TorchEngine(torch.device("cpu"))
    assert broken_tensor(engine, model) is None
    model.weight.data[0, 1] = -math.inf
    assert broken_tensor(engine, model) == "weight (1 of 3 values are not finite)"
    model.weight.data[0, 0] = math.inf
    assert broken_tensor(engine, model) == "weight (2 of 3 values are not finite)"


def test_a_step_without_a_micro_batch_is_refused(tmp_path: Path) -> None:
    """Also of one rank alone, which the others would wait for."""
    trainer = make(tmp_path, [GOOD])
    trainer.run.source.steps = lambda epoch, position: iter([([], 1)])  # type: ignore[method-assign]
    with pytest.raises(
        ValueError, match="a step without a micro-batch on this rank; expected at least one on every rank"
    ):
        trainer.train()
