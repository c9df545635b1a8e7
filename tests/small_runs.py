"""A described run over four short conversations, for tests of what is done to the weights of a model."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_trainer import SFTTrainer
from llm_trainer.config.load import parse
from llm_trainer.config.schema import TrainConfig
from llm_trainer.train.hooks import Hook

SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
ROWS = [[{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2 3" + " 4" * n}] for n in range(4)]


def config(folder: Path, reference_dir: Path, precision: str, **sections: Any) -> TrainConfig:
    """Two epochs in two steps each, on the CPU; `sections` replace those of the run, `run_config` key by key."""
    folder.mkdir(exist_ok=True, parents=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    run = {"save_dir": str(folder / "run"), "log_interval": 1, "progress": False}
    run |= {"precision": precision, "device": "cpu"} | sections.pop("run_config", {})
    values: dict[str, Any] = {
        "model_config": SHAPE,
        "tokenizer": str(reference_dir / "tokenizer"),
        "file_dataset": str(data),
        "batch_size": 2,
        "n_epochs": 2,
        "optim_config": {"initial_lr": 1e-2},
        "run_config": run,
        "sft_config": {},
    }
    return parse(values | sections, "test")


def train_in_two_lives(described: TrainConfig) -> None:
    """Train until something breaks after the third step, and go on from the checkpoint of the one before."""

    def breaks(view: Any) -> None:
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        SFTTrainer(train_config=described, hooks=[Hook("breaks", breaks, every_steps=3)]).train()
    SFTTrainer(train_config=described).train()


def losses(folder: Path) -> list[float]:
    """Of the steps of such a run."""
    lines = map(json.loads, (folder / "run" / "log" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]
