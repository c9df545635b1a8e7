"""`transformers.Trainer` drives a run to the curve of `loop.fit`, and the run keeps everything around its steps."""

import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from llm_trainer import BaseTrainer
from llm_trainer.train import loop
from llm_trainer.train import transformers_driver as huggingface
from llm_trainer.train.guards import NonFiniteError
from llm_trainer.train.hooks import Hook

sys.path.insert(0, str(Path(__file__).parents[2] / "invariance"))
sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
import table
from victim import make_trainer, metric_lines, outcome

from regression import Regression

GOOD = torch.tensor([[1.0, 2.0], [0.5, 0.5]])
BAD = torch.tensor([[1.0, float("nan")], [0.5, 0.5]])


def regression(folder: Path, batches: Sequence[torch.Tensor], **options: Any) -> Regression:
    torch.manual_seed(0)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    given: dict[str, Any] = {"max_epochs": 1, "log_interval": 1, "progress": False, "device": "cpu", "engine": "hf"}
    return Regression(model, optimizer, batches, save_dir=str(folder), use_amp=False, **(given | options))


def state(trainer: BaseTrainer) -> list[torch.Tensor]:
    """Weights and optimizer state, copied."""
    moments = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    return [t.detach().clone() for t in [*trainer.base_model.parameters(), *moments]]


