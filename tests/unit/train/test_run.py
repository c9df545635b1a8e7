"""A run is what it was after every kind of stop; nothing of the user is overwritten or lost."""

import os
import random
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer import Trainer
from llm_trainer.checkpoint import CheckpointError
from llm_trainer.engine.out_of_memory import OutOfMemoryError
from llm_trainer.lock import LockedError
from llm_trainer.optim.schedules import create_scheduler
from llm_trainer.train import run as run_module
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from llm_trainer.train_configs import ModelConfig, PretrainConfig, RunConfig, TrainConfig
from regression import Regression

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from victim import make_trainer, metric_lines, outcome


def stop_after(step: int) -> Hook:
    """SIGTERM after step number `step`; it is noticed in the next one."""

    def send(run: Any) -> None:
        if run.progress.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return Hook("stop", send, every_steps=1)


def test_stopping_again_and_again_changes_nothing(tmp_path: Path) -> None:
    """Weights, optimizer, plateau schedule, early stopping, best checkpoint, and metrics.jsonl line by line."""
    options = {"early_stopping_patience": 3, "max_epochs": 8, "save_interval_steps": 1000}
    make_trainer(tmp_path / "whole", **options).train()
    whole, stops = outcome(tmp_path / "whole"), 0
    rates = (tmp_path / "whole" / "log" / "lr.txt").read_text()
    while True:
        trainer = make_trainer(tmp_path / "cut", **options)
        trainer.run._resume()
        trainer.run._user_hooks.append(stop_after(trainer.run.progress.step + 1))
        try:
            trainer.train()
            break
        except TrainingInterrupted:
            stops += 1
    assert trainer.run.progress.stopped_early and trainer.run.progress.step < 64 and stops > 5
    cut = outcome(tmp_path / "cut")
    assert len(whole["metrics"]) > 10 and cut["metrics"] == whole["metrics"] and cut["best"] == whole["best"]
    del cut["state"]["progress"]["hooks_done"], whole["state"]["progress"]["hooks_done"]  # one has another hook
    assert cut == whole
    assert (tmp_path / "cut" / "log" / "lr.txt").read_text() == rates
    last = trainer.run.progress.step
    assert [line.split()[0] for line in rates.splitlines()] == [f"step={step}" for step in range(1, last + 1)]


def test_a_hook_is_called_once_for_each_step_however_often_the_run_goes_on(tmp_path: Path) -> None:
    """Also for a step after which a checkpoint was written, and for the last one of a run that is lengthened."""
    seen: list[int] = []
    note = Hook("note", lambda run: seen.append(run.progress.step), every_steps=1, at_end=True)
    for last in (3, 5, 6):
        make_trainer(tmp_path, max_steps=last, save_interval_steps=1, hooks=[note]).train()
    assert seen == [1, 2, 3, 4, 5, 6]


def frail(folder: Path, place: str = "", step: int = 0, **options: Any) -> Any:
    """A run that fails after step number `step`: in an evaluation, or in a hook of the user's behind it."""

    def fail(run: Any) -> None:
        random.random(), np.random.random()  # noise that is drawn again
        if place == "hook" and run.progress.step == step:
            raise KeyError("the hook is lost")

    hooks = [Hook("frail", fail, every_steps=4, at_end=True)]
    trainer = make_trainer(folder, hooks=hooks, max_steps=10, save_interval_steps=7, **options)
    compute_loss = trainer._compute_loss

    def evaluated(outputs: Any, batch: Any) -> Any:
        random.random(), np.random.random()
        if place == "evaluate" and trainer.run.progress.step == step and not trainer.model.training:
            raise KeyError("the metric is lost")
        return compute_loss(outputs, batch)

    trainer._compute_loss = evaluated
    return trainer


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    frail(folder).train()
    return outcome(folder)


