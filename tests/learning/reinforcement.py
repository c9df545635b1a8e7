"""What an experiment in reinforcement learning is, and how it is run: each line of the tables is one, as data."""

import contextlib
import io
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import sums
import torch

from llm_trainer import GRPOTrainer

Ids = Sequence[Sequence[int]]
Reward = Callable[..., list[float]]


def unchanged(is_right: Reward) -> Reward:
    """The reward of the task."""
    return is_right


def turned(is_right: Reward) -> Reward:
    """A control: the reward with its sign turned."""

    def is_wrong(prompts: Ids, completions: Ids, **columns: Any) -> list[float]:
        return [1 - reward for reward in is_right(prompts, completions, **columns)]

    return is_wrong


def dealt_out(is_right: Reward) -> Reward:
    """A control: the rewards, shuffled among the completions."""

    def shuffled(prompts: Ids, completions: Ids, **columns: Any) -> list[float]:
        rewards = is_right(prompts, completions, **columns)
        random.Random(repr(completions)).shuffle(rewards)
        return rewards

    return shuffled


class Task(Protocol):
    """What is to be learned: a module, or an object.

    Attributes:
        TOKENS: of a completion, at most.
    """

    TOKENS: int

    def base(self, seed: int) -> Any:
        """The model that reinforcement begins with, made once per seed."""

    def batch(self, seed: int, count: int) -> dict[str, Any]:
        """What is trained on in a rollout of `count` prompts, such as their ids `[count, P]`; others in every call."""

    def accuracy(self, model: Any, seed: int) -> float:
        """Share of held-out prompts that are answered rightly, greedily."""

    def is_right(self, prompts: Ids, completions: Ids, **_: Any) -> list[float]:
        """The reward: 1 for a right answer, else 0. None instead of a method: an environment gives the rewards."""


@dataclass(frozen=True)
class Experiment:
    """One line of a table.

    Attributes:
        task: what is to be learned.
        trainer: the algorithm.
        options: of the trainer.
        reward: makes the reward of the task's.
        rollouts, prompts: how many, and of how many prompts each.
        lr: learning rate.
        seeds: of the runs.
        accuracy: held-out accuracies that are expected, (lowest, highest).
    """

    task: Any
    trainer: Any = GRPOTrainer
    options: dict[str, Any] = field(default_factory=dict)
    reward: Callable[[Reward], Reward] = unchanged
    rollouts: int = 60
    prompts: int = 128
    lr: float = 1e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    accuracy: tuple[float, float] = (0.95, 1.0)


@dataclass(frozen=True)
class Outcome:
    """Held-out accuracy, before and after; of the training between, seconds of the processor and on the clock."""

    accuracy: tuple[float, float]
    processor: float
    clock: float


def run(experiment: Experiment, seed: int) -> Outcome:
    """Train on the task's base model of `seed`."""
    task = experiment.task
    model = deepcopy(task.base(seed))
    before = task.accuracy(model, seed)
    torch.manual_seed(seed)
    batches = []
    for _ in range(experiment.rollouts):
        batches.append(task.batch(seed, experiment.prompts))
    options = {"reward_func": experiment.reward(task.is_right), "gen_max_seq_len": task.TOKENS, "stop_token_ids": ()}
    started = time.process_time(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options |= experiment.options | {"seed": seed, "save_dir": folder, "save_interval": 0}
        sums.one_pass(experiment.trainer, model, batches, experiment.lr, **options).train()
    processor, clock = time.process_time() - started[0], time.perf_counter() - started[1]
    return Outcome((before, task.accuracy(model, seed)), processor, clock)


@torch.no_grad()
def greedy_accuracy(model: Any, prompts: torch.Tensor, answers: torch.Tensor) -> float:
    """Share of prompts `[B, P]` whose greedy completion is the answer `[B, A]`."""
    ids = prompts
    for _ in range(answers.shape[1]):
        following = model.eval()(ids).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], 1)
    return float((ids[:, prompts.shape[1] :] == answers).all(1).double().mean())  # 171 of 180 are 0.95
