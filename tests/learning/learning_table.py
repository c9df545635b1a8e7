"""Every algorithm on sums with a known preference, several seeds each: this script rewrites its table in docs/results.md.

The table stands between two markers; the tests beside this file assert the same levels.
"""

import contextlib
import io
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent))
import sums

from llm_trainer import DPOTrainer, KTOTrainer, RewardTrainer
from llm_trainer.models.rewarding import reward_model

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results.md"
MARKERS = "<!-- learning: begin -->", "<!-- learning: end -->"
SEEDS = (0, 1, 2)
STEPS, ROWS = 150, 64


class LiveReference(DPOTrainer):
    """The policy is its own reference, which `DPOTrainer` refuses: every margin looks like 0, so it grows for ever."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reference = self.model


@dataclass(frozen=True)
class Experiment:
    """One line of the table.

    Attributes:
        trainer: the algorithm.
        options: of the trainer.
        batch: numbers of prompts `[B]` -> batch.
        lr: learning rate.
        accuracy: held-out accuracies that are expected, (lowest, highest).
        margin: likewise the mean margins.
    """

    trainer: Any = DPOTrainer
    options: dict[str, Any] = field(default_factory=dict)
    batch: Callable[[torch.Tensor], sums.Batch] = sums.pairs
    lr: float = 1e-3
    accuracy: tuple[float, float] = (0.95, 1.0)
    margin: tuple[float, float] = (1.0, math.inf)

    def accepts(self, accuracy: float, margin: float) -> bool:
        """Whether a run ended where it should."""
        return self.accuracy[0] <= accuracy <= self.accuracy[1] and self.margin[0] <= margin <= self.margin[1]


# IPO regresses the margin per token to 1 / (2 beta) = 5, so to 10 for the two tokens of a sum: with a frozen reference only.
EXPERIMENTS = {
    "DPO": Experiment(),
    "IPO": Experiment(options={"loss_type": "ipo"}, margin=(8.0, 12.0)),
    "SimPO": Experiment(options={"loss_type": "simpo"}),
    "ORPO": Experiment(options={"loss_type": "orpo"}),
    "KTO": Experiment(KTOTrainer, batch=sums.judged),
    "Reward": Experiment(RewardTrainer, lr=2e-3),
    "DPO, pairs swapped (control)": Experiment(
        batch=sums.swapped_pairs, accuracy=(0.0, 0.05), margin=(-math.inf, -1.0)
    ),
    "IPO, reference not frozen (control)": Experiment(
        LiveReference, {"loss_type": "ipo", "starts_at_reference": False}, margin=(15.0, math.inf)
    ),
}


@dataclass(frozen=True)
class Outcome:
    """Held-out accuracy, before and after; the mean margin after; the time of the training between."""

    accuracy: tuple[float, float]
    margin: float
    seconds: float


@cache
def base(seed: int) -> Any:
    """The base model of a seed, made once."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        return sums.base_model(seed, folder)


def run(name: str, seed: int) -> Outcome:
    """Train one algorithm on the base of `seed`."""
    experiment, model = EXPERIMENTS[name], deepcopy(base(seed))
    train, held_out = sums.prompts(seed)
    torch.manual_seed(seed)
    if experiment.trainer is RewardTrainer:
        model = reward_model(model, pad_token_id=0)
    before, _ = judge(model, held_out)
    batches = [experiment.batch(train[torch.randperm(len(train))[:ROWS]]) for _ in range(STEPS)]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        options = experiment.options | {"seed": seed, "save_dir": folder}
        sums.one_pass(experiment.trainer, model, batches, experiment.lr, **options).train()
    seconds = time.perf_counter() - started
    accuracy, margin = judge(model, held_out)
    return Outcome((before, accuracy), margin, seconds)


def judge(model: Any, numbers: torch.Tensor) -> tuple[float, float]:
    """Share of prompts whose right sum is scored above the wrong one, and by how much on average.

    Scores are log-probs, without a reference, or a reward model's rewards.
    """
    right, wrong = (sums.log_probs if model.can_generate() else sums.rewards)(model, numbers)
    return float((right > wrong).float().mean()), float((right - wrong).mean())


def line(name: str) -> str:
    """The table's line of one algorithm: medians over the seeds, with lowest and highest where training ended."""
    outcomes, expected = [run(name, seed) for seed in SEEDS], EXPERIMENTS[name]
    ends = [(o.accuracy[1], o.margin) for o in outcomes]
    cells = [name, f"{statistics.median(o.accuracy[0] for o in outcomes):.1%}"]
    for limits, form, after in zip(
        (expected.accuracy, expected.margin), (".1%", ".1f"), zip(*ends, strict=True), strict=True
    ):
        cells.append(f"{statistics.median(after):{form}} ({min(after):{form}} to {max(after):{form}})")
        cells.append(_limits(*limits, form))
    cells.append("yes" if all(expected.accepts(*end) for end in ends) else "NO")
    return "| " + " | ".join([*cells, f"{statistics.median(o.seconds for o in outcomes):.0f} s"]) + " |"


def _limits(low: float, high: float, form: str) -> str:
    if math.isinf(high) or (form == ".1%" and high == 1.0):
        return f"at least {low:{form}}"
    if math.isinf(low) or (form == ".1%" and low == 0.0):
        return f"at most {high:{form}}"
    return f"{low:{form}} to {high:{form}}"


def main() -> None:
    """Run everything and rewrite the table."""
    torch.set_num_threads(1)
    disable_progress_bar()  # of saving weights
    head = ["algorithm", "accuracy before", "accuracy", "expected", "margin", "expected", "reached", "time"]
    table = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in EXPERIMENTS:
        table.append(line(name))
        print(table[-1], flush=True)
    write(table, MARKERS)


def table_of(markers: tuple[str, str]) -> list[str]:
    """The lines of a table, head and all, that stand between its two markers in docs/results.md."""
    text = RESULTS.read_text(encoding="utf-8")
    begin, end = text.index(markers[0]) + len(markers[0]), text.index(markers[1])
    return text[begin:end].strip().splitlines()


def write(table: list[str], markers: tuple[str, str]) -> None:
    """Put the lines of a table between its two markers in docs/results.md."""
    text = RESULTS.read_text(encoding="utf-8")
    begin, end = text.index(markers[0]) + len(markers[0]), text.index(markers[1])
    RESULTS.write_text(text[:begin] + "\n" + "\n".join(table) + "\n" + text[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
