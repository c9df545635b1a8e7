"""Additions of two numbers below 100, of which supervised training has taught a part: reinforcement takes them further.

A prompt is `ab + cd =`, an answer the three digits of the sum from the right, units before tens before hundreds; a carry may
go through two of them. Supervised training stops where the model answers 30 to 45 % of the held-out prompts rightly.
"""

import contextlib
import io
import sys
import tempfile
from functools import cache
from typing import Any

import sums
import torch
from reinforcement import Experiment, Ids, greedy_accuracy

from llm_trainer import GRPOTrainer, PPOTrainer, RLOOTrainer, SFTTrainer
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.train.hooks import Hook, RunView

NUM_PROMPTS, HELD_OUT = 10_000, 1_000
PROMPT, TOKENS = 6, 3  # of a prompt, of an answer
KNOWS, LOOKS_EVERY = 0.3, 10  # accuracy at which supervised training stops, and steps between looks at it


def split(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the prompts to train on `[9000]`, and of the held-out ones `[1000]`."""
    numbers = torch.randperm(NUM_PROMPTS, generator=torch.Generator().manual_seed(seed))
    return numbers[HELD_OUT:], numbers[:HELD_OUT]


def rows(numbers: torch.Tensor) -> torch.Tensor:
    """Prompts `numbers [B]` with the right sum as ids `[B, 9]`."""
    first, second = numbers // 100, numbers % 100
    total = first + second
    plus, equals = torch.full_like(numbers, sums.PLUS), torch.full_like(numbers, sums.EQUALS)
    prompt = [first // 10, first % 10, plus, second // 10, second % 10, equals]
    return torch.stack([*prompt, total % 10, total // 10 % 10, total // 100], dim=1)


@cache
def base(seed: int) -> Any:
    """The model that knows a part, made once per seed."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(**sums.SHAPE, max_position_embeddings=16, initializer_range=0.1))
    train, _ = split(seed)
    batches = []
    for _ in range(2000):
        ids = rows(train[torch.randint(len(train), (128,))])
        batches.append({"input_ids": ids, "labels": torch.where(torch.arange(ids.shape[1]) < PROMPT, -100, ids)})

    def stop_in_time(run: RunView) -> None:
        if accuracy(model, seed) >= KNOWS:
            run.stop("it knows enough")
        model.train()

    hooks = [Hook("stop in time", stop_in_time, every_steps=LOOKS_EVERY)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sums.one_pass(SFTTrainer, model, batches, 1e-3, seed=seed, save_dir=folder, hooks=hooks).train()
    return model


def batch(seed: int, count: int) -> dict[str, Any]:
    """Ids of prompts `[count, 6]`."""
    train, _ = split(seed)
    return {"prompts": rows(train[torch.randperm(len(train))[:count]])[:, :PROMPT]}


def accuracy(model: Any, seed: int) -> float:
    """Of the 1,000 held-out prompts."""
    _, held_out = split(seed)
    right = rows(held_out)
    return greedy_accuracy(model, right[:, :PROMPT], right[:, PROMPT:])


def is_right(prompts: Ids, completions: Ids, **_: Any) -> list[float]:
    """1 for a right sum, else 0."""
    rewards = []
    for (a, b, _plus, c, d, _equals), completion in zip(prompts, completions, strict=True):
        total = 10 * (a + c) + b + d
        rewards.append(float(list(completion) == [total % 10, total // 10 % 10, total // 100]))
    return rewards


PROMPTS, GROUP, UPDATES = 128, 4, 4  # of a rollout, completions per prompt, updates of each rollout
UPDATE = PROMPTS * GROUP // UPDATES  # completions


def _experiment(trainer: Any, **options: Any) -> Experiment:
    """At a higher learning rate the model forgets faster what it knows than it learns: at 1e-3 it falls to 20 %."""
    task = sys.modules[__name__]
    return Experiment(task, trainer, PADDED | options, rollouts=320, lr=5e-4, accuracy=(0.8, 1.0))


PADDED = {"packing": "none"}  # which takes less time where all rows are equally long and short
OF_GROUPS = {"num_samples_per_prompt": GROUP, "rows_per_update": UPDATE, "share_prompts": False}
WITH_CRITIC = {
    "critic_on_policy": True,
    "completions_per_prompt": GROUP,
    "ppo_batch_size": UPDATE,
    "ppo_epochs": 2,
    "clip_eps": 0.2,
    "kl_beta": 0.0,
}
EXPERIMENTS = {
    "GRPO, additions": _experiment(GRPOTrainer, **OF_GROUPS),
    "RLOO, additions": _experiment(RLOOTrainer, **OF_GROUPS),
    "PPO, additions": _experiment(PPOTrainer, **WITH_CRITIC),
}