@pytest.mark.parametrize(("place", "step"), [("evaluate", 4), ("hook", 8), ("evaluate", 10), ("hook", 10)])
def test_a_hook_that_fails_loses_no_step(
    place: str, step: int, undisturbed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What came before it is saved, and a run that goes on from there calls it again and ends in the same bits."""
    name = {"evaluate": "evaluate", "hook": "frail"}[place]
    with pytest.raises(KeyError, match="is lost"):
        frail(tmp_path, place, step).train()
    saved = tmp_path / f"checkpoint-{step:08d}"
    said = (
        f"step {step}, hook {name}, failed with KeyError; all before it is saved in {saved}: the same command goes on"
    )
    assert said in capsys.readouterr().out
    frail(tmp_path).train()
    assert outcome(tmp_path) == undisturbed


def test_what_cannot_be_saved_hides_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where memory ran out, whose error is said in one line; a run without a checkpoint begins again."""
    trainer = frail(tmp_path, "hook", 4)

    def full(*args: Any, **kwargs: Any) -> str:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(trainer.run.checkpoints, "save", full)
    with pytest.raises(KeyError, match="the hook is lost"):
        trainer.train()
    assert (
        "failed with KeyError, and what came before it could not be saved: the disk is full" in capsys.readouterr().out
    )

    def exhaust(run: Any) -> None:
        raise MemoryError("no memory left")

    hungry = make_trainer(tmp_path / "hungry", hooks=[Hook("exhaust", exhaust, every_steps=5)])
    with pytest.raises(OutOfMemoryError, match="no memory left"):
        hungry.train()
    assert (tmp_path / "hungry" / "checkpoint-00000005").is_dir()


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = make_trainer(tmp_path, max_epochs=1).train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if not path.is_symlink()}
    again = make_trainer(tmp_path, max_epochs=1).train()
    assert "already finished at step 8, nothing to do: raise n_epochs" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.items() <= last.items() and "eval_loss" in again
    make_trainer(tmp_path, max_epochs=2).train()
    assert outcome(tmp_path)["state"]["progress"]["step"] == 16


def test_a_new_run_in_an_old_folder_does_not_mix_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, max_epochs=2).train()
    logs = {path.name: path.read_text() for path in (tmp_path / "log").iterdir()}
    make_trainer(tmp_path, max_epochs=1, resume="never").train()
    assert "later checkpoints were moved to" in capsys.readouterr().out
    own = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert max(own) == "checkpoint-00000008" and (tmp_path / "model").resolve().parent.name in own
    assert (tmp_path / "set-aside-1" / "checkpoint-00000016" / "manifest.json").exists()
    assert {path.name: path.read_text() for path in (tmp_path / "set-aside-1" / "log").iterdir()} == logs
    assert "step=16" in logs["log.txt"] and "step=16" not in (tmp_path / "log" / "log.txt").read_text()


def test_the_published_model_opens_while_a_run_is_continued(tmp_path: Path) -> None:
    """Rotation deletes what it led to when the first run ended, before the continued one ends or is interrupted."""
    options = {"val_loader": None, "scheduler": None, "checkpoints_to_keep": 1}
    make_trainer(tmp_path, max_epochs=1, **options).train()
    leads_to = []

    def look(run: Any) -> None:
        leads_to.append(int((tmp_path / "model").resolve(strict=True).parent.name[-8:]))

    hooks = [Hook("look", look, every_steps=1), stop_after(15)]
    with pytest.raises(TrainingInterrupted):
        make_trainer(tmp_path, max_epochs=2, hooks=hooks, **options).train()
    assert leads_to[0] == 8 and leads_to[-1] > 8
    assert (tmp_path / "model").resolve(strict=True).parent.name == "checkpoint-00000016"


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    refused: list[str] = []

    def start_another(run: Any) -> None:
        if run.progress.step == 2:
            for begin in ("train", "save_checkpoint"):
                with pytest.raises(LockedError) as error:
                    getattr(make_trainer(tmp_path), begin)()
                refused.append(str(error.value))
            run.save()  # a run that holds the folder may save at any time

    make_trainer(tmp_path, max_epochs=1, hooks=[Hook("another", start_another, every_steps=1)]).train()
    assert len(refused) == 2 and f"save_dir '{tmp_path}' is in use by process {os.getpid()} on host" in refused[0]
    assert "or choose another save_dir" in refused[0] and not (tmp_path / ".run.lock").exists()
    make_trainer(tmp_path / "whole", max_epochs=1).train()
    assert outcome(tmp_path)["weights"] == outcome(tmp_path / "whole")["weights"]
    make_trainer(tmp_path).save_checkpoint()  # outside of a run


