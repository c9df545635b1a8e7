"""The command line: one YAML in, a model out, and errors without a stack trace."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llm_trainer.cli import launch
from llm_trainer.cli.main import main


@pytest.fixture
def run_yaml(tmp_path, request):
    """A run of a few steps of a tiny model."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(8)))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    values = {
        "model_config": shape,
        "tokenizer": str(request.config.rootpath / "tests" / "reference" / "tokenizer"),
        "file_dataset": [str(tmp_path / "a.jsonl")],
        "run_config": {"save_dir": str(tmp_path / "out"), "max_steps": 2, "log_interval": 1, "device": "cpu"},
        "pretrain_config": {},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(*arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys, time\n"
        "from llm_trainer.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'transformers', 'pydantic', 'yaml', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert time.process_time() < 0.3, time.process_time()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_train_leaves_a_model_at_a_stable_path(run_yaml, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("train", run_yaml) == 0
    shown = capsys.readouterr().out
    assert f"model  {out}/model (of checkpoint-00000002)" in shown
    assert f"chat   llm-trainer chat {out}/model --raw" in shown
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=0", "batch_size: got 0, expected an integer of at least 1"),
        ("batch_sise=1", "did you mean batch_size?"),
        ("sft_config={}", "found pretrain_config and sft_config; remove the others"),
        ("pretrain_config=null", "found none of them; add for example `sft_config: {}`"),
        ("file_dataset=nowhere.jsonl", "nowhere.jsonl: found no such file"),
        ("dataset_block_size=64", "dataset_block_size: got 64, but the model's longest sequence is 32"),
    ],
)
def test_users_mistakes_are_one_message_and_code_2(run_yaml, capsys, override, message):
    assert run("train", run_yaml, override) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error


def test_traceback_shows_where_a_mistake_came_from(run_yaml):
    from llm_trainer.config.errors import ConfigError

    with pytest.raises(ConfigError):
        main(["train", str(run_yaml), "batch_size=0", "--traceback"])


def test_failed_and_interrupted_runs_have_their_own_codes(run_yaml, monkeypatch, capsys):
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


def test_train_starts_itself_once_per_gpu(run_yaml, monkeypatch, capsys):
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
    assert "found 4 GPU(s)" in capsys.readouterr().err
    monkeypatch.setenv("PARALLEL_TYPE", "none")
    assert run("train", run_yaml, "run_config.device=null", "batch_size=1") == 0


def test_config_prints_a_file_that_loads(tmp_path, capsys):
    from llm_trainer.config.load import load_config

    assert run("config", "sft") == 0
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    assert load_config(path).sft_config is not None
    assert run("config", "sfd") == 2
    assert "expected one of pretrain, sft" in capsys.readouterr().err


def test_tokenizer_train(tmp_path, capsys):
    from llm_trainer.data.encode.tokenizer import load_tokenizer

    (tmp_path / "a.jsonl").write_text('{"text": "good day good day"}\n')
    assert run("tokenizer", "train", tmp_path / "a.jsonl", "--vocab-size", 280, "--out", tmp_path / "t") == 0
    assert f"tokens in {tmp_path / 't'}" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.decode(tokenizer("good day").input_ids) == "good day"
    assert len(tokenizer("good day").input_ids) < 8  # it has learned pairs
    assert run("tokenizer", "train", tmp_path / "a.jsonl", "--vocab-size", 100, "--out", tmp_path / "t") == 2
