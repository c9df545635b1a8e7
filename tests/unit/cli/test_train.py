"""`llm-trainer train`: one YAML in, a model out."""

from pathlib import Path

import pytest

from llm_trainer.cli import launch
from llm_trainer.cli.executable import typed
from llm_trainer.cli.main import main


def test_train_leaves_a_model_at_a_stable_path(run, run_yaml, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("train", run_yaml) == 0
    shown = capsys.readouterr().out
    assert f"model  {out}/model (of checkpoint-00000002)" in shown
    assert f"chat   {typed()} chat {out}/model --raw" in shown
    assert (out / "model").readlink() == Path("checkpoint-00000002/model")
    assert (out / "model" / "config.json").is_file()
    assert run("train", run_yaml, "run_config.max_steps=3", f"eval_dataset={tmp_path / 'a.jsonl'}") == 0
    shown = capsys.readouterr().out
    assert "step 3/3" in shown
    assert f"continuing from {out}/checkpoint-00000002: step 2" in shown
    assert "(of checkpoint-00000003)" in shown
    assert (out / "model").readlink() == Path("checkpoint-00000003/model")
    assert run("plot", out) == 0
    assert (out / "plot.png").stat().st_size > 1000


def test_failed_and_interrupted_runs_have_their_own_codes(run, run_yaml, monkeypatch, capsys):
    from llm_trainer.checkpoint import CheckpointError
    from llm_trainer.train.guards import NonFiniteError
    from llm_trainer.train.signals import EXIT_INTERRUPTED, TrainingInterrupted
    from llm_trainer.trainers.base import BaseTrainer

    for error, code in (
        (NonFiniteError("the gradient is not finite"), 1),
        (CheckpointError("the disk is full"), 1),
        (TrainingInterrupted(EXIT_INTERRUPTED), 75),
    ):

        def train(self, error=error):
            raise error

        monkeypatch.setattr(BaseTrainer, "train", train)
        assert run("train", run_yaml) == code
        assert code == 75 or f"error: {error}\n" == capsys.readouterr().err


def test_train_starts_itself_once_per_gpu(run, run_yaml, monkeypatch, capsys):
    class Started(Exception):
        pass

    def start(plan):
        raise Started(plan.kind, plan.command[3:])

    monkeypatch.delenv("PARALLEL_TYPE", raising=False)
    monkeypatch.setattr(launch.Machine, "look", lambda: launch.Machine(4, 32, False))
    monkeypatch.setattr(launch, "start", start)
    arguments = ["train", str(run_yaml), "run_config.device=null", "--traceback"]
    with pytest.raises(Started) as started:
        main(arguments)
    workers = ["--nproc-per-node=4", "--standalone", "-m", "llm_trainer.cli.main", *arguments]
    assert started.value.args == ("ddp", workers)
    assert "found 4 GPUs" in capsys.readouterr().err
    monkeypatch.setenv("PARALLEL_TYPE", "none")
    assert run("train", run_yaml, "run_config.device=null", "batch_size=1") == 0