class Heard(TrainerCallback):
    """Writes down what it hears, and may ask for something at a step."""

    def __init__(self, step: int = 0, **wanted: bool) -> None:
        self.events: list[str] = []
        self.logs: list[dict[str, float]] = []
        self.step, self.wanted = step, wanted

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"step {state.global_step} of {state.max_steps}, epoch {state.epoch:g}")
        if state.global_step == self.step:
            for name, value in self.wanted.items():
                setattr(control, name, value)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("epoch")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(logs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.events.append(f"eval_loss {metrics['eval_loss']:.4f}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append("save")


def some_cells(trainer: str) -> list[table.Cell]:
    """All rows at once, four micro-batches, and a token budget that makes steps of different numbers of micro-batches."""
    flat = trainer != "reward"
    splits = [(8, 1, False, None), (2, 4, flat, None), (2, 4, False, 40)]
    return [table.Cell(trainer, size, count, 1, layout, budget) for size, count, layout, budget in splits]


@pytest.mark.parametrize("cell", [cell for name in table.TRAINERS for cell in some_cells(name)], ids=str)
def test_the_curve_is_the_loops(cell: table.Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.ENGINES, "torch", {"engine": "torch"})
    expected = table.run(cell)
    monkeypatch.setitem(table.ENGINES, "torch", {"engine": "hf"})
    monkeypatch.delattr(loop, "train_step")
    assert max(table.differences(table.run(cell), expected)) < 1e-5


def test_the_noise_precision_and_schedule_are_the_loops(tmp_path: Path) -> None:
    """Dropout, bf16, evaluation and a plateau schedule; the last steps may differ as sums round differently."""
    lines = {}
    for engine in ("torch", "hf"):
        make_trainer(tmp_path / engine, precision="bf16", max_epochs=1, log_interval=1, engine=engine).train()
        lines[engine] = metric_lines(tmp_path / engine)
    assert lines["hf"][0] == pytest.approx(lines["torch"][0], rel=1e-6)
    assert len(lines["hf"]) == len(lines["torch"])
    for ours, theirs in zip(lines["hf"], lines["torch"], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2)


@pytest.mark.parametrize("step", [4, 7], ids=["within an epoch", "at the end of one"])
def test_an_interrupted_run_continues_exactly(tmp_path: Path, step: int) -> None:
    """Weights, optimizer, schedule, metrics, best checkpoint: bit for bit those of a run that was left alone."""

    def kill(run: Any) -> None:
        if run.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    make_trainer(tmp_path / "whole", max_epochs=2, engine="hf").train()
    interrupt = Hook("interrupt", kill, every_steps=1)
    with pytest.raises(SystemExit) as stopped:
        make_trainer(tmp_path / "cut", max_epochs=2, engine="hf", hooks=[interrupt]).train()
    assert stopped.value.code == 75 and (tmp_path / "cut" / f"checkpoint-{step + 1:08d}" / "manifest.json").exists()
    make_trainer(tmp_path / "cut", max_epochs=2, engine="hf").train()
    whole, cut = outcome(tmp_path / "whole"), outcome(tmp_path / "cut")
    cut["state"]["progress"]["hooks_done"].pop("interrupt", None)
    assert cut == whole


def test_either_driver_goes_on_where_the_other_stopped(tmp_path: Path) -> None:
    lasts = []
    for first, second in (("torch", "torch"), ("torch", "hf"), ("hf", "torch")):
        folder = tmp_path / f"{first}-{second}"
        make_trainer(folder, max_steps=5, engine=first).train()
        lasts.append(make_trainer(folder, max_steps=11, engine=second).train())
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "num_tokens"):
        assert [last[name] for last in lasts] == pytest.approx([lasts[0][name]] * 3, rel=1e-5)


def test_a_bad_step_updates_nothing(tmp_path: Path) -> None:
    seen: list[list[torch.Tensor]] = []
    watch = Hook("watch", lambda run: seen.append(state(run.trainer)), every_steps=1)
    trainer = regression(tmp_path, [GOOD, BAD, GOOD], hooks=[watch])
    scheduler = trainer.scheduler = torch.optim.lr_scheduler.StepLR(trainer.optimizer, 1)
    last = trainer.train()
    assert len(seen[0]) == 8 and not torch.equal(seen[1][0], seen[2][0])
    assert all(torch.equal(before, after) for before, after in zip(seen[0], seen[1], strict=True))
    assert scheduler.state_dict()["last_epoch"] == 2 and last["skipped_steps"] == 1
    assert len(torch.load(tmp_path / "bad_steps" / "step-2-rank-0.pt")) == 1


def test_too_many_bad_steps_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(
        NonFiniteError, match="2 steps in a row were not finite.*the weights are finite and the loss is not"
    ):
        regression(tmp_path, [GOOD, BAD, BAD, GOOD], max_bad_steps=2).train()


def test_callbacks_hear_of_the_run(tmp_path: Path) -> None:
    heard = Heard()
    options = {"val_loader": [GOOD], "max_epochs": 2, "save_interval": 1, "grad_accum_steps": 2}
    trainer = regression(tmp_path, [GOOD, 2 * GOOD, GOOD], **options)
    before = random.getstate()
    huggingface.train(trainer, callbacks=[heard])
    assert random.getstate() == before  # transformers seeds Python's generator
    steps = [event for event in heard.events if event.startswith("step")]
    assert steps == [f"step {i} of 4, epoch {epoch:g}" for i, epoch in enumerate([2 / 3, 1, 5 / 3, 2], start=1)]
    kinds = [event.split()[0] for event in heard.events]
    assert kinds == [*["step"] * 2, "eval_loss", "save", "epoch"] * 2
    written = [line for line in metric_lines(tmp_path) if "loss" in line]
    logged = [logs for logs in heard.logs if "loss" in logs]
    assert [logs["loss"] for logs in logged] == [line["loss"] for line in written] and len(written) == 4
    assert "train_loss" in heard.logs[-1] and "train_samples_per_second" not in heard.logs[-1]
    assert trainer.model is trainer.base_model and trainer.evaluate()["eval_loss"] > 0


def test_a_callback_may_end_an_epoch_or_the_run(tmp_path: Path) -> None:
    skip = regression(tmp_path / "skip", [GOOD] * 3, max_epochs=2)
    huggingface.train(skip, callbacks=[Heard(1, should_epoch_stop=True)])
    assert (skip.run.progress.step, skip.run.progress.epoch, skip.run.progress.stopped_early) == (4, 2, False)
    stop = regression(tmp_path / "stop", [GOOD] * 3, max_epochs=2)
    huggingface.train(stop, callbacks=[Heard(2, should_training_stop=True)])
    assert (stop.run.progress.step, stop.run.progress.stopped_early) == (2, True)
    assert (tmp_path / "stop" / "checkpoint-00000002" / "manifest.json").exists()


def test_transformers_may_log_evaluate_and_save_at_its_own_moments(tmp_path: Path) -> None:
    heard, options = Heard(), {"val_loader": [GOOD], "log_interval": 100, "save_interval": 0, "eval_interval": 100}
    trainer = regression(tmp_path, [GOOD, 2 * GOOD] * 3, max_epochs=9, **options)
    when = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
    best = {"metric_for_best_model": "eval_loss", "logging_strategy": "steps"}
    patience = EarlyStoppingCallback(early_stopping_patience=2)
    huggingface.train(trainer, callbacks=[heard, patience], **when, **best)
    values = [float(event.split()[1]) for event in heard.events if event.startswith("eval_loss")]
    assert values[-1] > min(values) and values[-2] > min(values) and trainer.run.progress.step < 54
    assert (tmp_path / "checkpoint-00000004" / "manifest.json").exists()
    reference = regression(tmp_path / "loop", [GOOD, 2 * GOOD] * 3, log_interval=2, engine="torch", save_interval=0)
    reference.train()
    expected = [line["loss"] for line in metric_lines(tmp_path / "loop")]
    assert [logs["loss"] for logs in heard.logs if "loss" in logs][:3] == pytest.approx(expected, rel=1e-5)
    resumed, rest = regression(tmp_path / "part", [GOOD, 2 * GOOD] * 3, max_steps=2, log_interval=100), Heard()
    resumed.train()
    resumed = regression(tmp_path / "part", [GOOD, 2 * GOOD] * 3, resume="auto", log_interval=100)
    huggingface.train(resumed, callbacks=[rest], logging_strategy="steps", logging_steps=2)
    assert [logs["loss"] for logs in rest.logs if "train_loss" not in logs][:1] == pytest.approx(
        expected[1:2], rel=1e-5
    )
    assert rest.logs[-1]["train_loss"] == pytest.approx(sum(expected[1:]) / 2, rel=1e-5)


def test_arguments_that_contradict_the_run_are_refused(tmp_path: Path) -> None:
    known = {f.name for f in fields(TrainingArguments)}
    names = {name for group in huggingface.OF_THE_RUN.values() for name in group}
    assert names - known <= {"train_sampling_strategy", "activation_checkpointing"}  # newer than transformers 5.0
    trainer = regression(tmp_path, [GOOD])
    with pytest.raises(
        ValueError, match="gradient_accumulation_steps=4: the run decides this; set .*`grad_accum_steps`"
    ):
        huggingface.train(trainer, gradient_accumulation_steps=4)
    with pytest.raises(TypeError, match="learning"):
        huggingface.train(trainer, learning=1)


def test_what_transformers_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = regression(tmp_path, [GOOD], engine="torch")
    monkeypatch.setattr(trainer.run.engine, "precision_name", "fp16")
    with pytest.raises(ValueError, match="no loss scale for fp16"):
        huggingface.train(trainer)
    monkeypatch.setattr(trainer.run.engine, "ddp", True)
    with pytest.raises(ValueError, match="'torch', whose TorchEngine has wrapped the model.*engine='hf'"):
        huggingface.train(trainer)
    alone = regression(tmp_path, [GOOD], use_ddp=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="use_ddp=False, but engine 'hf' trains with all 2 processes"):
        alone.train()


def test_the_time_of_a_step_includes_the_update(tmp_path: Path) -> None:
    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            time.sleep(0.05)
            super().step(closure)

    trainer = regression(tmp_path, [GOOD] * 4)
    trainer.optimizer = trainer.run.engine._optimizer = Slow(trainer.base_model.parameters(), lr=0.1)
    trainer.train()
    assert trainer.run.progress.train_seconds >= 4 * 0.05
