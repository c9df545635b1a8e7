"""Kills a run whose rollouts are made ahead: `python ahead_lives.py FOLDER KILLS` prints what happened.

As rollout_lives.py. A run that has said that it is not bit-identical any more, since parts under way were lost whose weights
are gone, must still learn from every row as often as was said; any other one ends as the one that was left alone.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from rollout_lives import (
    PHASES,
    Aimed,
    codes_of,
    kill_in_turns,
    kill_with_another_number_of_ranks,
    left_or_learned_wrong,
    outcome,
    start,
    start_ranks,
    trainer,
)

from llm_trainer.data.rollouts import Rollout
from llm_trainer.engine import dist

SAID = "not bit-identical"


class AimedAhead(Aimed):
    """Makes each rollout while the last two of the four updates on the one before are taken, and takes its time for both."""

    max_staleness = 2
    learning_s, making_s = 0.004, 0.002

    def passes(self, phase: str) -> None:
        seconds = {"updating": self.learning_s, "generating": self.making_s}.get(phase, 0.0)
        time.sleep(seconds)  # one is killed while the other is under way
        super().passes(phase)


def said(run: Path) -> bool:
    """Whether a life of a run has said that it is not bit-identical any more."""
    return SAID in Path(f"{run}.out").read_text()


def wrong_versions(run: Path) -> list[str]:
    """Rollouts with rows that are older than they may be, or that say what was not so: more than one version, unsaid."""
    wrong = []
    for path in sorted((run / "rollouts").glob("[0-9]" * 8)):
        rollout = Rollout(path)
        step = rollout.store.meta["made_of"]["step"]
        versions = {int(rollout.store["versions"][row][1]) for row in range(len(rollout))}
        is_mixed = len(versions) > 1
        if not versions <= set(range(step - AimedAhead.max_staleness, step + 1)) or (is_mixed and not said(run)):
            wrong.append(f"{path}: made by {sorted(versions)}, learned from at {step}")
    return wrong


def everything_wrong(run: Path) -> list[str]:
    """What must not be, whatever was killed."""
    return left_or_learned_wrong(run) + wrong_versions(run)


class Signalled(AimedAhead):
    """On rank 1 the thread is slow, and says when it has begun."""

    begun: Path

    def passes(self, phase: str) -> None:
        if phase == "generating" and threading.current_thread() is not threading.main_thread() and dist.rank() == 1:
            self.begun.touch()
            time.sleep(0.3)
        super().passes(phase)


class Failing(AimedAhead):
    """On rank 1 the thread fails."""

    def passes(self, phase: str) -> None:
        if phase == "rewarding" and threading.current_thread() is not threading.main_thread() and dist.rank() == 1:
            raise ValueError("the judge is out of its mind")
        super().passes(phase)


def two_ranks(folder: Path) -> dict[str, Any]:
    """Two ranks sample what one does; a signal to one ends both at once; an error in the thread of one ends both, named."""
    codes_of([start(folder / "one", "", 0, kind=AimedAhead, max_steps=9)])
    codes = codes_of(
        start_ranks(folder / "two", 2, lambda rank: trainer(folder / "two", AimedAhead, max_steps=9).train())
    )
    same = []
    for number in range(2):  # weights differ in the last bits from then on: sums over ranks have another order
        one, two = (Rollout(folder / name / "rollouts" / f"{number:08d}") for name in ("one", "two"))
        same.append(np.array_equal(one.store["input_ids"].values, two.store["input_ids"].values))
        same.append(np.array_equal(one.store["versions"].values, two.store["versions"].values))

    def slowly(rank: int) -> None:
        made = trainer(folder / "stopped", Signalled)
        made.begun = folder / "begun"
        made.train()

    children = start_ranks(folder / "stopped", 2, slowly)
    while not (folder / "begun").exists():
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(children[1], signal.SIGTERM)
    stopped, seconds = codes_of(children), time.monotonic() - began
    failed = codes_of(start_ranks(folder / "failed", 2, lambda rank: trainer(folder / "failed", Failing).train()))
    named = Path(f"{folder / 'failed'}.out").read_text()
    return {
        "codes": codes,
        "same": all(same),
        "stopped": stopped,
        "seconds": seconds,
        "failed": failed,
        "named": [
            "ValueError: the judge is out of its mind" in named,
            "process 1 could not make its part of a rollout: ValueError: the judge is out of its mind" in named,
        ],
    }


def main(folder: Path, kills: int) -> None:
    """Everything, as JSON."""
    torch.set_num_threads(1)
    import torch.distributed.checkpoint as _  # noqa: F401

    trainer(folder / "unused")  # what is imported now is not imported in every life
    began, chance = time.monotonic(), random.Random(12)
    report: dict[str, Any] = {"two_ranks": two_ranks(folder)}
    if kills:
        begin = partial(start, kind=AimedAhead)
        report |= kill_in_turns(
            folder, kills, chance, begin, outcome, PHASES, everything_wrong, is_exact=lambda run: not said(run)
        )
        report["ranks"] = kill_with_another_number_of_ranks(folder / "elastic", 3 * kills, chance, AimedAhead)
    report["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
