"""A policy that writes tokens without attention, what samples from it without a model's help, and a trainer of it.

Fakes for what is about rollouts and not about sampling: a completion is a function of (weights, seed, prompt, sample).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.data.rollout_ahead import Ahead
from llm_trainer.data.rollout_prompts import PromptSource
from llm_trainer.data.rollout_source import RolloutSource
from llm_trainer.data.rollout_supply import RolloutSupply
from llm_trainer.data.rollouts import Finished, Plan, Prompt, Rollout, as_json
from llm_trainer.trainers.base import BaseTrainer

VOCABULARY, LONGEST = 13, 6


class Bigrams(nn.Module):
    """Logits of the next token from the token before it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """`[B, T, V]` logits of ids `[B, T]`."""
        return self.table(ids)


class FakeMaker:
    """Samples from `Bigrams`, rewards even tokens; counts what it was asked.

    Attributes:
        begun: rollouts for which weights were brought.
        made: (rollout, first prompt, last prompt) of every part.
    """

    samples = 2
    updates_in_flight = False

    def __init__(self, trainer: "BigramTrainer") -> None:
        self.trainer = trainer
        self.begun: list[int] = []
        self.made: list[tuple[int, int, int]] = []
        self.noise = np.random.default_rng()  # of a reward that is not the same twice

    def settings(self, training: bool) -> Mapping[str, Any]:
        return {"samples": self.samples, "temperature": self.trainer.temperature}

    def begin(self, plan: Plan) -> None:
        self.begun.append(plan.number)
        self.trainer.passes("syncing")
        self.table = self.trainer.base_model.table.weight.detach().double().numpy().copy()

    def make(self, plan: Plan, prompts: Sequence[Prompt]) -> list[dict[str, np.ndarray]] | None:
        rows = []
        for prompt in prompts:
            for sample in range(self.samples):
                if plan.stop():
                    return None
                self.trainer.passes("generating")
                row = self._row(plan, prompt, sample)
                self.trainer.spoil(plan.number, row, sample)
                rows.append(row)
        self.trainer.passes("rewarding")
        self.made.append((plan.number, prompts[0].number, prompts[-1].number))
        return rows

    def _row(self, plan: Plan, prompt: Prompt, sample: int) -> dict[str, np.ndarray]:
        noise = np.random.default_rng([plan.seed, prompt.number, sample])
        ids, logprobs = list(prompt.ids), [0.0] * len(prompt.ids)
        for _ in range(LONGEST):
            scores = self.table[ids[-1]] / self.trainer.temperature
            chances = np.exp(scores - scores.max())
            chances /= chances.sum()
            ids.append(int(noise.choice(VOCABULARY, p=chances)))
            logprobs.append(float(np.log(chances[ids[-1]])))
            if ids[-1] == 0:
                break
        reward = sum(token % 2 == 0 for token in ids[len(prompt.ids) :]) / LONGEST
        if self.trainer.noisy_reward:
            reward += float(self.noise.normal())
        trained = np.arange(len(ids)) >= len(prompt.ids)
        return {
            "input_ids": np.array(ids),
            "trained": trained,
            "group": np.array([prompt.number]),
            "sampled_logprobs": np.array(logprobs),
            "versions": np.array([len(prompt.ids), plan.version]),
            "finish": np.array([0 if ids[-1] == 0 else 1]),
            "rewards": np.array([reward]),
            "facts": as_json({"answer": prompt.answer, "columns": prompt.columns}),
        }

    def finish(self, rollout: Rollout) -> Finished:
        self.trainer.passes("scoring")
        rewards, groups = rollout.column("rewards")[:, 0], rollout.column("group")
        advantages = []
        for row in range(len(rollout)):
            mean = rewards[groups == groups[row]].mean()
            ones = np.ones(rollout.lengths[row], dtype=np.float32)
            advantages.append(ones * np.float32(rewards[row] - mean))
        masked = {"cut": (rollout.column("finish") == 1) & self.trainer.masks_cut}
        return Finished({"advantages": advantages}, masked=masked)

    def metrics(self, rollout: Rollout) -> Mapping[str, tuple[float, float]]:
        rewards = rollout.column("rewards")[:, 0]
        return {"reward": (float(rewards.sum()), len(rewards)), "length": (float(rollout.lengths.sum()), len(rewards))}


