"""A run is what it was after every kind of stop; nothing of the user is overwritten or lost."""

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_trainer import Trainer
from llm_trainer.checkpoint import CheckpointError
from llm_trainer.train import run as run_module
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from llm_trainer.train_configs import ModelConfig, PretrainConfig, RunConfig, TrainConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from victim import make_trainer, outcome


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
    make_trainer(tmp_path, max_epochs=1, resume="never").train()
    assert "later checkpoints were moved to" in capsys.readouterr().out
    own = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert max(own) == "checkpoint-00000008" and (tmp_path / "model").resolve().parent.name in own
    assert (tmp_path / "set-aside-1" / "checkpoint-00000016" / "manifest.json").exists()


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
