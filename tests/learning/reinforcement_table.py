"""Reinforcement learning on sums that carry by chance at first, several seeds each: rewrites its table in docs/results.md.

Names of algorithms as arguments rewrite their lines alone.

A completion is rewarded with 1 if it is the right sum. Held-out prompts are answered greedily. In the controls the reward
is turned around, or dealt out among the completions at random. The table stands between two markers; the tests beside
this file assert the same levels.
"""

import contextlib
import io
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent))
import learning_table
import sums

from llm_trainer import GRPOTrainer

MARKERS = "<!-- reinforcement: begin -->", "<!-- reinforcement: end -->"
SEEDS = learning_table.SEEDS
STEPS, PROMPTS, GROUP = 70, 64, 8  # rollouts, prompts of each, completions per prompt
UPDATES = 4  # of each rollout, so that ratios are not 1 and clipping is at work
ANSWER = 2  # tokens

Ids = Sequence[Sequence[int]]


def is_right(prompts: Ids, completions: Ids, **_: Any) -> list[float]:
    """1 for a right sum, else 0."""
    return [
        float(list(completion) == sums.answer(prompt)) for prompt, completion in zip(prompts, completions, strict=True)
    ]


def is_wrong(prompts: Ids, completions: Ids, **_: Any) -> list[float]:
    """The control whose reward has its sign turned."""
    return [1 - reward for reward in is_right(prompts, completions)]


def dealt_out(prompts: Ids, completions: Ids, **_: Any) -> list[float]:
    """The control whose rewards are shuffled among the completions."""
    rewards = is_right(prompts, completions)
    random.Random(repr(completions)).shuffle(rewards)
    return rewards


@dataclass(frozen=True)
class Experiment:
    """One line of the table.

    Attributes:
        trainer: the algorithm.
        options: of the trainer.
        reward: of a completion.
        lr: learning rate.
        accuracy: held-out accuracies that are expected, (lowest, highest).
    """

    trainer: Any = GRPOTrainer
    options: dict[str, Any] = field(default_factory=dict)
    reward: Callable[..., list[float]] = is_right
    lr: float = 1e-3
    accuracy: tuple[float, float] = (0.95, 1.0)


def of_groups(**options: Any) -> dict[str, Any]:
    """Options of a trainer that compares completions of one prompt."""
    return {"num_samples_per_prompt": GROUP, "rows_per_update": PROMPTS * GROUP // UPDATES, **options}


EXPERIMENTS = {
    "GRPO": Experiment(options=of_groups()),
    "Dr. GRPO": Experiment(options=of_groups(loss_type="dr_grpo")),
    "DAPO": Experiment(options=of_groups(loss_type="dapo")),
    "CISPO": Experiment(options=of_groups(loss_type="cispo")),
    "GSPO": Experiment(options=of_groups(loss_type="gspo")),
    "RLOO": Experiment(options=of_groups(advantage="rloo")),
    "REINFORCE++": Experiment(options=of_groups(advantage="reinforce++")),
    "GRPO, reward's sign turned (control)": Experiment(options=of_groups(), reward=is_wrong, accuracy=(0.0, 0.05)),
    "GRPO, rewards shuffled (control)": Experiment(options=of_groups(), reward=dealt_out, accuracy=(0.2, 0.8)),
}


@dataclass(frozen=True)
class Outcome:
    """Held-out accuracy, before and after; the time of the training between."""

    accuracy: tuple[float, float]
    seconds: float


def run(name: str, seed: int) -> Outcome:
    """Train one algorithm on the base of `seed`."""
    experiment, model = EXPERIMENTS[name], deepcopy(learning_table.base(seed))
    train, held_out = sums.prompts(seed)
    torch.manual_seed(seed)
    before = accuracy(model, held_out)
    batches = []
    for _ in range(STEPS):
        numbers = train[torch.randperm(len(train))[:PROMPTS]]
        batches.append({"prompts": sums.rows(numbers, torch.ones(PROMPTS, dtype=torch.bool))[:, : sums.PROMPT]})
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = experiment.options | {"seed": seed, "save_dir": folder, "save_interval": 0, "stop_token_ids": ()}
        options |= {"reward_func": experiment.reward, "gen_max_seq_len": ANSWER}
        sums.one_pass(experiment.trainer, model, batches, experiment.lr, **options).train()
    return Outcome((before, accuracy(model, held_out)), time.perf_counter() - started)


@torch.no_grad()
def accuracy(model: Any, numbers: torch.Tensor) -> float:
    """Share of prompts `numbers [B]` whose greedy answer is the right sum."""
    right = sums.rows(numbers, torch.ones(len(numbers), dtype=torch.bool))
    ids = right[:, : sums.PROMPT]
    for _ in range(ANSWER):
        following = model.eval()(ids).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], 1)
    return float((ids == right).all(1).double().mean())  # 171 of 180 are 0.95


def line(name: str) -> str:
    """The table's line of one algorithm: medians over the seeds, with lowest and highest where training ended."""
    outcomes, (low, high) = [run(name, seed) for seed in SEEDS], EXPERIMENTS[name].accuracy
    before = statistics.median(outcome.accuracy[0] for outcome in outcomes)
    after = [outcome.accuracy[1] for outcome in outcomes]
    seconds = statistics.median(outcome.seconds for outcome in outcomes)
    reached = "yes" if all(low <= value <= high for value in after) else "NO"
    found = f"{statistics.median(after):.1%} ({min(after):.1%} to {max(after):.1%})"
    cells = [name, f"{before:.1%}", found, f"{low:.0%} to {high:.0%}", reached, f"{seconds:.0f} s"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run what is named, or everything, and rewrite its lines of the table."""
    torch.set_num_threads(1)
    disable_progress_bar()  # of saving weights
    known = {row.split(" | ")[0].strip("| "): row for row in learning_table.table_of(MARKERS)}
    for name in sys.argv[1:] or EXPERIMENTS:
        known[name] = line(name)
        print(known[name], flush=True)
    head = ["algorithm", "accuracy before", "accuracy", "expected", "reached", "time"]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    table += [known[name] for name in EXPERIMENTS if name in known]
    learning_table.write(table, MARKERS)


if __name__ == "__main__":
    main()
