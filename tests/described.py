"""Configurations of tiny runs, and what such runs have logged."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llm_trainer.config.model import ModelConfig
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.train_configs import DataLoaderConfig, OptimConfig, RunConfig, TrainConfig

SHAPE = ModelConfig(
    vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A file with a row of JSON per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def describe(path: Path, reference_dir: Path, save_dir: Path, **changes: Any) -> TrainConfig:
    """A run on the rows of a file, in their order, two at a time, that logs every step.

    Args:
        path: of the data.
        reference_dir: that holds a tokenizer.
        save_dir: of the run.
        changes: other fields of the configuration, the algorithm's section among them.
    """
    values: dict[str, Any] = {
        "model_config": SHAPE,
        "tokenizer": str(reference_dir / "tokenizer"),
        "file_dataset": str(path),
        "batch_size": 2,
        "data_loader_config": DataLoaderConfig(data_loader_shuffle=False),
        "optim_config": OptimConfig(initial_lr=1e-2),
        "run_config": RunConfig(save_dir=str(save_dir), log_interval=1, save_interval_steps=1000, progress=False),
    }
    return TrainConfig(**(values | changes))


def logged(save_dir: Path, name: str = "loss") -> list[dict[str, Any]]:
    """The lines of a run's metrics that have a value called `name`."""
    lines = (save_dir / "log" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if name in row]


def curve(save_dir: Path) -> list[tuple[float, ...]]:
    """Loss, gradient norm and, where there is one, reward of each step."""
    return [(row["loss"], row["grad_norm"], row.get("reward", 0.0)) for row in logged(save_dir)]


def prompt_batches(tokenizer: Any, rows: list[Mapping[str, Any]], size: int) -> list[dict[str, Any]]:
    """The batches of rows with a `question` and an `answer` in the explicit style, prompts padded on the left."""
    chat, batches = ChatFormat(tokenizer), []
    for first in range(0, len(rows), size):
        own = rows[first : first + size]
        ids = [chat.encode_prompt([{"role": "user", "content": row["question"]}]) for row in own]
        width = max(map(len, ids))
        batch: dict[str, Any] = {
            "prompts": torch.tensor([[0] * (width - len(row)) + row for row in ids]),
            "prompt_attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
            "answers": [row["answer"] for row in own],
        }
        for name in own[0].keys() - {"question", "answer"}:
            batch[name] = [row[name] for row in own]
        batches.append(batch)
    return batches