def test_the_best_checkpoint_holds_the_weights_that_were_evaluated(tmp_path: Path) -> None:
    """Evaluation and saving fall on the same step, where an epoch ends."""
    trainer = make_trainer(tmp_path, max_epochs=2, eval_interval=None, save_interval_steps=8)
    trainer.train()
    best = trainer.run.checkpoints.manager.best()
    assert best is not None and int(best.name[-8:]) == trainer.run.progress.best_step
    evaluated = {line["step"]: line["eval_loss"] for line in outcome(tmp_path)["metrics"] if "eval_loss" in line}
    trainer.load_checkpoint(str(best))
    assert trainer.evaluate()["eval_loss"] == evaluated[trainer.run.progress.best_step] == min(evaluated.values())


def test_an_evaluation_that_is_not_a_number_is_no_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([float("nan"), 2.0, float("nan"), 1.0])
    monkeypatch.setattr(run_module, "evaluate", lambda work: ({"eval_loss": next(losses)}, False))
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.train()
    assert trainer.run.progress.best_loss == 1.0 and trainer.run.progress.best_step == 16


def test_a_file_without_progress_is_refused(tmp_path: Path) -> None:
    from llm_trainer.checkpoint import save_checkpoint

    trainer = make_trainer(tmp_path / "run")
    kept = {"optimizer": trainer.optimizer, "scheduler": trainer.scheduler}
    save_checkpoint(tmp_path / "plain.pt", model=trainer.base_model, **kept)
    with pytest.raises(CheckpointError, match=r"plain.pt holds no progress of a run"):
        trainer.load_checkpoint(str(tmp_path / "plain.pt"))


