"""GRPO on the sums of `reinforced_sums.py`, with completions drawn by a server of vLLM: once in turns, once made ahead.

`python through_vllm.py` starts a server and prints a line for each; see `vllm_process.py` for what it needs.
"""

import contextlib
import io
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import sums
from reinforced_sums import UPDATES, Sums, of_groups
from reinforcement import Outcome, run

from llm_trainer.generation.servers import Servers
from llm_trainer.train.hooks import Hook
from vllm_process import started

SEED = 0
HEADS = 2  # vLLM's attention on CPUs has heads of 32 at least
WAYS: dict[str, dict[str, Any]] = {
    "in turns": {},
    # Each rollout is made during the updates of the one before, and takes every update's weights meanwhile.
    "ahead, weights in flight": {"max_staleness": UPDATES, "lr": 7e-4},
}

# Accuracy that is expected; the second is not the same twice.
LEAST = {"in turns": 0.95, "ahead, weights in flight": 0.85}


class Counted(Servers):
    """Counts how often weights were brought; every time they are verified, or the run ends."""

    loads = 0

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        super().load(weights, version)
        self.loads += 1


@dataclass(frozen=True)
class Learned:
    """A run.

    Attributes:
        outcome: what it has learned, and how long it took.
        loads: how often weights were brought without an alarm.
        differences: of the log-probs of drawn tokens, by the server and by the trainer: the mean of each step that learned
            from what its own weights had drawn, and the largest of a token.
        seconds: of a rollout, by phase, medians.
        staleness: of the weights that completions were begun with, the most.
    """

    outcome: Outcome
    loads: int
    differences: tuple[list[float], float]
    seconds: dict[str, float]
    staleness: float


@cache
def base(seed: int) -> Any:
    """The base model of a seed, made once, in a shape that vLLM knows."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return sums.base_model(seed, folder, num_attention_heads=HEADS)


class Task(Sums):
    """The sums, for that model."""

    base = staticmethod(base)


@contextmanager
def server() -> Iterator[str]:
    """The address of a server that begins with the model that reinforcement begins with."""
    with tempfile.TemporaryDirectory() as folder:
        base(SEED).save_pretrained(folder)
        with started(Path(folder)) as url:
            yield url


def learned(url: str, way: str, rollouts: int = 100) -> Learned:
    """Learn with a server's completions."""
    seen: list[dict[str, float]] = []
    watch = Hook("watch", lambda view: seen.append(dict(view.values)), every_steps=1)
    service = Counted([url])
    experiment = of_groups(
        generation_service=service, hooks=[watch], log_interval=1, rollouts=rollouts, task=Task, **WAYS[way]
    )
    outcome = run(experiment, SEED)
    name = "sampling/sampling_logp_difference"
    fresh = [values for values in seen if values.get("staleness/max", 0) == 0]
    means = [values[f"{name}/mean"] for values in fresh if f"{name}/mean" in values]
    most = max(values[f"{name}/max"] for values in fresh if f"{name}/max" in values)
    seconds = {}
    for phase in ("sync", "generate", "reward", "score", "wait"):
        found = [values[f"seconds/{phase}"] for values in seen if f"seconds/{phase}" in values]
        if found:
            seconds[phase] = statistics.median(found)
    staleness = max(values.get("staleness/max", 0.0) for values in seen)
    return Learned(outcome, service.loads, (means, most), seconds, staleness)


def main() -> None:
    """A line for each way, or for those that are named."""
    torch.set_num_threads(1)
    with server() as url:
        for way in sys.argv[1:] or WAYS:
            found = learned(url, way)
            (before, after), (means, most) = found.outcome.accuracy, found.differences
            print(
                f"GRPO, drawn by vLLM {way}: {before:.1%} -> {after:.1%}, {found.outcome.clock:.0f} s "
                f"({found.outcome.processor:.0f} s of the trainer's processor), {found.loads} syncs, "
                f"log-probs differ by {statistics.median(means):.1e} in the median step, {most:.1e} at most, "
                f"staleness {found.staleness:g}, seconds {found.seconds}",
                flush=True,
            )


if __name__ == "__main__":
    main()