class BigramTrainer(BaseTrainer):
    """REINFORCE with a group's mean as baseline, on `Bigrams`."""

    takes_flat = True
    best_metric: ClassVar[str] = "eval_reward"
    best_is_highest: ClassVar[bool] = True
    temperature, noisy_reward, masks_cut = 1.0, False, False
    max_staleness = 0  # above 0: each rollout is made while the one before is learned from

    def __init__(self, *args: Any, source_options: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.source_options = source_options or {}
        self.maker = FakeMaker(self)
        self.ahead = Ahead(self.max_staleness) if self.max_staleness else None
        super().__init__(*args, **kwargs)

    def passes(self, phase: str) -> None:
        """Called at moments of each phase, for tests that kill or signal there."""

    def spoil(self, number: int, row: dict[str, np.ndarray], sample: int) -> None:
        """Called with every completion, for tests that change it."""

    def _build_source(self, source: Any, training: bool) -> RolloutSource:
        options = dict(self.source_options) if training else {}
        cuts = {name: options.pop(name) for name in ("passes", "rows_per_update", "batch_size") if name in options}
        given: dict[str, Any] = {"training": training, "samples": self.maker.samples, "ahead": self.ahead}
        prompts = PromptSource(source, self.machine)
        return RolloutSource(RolloutSupply(prompts, self.maker, self.machine, **given, **options), **cuts)

    def _prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def _forward(self, batch: dict[str, Any]) -> Tensor:
        self.passes("updating")
        return self.model(batch["input_ids"])

    def _loss_weight(self, batch: dict[str, Any]) -> float:
        return float((batch["labels"] != -100).sum())

    def _compute_loss(self, outputs: Tensor, batch: dict[str, Any]) -> Tensor:
        labels = batch["labels"][:, 1:]
        logprobs = outputs[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        losses = -(logprobs * batch["advantages"][:, 1:] * (labels != -100))
        return losses.sum() / (labels != -100).sum().clamp(min=1)


def prompts(count: int) -> list[dict[str, Any]]:
    """Batches of 2 prompts, padded on the left, with an answer each."""
    noise = np.random.default_rng(3)
    batches = []
    for first in range(0, count, 2):
        ids, mask = np.zeros((2, 3), dtype=np.int64), np.zeros((2, 3), dtype=np.int64)
        for row in range(2):
            length = noise.integers(1, 4)
            ids[row, 3 - length :], mask[row, 3 - length :] = noise.integers(1, VOCABULARY, length), 1
        answers = [f"answer {first}", f"answer {first + 1}"]
        batches.append({"prompts": torch.tensor(ids), "prompt_attention_mask": torch.tensor(mask), "answers": answers})
    return batches


def make_trainer(folder: Path, batches: Any = None, **options: Any) -> BigramTrainer:
    """A run of 3 rollouts per epoch, of 4 prompts each, with 2 passes of 2 updates."""
    model = Bigrams()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    given: dict[str, Any] = {
        "max_epochs": 2,
        "grad_accum_steps": 2,
        "log_interval": 1,
        "device": "cpu",
        "use_amp": False,
        "compile": False,
        "progress": False,
        "best_file": False,
        "resume": "auto",
        "source_options": {"passes": 2, "rows_per_update": 4},
        "save_dir": str(folder),
    }
    kind = options.pop("kind", BigramTrainer)
    return kind(model, optimizer, prompts(12) if batches is None else batches, **(given | options))


def lines(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl of a run holds but times."""
    found = []
    for line in (folder / "log" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "choices" not in values:  # every life says them
            found.append({name: value for name, value in values.items() if "second" not in name and name != "time"})
    return found


def weights(trainer: BigramTrainer) -> torch.Tensor:
    """A copy of them."""
    return trainer.base_model.table.weight.detach().clone()  # type: ignore[union-attr, operator]
