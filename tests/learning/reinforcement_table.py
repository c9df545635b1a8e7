"""Reinforcement learning on small tasks, several seeds each: rewrites its tables in docs/results.md.

Names of experiments as arguments rewrite their lines alone; a line is written as soon as it is known. The tests beside this
file assert the same levels.
"""

import statistics
import sys
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent))
import additions
import guessing
import learning_table
import reinforced_sums
from reinforcement import Experiment, Outcome, run

TABLES = {  # by their markers in docs/results.md
    "reinforcement": reinforced_sums.EXPERIMENTS,
    "reinforcement of additions": additions.EXPERIMENTS,
    "reinforcement by an environment": guessing.EXPERIMENTS,
}
EXPERIMENTS: dict[str, Experiment] = {}
for experiments in TABLES.values():
    EXPERIMENTS |= experiments
HEAD = ["algorithm", "seeds", "accuracy before", "accuracy", "expected", "reached", "processor time", "on the clock"]


def line(name: str, outcomes: list[Outcome]) -> str:
    """The table's line of one experiment: medians over the seeds, with lowest and highest where training ended."""
    low, high = EXPERIMENTS[name].accuracy
    before = statistics.median(outcome.accuracy[0] for outcome in outcomes)
    after = [outcome.accuracy[1] for outcome in outcomes]
    processor = statistics.median(outcome.processor for outcome in outcomes)
    clock = statistics.median(outcome.clock for outcome in outcomes)
    reached = "yes" if all(low <= value <= high for value in after) else "NO"
    found = f"{statistics.median(after):.1%}"
    if len(after) > 1:
        found += f" ({min(after):.1%} to {max(after):.1%})"
    expected = f"{low:.0%} to {high:.0%}"
    times = f"{processor:.0f} s", f"{clock:.0f} s"
    cells = [name, str(len(outcomes)), f"{before:.1%}", found, expected, reached, *times]
    return "| " + " | ".join(cells) + " |"


def rewrite(table: str, name: str, outcomes: list[Outcome]) -> None:
    """Write the line of one experiment of a table."""
    markers = f"<!-- {table}: begin -->", f"<!-- {table}: end -->"
    new = line(name, outcomes)
    print(new, flush=True)
    known = {row.split(" | ")[0].strip("| "): row for row in learning_table.table_of(markers)}
    known[name] = new
    rows = ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    rows += [known[name] for name in TABLES[table] if name in known]
    learning_table.write(rows, markers)


def main() -> None:
    """Run what is named, or everything."""
    torch.set_num_threads(1)
    disable_progress_bar()  # of saving weights
    wanted = sys.argv[1:] or EXPERIMENTS
    for table, experiments in TABLES.items():
        for name in experiments:
            if name in wanted:
                outcomes = [run(experiments[name], seed) for seed in experiments[name].seeds]
                rewrite(table, name, outcomes)


if __name__ == "__main__":
    main()
