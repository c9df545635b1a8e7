"""An algorithm from outside the package: the one of the guide, in both styles, in YAML and in every command."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "new_algorithm.md"
SHAPE = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPLICIT = """
import json, torch
from focal import FocalTrainer
from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.models.build import build_model
from llm_trainer.train_configs import ModelConfig, TrainConfig

SHAPE = json.loads(open("shape.json").read())

def loss(kind, **options):
    torch.manual_seed(0)
    model, ids = build_model(ModelConfig(**SHAPE)), torch.arange(32).view(4, 8)
    optimizer = configure_optimizer(model=model, lr=1e-2)
    rows = [{"input_ids": ids, "labels": ids}]
    trainer = kind(model=model, optimizer=optimizer, train_loader=rows, max_epochs=5, use_amp=False, save_interval=0,
                   save_dir="runs/explicit", progress=False, **options)
    return trainer.train()["loss"]

same, focal = loss(FocalTrainer, gamma=0.0), loss(FocalTrainer)
section = TrainConfig(model_config="m", file_dataset="a", focal_config={"gamma": 1}).focal_config
print(json.dumps({"sft": loss(SFTTrainer), "same": same, "focal": focal, "section": repr(section)}))
"""


@pytest.fixture
def outside(tmp_path: Path, reference_dir: Path) -> Path:
    """A folder with the guide's module, a run that uses it, and data."""
    module = re.search(r"^```python\n# file: focal\.py\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert module is not None
    (tmp_path / "focal.py").write_text(module[1])
    (tmp_path / "explicit.py").write_text(EXPLICIT)
    (tmp_path / "shape.json").write_text(json.dumps(SHAPE))
    rows = [
        [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": "one two"}] for n in range(8)
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "plugins": ["focal.py"],
        "model_config": SHAPE,
        "tokenizer": str(reference_dir / "tokenizer"),
        "file_dataset": "chat.jsonl",
        "dataset_block_size": 64,
        "focal_config": {"gradient_accumulation_steps": 2},
        "run_config": {"save_dir": "runs/yaml", "log_interval": 1, "progress": False, "precision": "fp32"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    return tmp_path


Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def python(outside: Path, warm_commands: Path) -> Python:
    """Runs python with some arguments in the folder `outside`."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(warm_commands / "python"), *arguments]
        return subprocess.run(command, cwd=outside, capture_output=True, text=True, timeout=250)

    return run


def command(python: Python, *arguments: str) -> str:
    done = python("-m", "llm_trainer.cli.main", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def metrics(folder: Path) -> list[dict[str, float]]:
    """The lines of the training steps."""
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def test_the_explicit_style(python: Python) -> None:
    done = python("explicit.py")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] == pytest.approx(found["sft"], rel=1e-5)  # without gamma it is cross-entropy
    assert found["focal"] < 0.99 * found["sft"]
    assert found["section"] == "FocalConfig(gamma=1.0, gradient_accumulation_steps=1)"


def test_yaml_and_the_commands(outside: Path, python: Python) -> None:
    told = command(python, "config", "focal", "--plugin", "focal.py")
    assert "focal_config:  # Supervised fine-tuning that dwells on hard tokens\n  gamma: 2.0  " in told
    assert "\nplugins: [focal.py]" in told
    planned = json.loads(command(python, "plan", "run.yaml", "--gpus", "2", "--json"))
    assert planned["job"]["rows"] == 8 and planned["job"]["rows_per_sample"] == 1
    command(python, "train", "run.yaml", "focal_config.gamma=0")
    lines = metrics(outside / "runs/yaml")
    plain = [
        "plugins=[]",
        "focal_config=null",
        "sft_config.gradient_accumulation_steps=2",
        "run_config.save_dir=runs/sft",
    ]
    done = python("-m", "llm_trainer.cli.main", "train", "run.yaml", *plain)
    assert done.returncode == 2  # focal_config is no key without its plugin
    assert "focal_config is not a known key" in done.stderr
    saved = (outside / "runs/yaml/config.yaml").read_text()
    assert "\nplugins: [focal.py]" in saved and "gamma: 0.0" in saved
    assert [line["step"] for line in lines] == [1]
    command(python, "train", "run.yaml", *plain[2:], "focal_config=null")
    other = metrics(outside / "runs/sft")
    assert lines[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-5)
