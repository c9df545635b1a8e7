"""The examples run and do what they say; the one for several processes gives the same losses however it is started."""

import json
import os
import subprocess
from collections.abc import Sequence
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from llm_trainer.config.load import load_config
from machine import free_port

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def load(name: str) -> ModuleType:
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_basic(tmp_path: Path) -> None:
    untrained, first, second = load("basic_trainer_example").main(tmp_path, num_rows=256)
    assert untrained > 5.5 > 4 > first > second  # ln 256 = 5.55


def test_three_stages(tmp_path: Path) -> None:
    """Pretraining gives the knowledge, SFT the form in two variants, DPO the better one of them."""
    results = load("three_stages").main(tmp_path)
    after_sft, after_dpo = results["after sft"], results["after dpo"]
    assert results["pretrain"]["loss"] < 0.5 and after_sft["right"] > 0.5 and after_sft["sentences"] < 0.7
    assert results["dpo"]["rewards/accuracies"] > 0.6 and results["dpo"]["loss"] < 0.69  # it begins at ln 2
    assert after_dpo["right"] > 0.5 and after_dpo["sentences"] > 0.7
    assert (tmp_path / "sft" / "model" / "model.safetensors").exists()


def start(save_dir: Path, launcher: Sequence[str], python: str) -> subprocess.Popen:
    command = [*launcher, str(EXAMPLES / "distributed_train_example.py"), "--rows", "128", "--save-dir", str(save_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": python}  # torchrun's, for its ranks
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([python, *command], text=True, env=environment, **pipes)  # type: ignore[call-overload]


def curve(save_dir: Path, *processes: subprocess.Popen) -> list[float]:
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-3000:]
    rows = map(json.loads, (save_dir / "log" / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def test_distributed(tmp_path: Path, warm_python: str) -> None:
    """Plain python, two processes by torchrun, and two "nodes" of one process each."""
    torchrun = ["-m", "torch.distributed.run"]
    place = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    alone = curve(tmp_path / "1", start(tmp_path / "1", [], warm_python))
    together = curve(
        tmp_path / "2", start(tmp_path / "2", [*torchrun, "--standalone", "--nproc_per_node=2"], warm_python)
    )
    nodes = [start(tmp_path / "nodes", [*torchrun, *place, f"--node_rank={rank}"], warm_python) for rank in (0, 1)]
    apart = curve(tmp_path / "nodes", *nodes)
    assert len(alone) == 4 and alone[-1] < alone[0] - 1
    assert together == pytest.approx(alone, abs=1e-5) and apart == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_configurations_load(stage: str) -> None:
    config = load_config(ROOT / "configs" / f"{stage}.yaml")
    assert getattr(config, f"{stage}_config") is not None
    assert config.run_config.save_dir == f"runs/{stage}"


def test_configurations_run_on_the_demos_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the demo's folders, with models and runs made tiny."""
    from llm_trainer import create_trainer
    from llm_trainer.data.encode.tokenizer import train_tokenizer

    monkeypatch.chdir(tmp_path)
    demo = load("demo")
    data = tmp_path / "runs" / "demo" / "data"
    demo.write_data(data)
    for file in data.iterdir():
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:40]))
    texts = [json.loads(line)["text"] for line in (data / "corpus.jsonl").read_text().splitlines()]
    train_tokenizer(texts, vocab_size=300).save_pretrained(data.parent / "tokenizer")
    tiny = ["run_config.max_steps=1", "batch_size=2", "eval_config.max_seq_len=2", "run_config.progress=false"]
    shape = ["model_config.hidden_size=32", "model_config.num_hidden_layers=1"]
    for stage, overrides in (("pretrain", shape), ("sft", [])):
        config = load_config(ROOT / "configs" / f"{stage}.yaml", [*tiny, *overrides])
        trainer = create_trainer(stage, train_config=config)
        assert trainer.train()["eval_loss"] > 0 and trainer.run.progress.step == 1
        assert (tmp_path / "runs" / stage / "model" / "config.json").exists()

    (data.parent / "dpo").symlink_to(tmp_path / "runs" / "sft")
    rewarded = demo.grpo_config(data.parent)
    rewarded.batch_size = 2
    rewarded.run_config.max_steps, rewarded.grpo_config.gen_max_seq_len = 1, 2
    results = demo.train("grpo", rewarded, reward_func=demo.shared_words)
    assert 0 <= results["before_eval_reward"] <= 1 and 0 <= results["eval_reward"] <= 1
    assert (data.parent / "grpo" / "model" / "config.json").exists()


def test_shared_words() -> None:
    """The demo's reward: F1 of words, however they are written, and each as often as it is there."""
    completions = ["Return the name.", "the the the the", "", "nothing of it"]
    answers = ["return the path, a name", "the end", "an end", "Serialize obj"]
    rewards = load("demo").shared_words(["?"] * 4, completions, answers)
    assert rewards == pytest.approx([6 / 8, 2 / 6, 0, 0])
