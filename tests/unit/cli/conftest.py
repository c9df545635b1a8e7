"""What the tests of commands share."""

import json

import pytest
import yaml

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


@pytest.fixture
def run():
    """Runs a command and returns its exit code."""

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        return exit.value.code

    return run