def test_resume_in_a_billion_tokens_is_a_seek(tmp_path: Path, reference_dir: Path) -> None:
    """A sparse file of 2 GB: the position 3 000 000 rows in is reached in seconds, without reading or holding the rest."""
    np.lib.format.open_memmap(tmp_path / "ids.npy", mode="w+", dtype=np.uint16, shape=(1_000_000_000,))
    config = TrainConfig(
        model_config=ModelConfig(vocab_size=512, hidden_size=8, num_hidden_layers=1, num_attention_heads=1),
        tokenizer=str(reference_dir / "tokenizer"),
        file_dataset=str(tmp_path / "ids.npy"),
        batch_size=1,
        dataset_block_size=256,
        run_config=RunConfig(save_dir=str(tmp_path / "run"), device="cpu", progress=False, log_interval=1),
        pretrain_config=PretrainConfig(),
    )
    first = Trainer(train_config=config, max_steps=1)
    assert len(first.run.source) == -(-1_000_000_000 // 256)
    first.train()
    first.run.progress.position = 3_000_000
    first.save_checkpoint()
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resumed = Trainer(train_config=config, max_steps=4)
    resumed.train()
    assert resumed.run.progress.position == 3_000_003 and time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200_000  # KB


def resumed(folder: Path, before: dict[str, Any], after: dict[str, Any], steps: int = 2, **options: Any) -> Any:
    """A trainer that goes on, with other options of the optimizer, from where one stopped after `steps` steps."""
    trainers = []
    for values, last in ((before, steps), (after, 2 * steps)):
        torch.manual_seed(0)
        model = torch.nn.Linear(1, 1)
        groups = [{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, **values)
        data = torch.tensor([[1.0, 2.0], [0.5, 0.5]])
        how = {"log_interval": 1, "use_amp": False, "progress": False, "device": "cpu", "resume": "auto"}
        trainer = Regression(model, optimizer, [data] * 9, save_dir=str(folder), max_steps=last, **(how | options))
        trainer.train()
        trainers.append(trainer)
    return trainers[1]


def test_other_options_of_the_optimizer_win_over_the_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was configured otherwise is new and said; moments, step counts and unchanged options go on."""
    first, then = {"lr": 0.1, "weight_decay": 0.1}, {"lr": 0.2, "weight_decay": 0.3, "betas": (0.8, 0.99)}
    trainer = resumed(tmp_path, first, then)
    matrices, biases = trainer.optimizer.param_groups
    assert (matrices["lr"], matrices["weight_decay"], matrices["betas"]) == (0.2, 0.3, (0.8, 0.99))
    assert (biases["lr"], biases["weight_decay"]) == (0.2, 0.0)
    assert [int(state["step"]) for state in trainer.optimizer.state.values()] == [4, 4]
    said = "since the checkpoint: betas (0.9, 0.999) -> (0.8, 0.99), lr 0.1 -> 0.2, weight_decay 0.1 -> 0.3"
    assert said in capsys.readouterr().out
    assert [line["learning_rate"] for line in metric_lines(tmp_path)] == [0.1, 0.1, 0.2, 0.2]


def test_what_a_hook_has_changed_is_not_configured_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def halve(run: Any) -> None:
        for group in run.trainer.optimizer.param_groups:
            group["lr"] /= 2

    trainer = resumed(tmp_path, {"lr": 0.8}, {"lr": 0.8}, hooks=[Hook("halve", halve, every_steps=1)])
    assert trainer.optimizer.param_groups[0]["lr"] == 0.05 and "since the checkpoint" not in capsys.readouterr().out


def test_a_configured_rate_is_new_whatever_the_schedule_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = make_trainer(tmp_path, max_epochs=1, scheduler=None)
    schedule = create_scheduler(whole.optimizer, "linear", total_steps=8)
    whole.scheduler = schedule
    whole.train()
    assert whole.optimizer.param_groups[0]["lr"] == 0.0
    rest = make_trainer(tmp_path, max_epochs=2, scheduler=None)  # without a schedule: the rate that is configured
    rest.train()
    assert rest.optimizer.param_groups[0]["lr"] == 0.02 and "lr 0 -> 0.02" in capsys.readouterr().out


def test_torchs_plateau_follows_evaluations(tmp_path: Path) -> None:
    """Stepped once per evaluation and never per update; a resumed run goes on with it."""

    def plateau(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)

    trainer = make_trainer(tmp_path, max_epochs=1, eval_interval=2, log_interval=1)
    trainer.scheduler = plateau(trainer.optimizer)
    trainer.train()
    rates = [line["learning_rate"] for line in metric_lines(tmp_path) if "loss" in line]
    assert rates == [0.02, 0.02, 0.01, 0.01, 0.005, 0.005, 0.0025, 0.0025]
    again = make_trainer(tmp_path, max_epochs=2, eval_interval=2, log_interval=1)
    again.scheduler = plateau(again.optimizer)
    again.run._resume()
    assert again.scheduler.state_dict() == trainer.scheduler.state_dict()
    assert again.optimizer.param_groups[0]["lr"] == trainer.optimizer.param_groups[0]["lr"] == 0.00125


def test_a_plateau_without_evaluations_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, val_loader=None)
    trainer.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer)
    with pytest.raises(ValueError, match="ReduceLROnPlateau follows eval_loss, and the run has no validation data"):
        trainer.train()
    trainer = make_trainer(tmp_path)
    trainer.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(trainer.optimizer, mode="max")
    with pytest.raises(ValueError, match="got ReduceLROnPlateau with mode='max', expected 'min'"):
        trainer.train()


def test_a_trainer_says_where_it_stands(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert (trainer.is_distributed, trainer.rank, trainer.is_main) == (False, 0, True)
    assert trainer.device == torch.device("cpu")
