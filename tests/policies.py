"""A tiny policy with attention, prompts of it, and runs of GRPO and PPO on them: ids alone, without a tokenizer."""

from pathlib import Path
from typing import Any

import torch

from llm_trainer import configure_optimizer, get_trainer_class
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.rollouts import Rollout
from llm_trainer.models.build import build_model
from llm_trainer.train.hooks import Hook

STOP = 2
Seen = list[dict[str, float]]


def tiny(seed: int = 0, **shape: Any) -> Any:
    """A policy of 24 ids, the same at every call."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build_model(ModelConfig(**{**sizes, "max_position_embeddings": 32, **shape}))


def prompts(count: int = 6, size: int = 2) -> list[dict[str, Any]]:
    """Batches of prompts padded on the left, with an answer each."""
    noise = torch.Generator().manual_seed(1)
    batches = []
    for first in range(0, count, size):
        ids = torch.randint(3, 24, (size, 4), generator=noise)
        mask = torch.ones(size, 4, dtype=torch.long)
        mask[0, 0] = 0
        answers = [str(first + row) for row in range(size)]
        batches.append({"prompts": ids, "prompt_attention_mask": mask, "answers": answers})
    return batches


def even_share(prompts: list[list[int]], completions: list[list[int]], answers: list[str]) -> list[float]:
    """The share of even tokens: ids, since there is no tokenizer."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completions]


# What a run of each trainer has where a test says nothing else.
RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"num_samples_per_prompt": 4},
    "ppo": {"completions_per_prompt": 2, "ppo_epochs": 2, "ppo_batch_size": 4},
}


def make(name: str, folder: Path, model: Any = None, **options: Any) -> Any:
    """A trainer that samples, judges and learns into `folder`, and keeps its rollouts.

    Args:
        name: of the trainer.
        folder: of the run.
        model: that is trained; None: a tiny one.
        options: keywords of the trainer.
    """
    model = tiny() if model is None else model
    given: dict[str, Any] = {
        "optimizer": configure_optimizer(model=model, lr=3e-3),
        "train_loader": prompts(),
        "reward_func": even_share,
        "gen_max_seq_len": 8,
        "stop_token_ids": [STOP],
        "max_epochs": 1,
        "keep_rollouts": True,
        "device": "cpu",
        "use_amp": False,
        "log_interval": 1,
        "save_interval": 0,
        "progress": False,
    }
    kind: Any = get_trainer_class(name)
    return kind(model=model, save_dir=str(folder), **(given | RUNS.get(name, {}) | options))


def train(name: str, folder: Path, model: Any = None, **options: Any) -> tuple[Any, Seen]:
    """A run to its end, and the metrics of each of its steps."""
    seen: Seen = []
    watch = Hook("watch", lambda run: seen.append(dict(run.values)), every_steps=1)
    trainer = make(name, folder, model, **(options | {"hooks": [watch, *options.get("hooks", [])]}))
    trainer.train()
    return trainer, seen


def rollouts_of(folder: Path) -> list[Rollout]:
    """The rollouts that a run has left."""
    return [Rollout(path) for path in sorted((folder / "rollouts").glob("[0-9]" * 8))]
