"""Reinforcement on sums that carry by chance at first: a completion is rewarded with 1 if it is the right sum."""

from typing import Any

import learning_table
import sums
import torch
from reinforcement import Experiment, Ids, dealt_out, greedy_accuracy, turned

from llm_trainer import GRPOTrainer, PPOTrainer
from llm_trainer.trainers.reinforce import ReinforceTrainer, ReMaxTrainer, RLOOTrainer

PROMPTS, GROUP = 128, 4  # of a rollout, and completions per prompt
UPDATES = 4  # of each rollout, so that ratios are not 1 and clipping is at work
PADDED = {"packing": "none"}  # rows of equal length: in fp32 attention over flat ones goes document by document


class Sums:
    """The task: the carry."""

    TOKENS = 2
    base = staticmethod(learning_table.base)

    @staticmethod
    def batch(seed: int, count: int) -> dict[str, Any]:
        """Ids of prompts `[count, 5]`."""
        train, _ = sums.prompts(seed)
        numbers = train[torch.randperm(len(train))[:count]]
        return {"prompts": sums.rows(numbers, torch.ones(count, dtype=torch.bool))[:, : sums.PROMPT]}

    @staticmethod
    def accuracy(model: Any, seed: int) -> float:
        """Of the 180 held-out prompts."""
        _, held_out = sums.prompts(seed)
        right = sums.rows(held_out, torch.ones(len(held_out), dtype=torch.bool))
        return greedy_accuracy(model, right[:, : sums.PROMPT], right[:, sums.PROMPT :])

    @staticmethod
    def is_right(prompts: Ids, completions: Ids, **_: Any) -> list[float]:
        """1 for a right sum, else 0."""
        rewards = []
        for prompt, completion in zip(prompts, completions, strict=True):
            rewards.append(float(list(completion) == sums.answer(prompt)))
        return rewards


def of_groups(trainer: Any = GRPOTrainer, **how: Any) -> Experiment:
    """A trainer that compares completions of one prompt."""
    own = {name: how.pop(name) for name in ("reward", "accuracy", "lr", "rollouts") if name in how}
    task = how.pop("task", Sums)
    options = {"num_samples_per_prompt": GROUP, "rows_per_update": PROMPTS * GROUP // UPDATES, "share_prompts": False}
    return Experiment(task, trainer, options | PADDED | how, prompts=PROMPTS, **own)


def with_critic(rollouts: int = 80, **how: Any) -> Experiment:
    """PPO, two passes over each rollout."""
    options = {
        "completions_per_prompt": GROUP,
        "ppo_batch_size": PROMPTS * GROUP // UPDATES,
        "ppo_epochs": 2,
        "clip_eps": 0.2,
        "kl_beta": 0.0,  # what the base does is not to be kept
    }
    return Experiment(Sums, PPOTrainer, options | PADDED | how, prompts=PROMPTS, rollouts=rollouts, lr=7e-4)


EXPERIMENTS = {
    "GRPO": of_groups(),
    "Dr. GRPO": of_groups(loss_type="dr_grpo"),
    "DAPO": of_groups(loss_type="dapo"),
    "CISPO": of_groups(loss_type="cispo", rollouts=80, lr=7e-4),
    "GSPO": of_groups(loss_type="gspo", rollouts=80),
    "GRPO, asynchronous": of_groups(max_staleness=UPDATES),
    "RLOO": of_groups(RLOOTrainer),
    "ReMax": of_groups(ReMaxTrainer, rollouts=80, lr=7e-4),
    "REINFORCE++": of_groups(ReinforceTrainer, rollouts=80, lr=7e-4),
    "PPO, critic of its own": with_critic(),
    "PPO, critic on the policy's body": with_critic(rollouts=100, critic_on_policy=True, vf_coef=0.1),
    "GRPO, reward's sign turned (control)": of_groups(reward=turned, accuracy=(0.0, 0.05)),
    "GRPO, rewards shuffled (control)": of_groups(reward=dealt_out, accuracy=(0.0, 0.4)),
}
