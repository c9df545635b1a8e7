"""Kills a run that learns from its own completions: `python rollout_lives.py FOLDER KILLS [--ranks] [--episodes]`.

It prints what happened as JSON.

A life is aimed at a moment of a phase (generating, rewarding, scoring, updating, syncing), or at one of its file operations
(of rollouts, of checkpoints). Every run that got to its end is compared with one that was left alone, bit for bit: weights,
optimizer, metrics, and the rollouts. `--ranks` lets each life have another number of processes, and looks at which rows
every step has learned from. `--episodes` adds one kill of a run with an environment, see policy_lives.py.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from aimed import Killer
from safetensors.torch import load_file
from victim import flat, fork_life

from llm_trainer.checkpoint import CheckpointManager
from llm_trainer.data.rollouts import Rollout
from llm_trainer.engine import dist
from machine import free_port
from writers import BigramTrainer, make_trainer

# How often a phase, or an operation, may have come before the kill.
PHASES = {"generating": 20, "rewarding": 9, "scoring": 3, "updating": 14, "syncing": 3}
FILES = {"rollouts": (r"rollouts/.*", 60), "saving": (r"(checkpoint-\d+\.partial-|\.).*", 120)}
AIMS = (*PHASES, *FILES)
OPTIONS = {"passes": 2, "rows_per_update": 4, "prompts_per_part": 1, "keep_rollouts": True}


class Aimed(BigramTrainer):
    """Kills itself when a phase comes for the n-th time.

    Attributes:
        phase: whose moments count.
        left: until the one that kills.
        slow_s: seconds that every completion takes.
        rows: `(rollout, row)` that the step under way has learned from.
    """

    phase, left, slow_s = "", 0, 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.rows: list[tuple[int, int]] = []
        super().__init__(*args, **kwargs)

    def passes(self, phase: str) -> None:
        if phase == "generating" and self.slow_s:
            time.sleep(self.slow_s)
        if phase == self.phase:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.run._metrics._recording:  # it is no filler
            self.rows += [(self.run.progress.rollout, row) for row in batch["row_index"].tolist()]
        return super()._prepare_batch(batch)

    def _end_step(self, sum_over_ranks: Any) -> None:
        """Leave behind which rows the step learns from, on all ranks."""
        rows = [pair for of_rank in dist.gather_objects(self.rows) for pair in of_rank]
        self.rows = []
        if dist.is_main():
            folder = self.run.save_dir / "rows"
            folder.mkdir(exist_ok=True)
            (folder / f"{self.run.progress.step:03d}.json").write_text(json.dumps(sorted(rows)))


class Noisy(Aimed):
    """With rewards that are not the same twice."""

    noisy_reward = True


def trainer(folder: Path, kind: type[Aimed] = Aimed, **options: Any) -> Aimed:
    """A run of 6 rollouts and 24 steps that saves every third one, on as many processes as there are."""
    given: dict[str, Any] = {
        "grad_accum_steps": 2 // dist.world_size(),
        "save_interval_steps": 3,
        "source_options": OPTIONS,
    }
    return make_trainer(folder, kind=kind, **(given | options))


def start(folder: Path, aim: str, count: int, **options: Any) -> int:
    """Fork a life that trains in `folder` until its end, or until the moment that is aimed at."""

    def live() -> None:
        if aim in FILES:
            sys.addaudithook(Killer(folder, FILES[aim][0], count, 0.0))
        made = trainer(folder, **options)
        if aim in PHASES:
            made.phase, made.left = aim, count
        made.train()

    return fork_life(folder, live)


def start_ranks(folder: Path, ranks: int, live: Callable[[int], object]) -> list[int]:
    """Fork `ranks` processes of one run."""
    port, children = free_port(), []
    for rank in range(ranks):

        def play(rank: int = rank) -> None:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_PORT": str(port)})
            dist.start(torch.device("cpu"), 60)
            live(rank)
            dist.stop()

        children.append(fork_life(folder, play))
    return children


def codes_of(children: list[int]) -> list[int]:
    """Exit codes, below 0 of who was killed."""
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def rollouts_of(folder: Path) -> dict[str, str]:
    """A hash of all columns of every rollout, by its name."""
    found = {}
    for path in sorted((folder / "rollouts").glob("[0-9]" * 8)):
        content = hashlib.sha256()
        for file in sorted(path.glob("*.npy")):
            content.update(file.name.encode() + file.read_bytes())
        found[path.name] = content.hexdigest()
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of the newest checkpoint."""
    newest = CheckpointManager(folder).latest()
    return load_file(newest / "model" / "model.safetensors")


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on when it was killed."""
    loaded = CheckpointManager(folder).load()
    left_alone = ("train_seconds", "lines")
    progress = {name: value for name, value in loaded.state["progress"].items() if name not in left_alone}
    lines = []
    for line in (folder / "log" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "choices" not in values:
            lines.append({name: value for name, value in values.items() if "second" not in name and name != "time"})
    return {
        "weights": {name: value.tolist() for name, value in weights_of(folder).items()},
        "state": flat({"optimizer": loaded.state["optimizer"], "progress": progress}),
        "metrics": lines,
        "rollouts": rollouts_of(folder),
        "rows": {path.name: path.read_text() for path in sorted((folder / "rows").iterdir())},
    }


def learned_twice_or_never(folder: Path) -> list[str]:
    """Which rollouts' rows have not been learned from as often as there are passes."""
    counts: Counter[tuple[int, int]] = Counter()
    for path in (folder / "rows").iterdir():
        counts.update(tuple(pair) for pair in json.loads(path.read_text()))
    wrong = []
    for path in sorted((folder / "rollouts").glob("[0-9]" * 8)):
        rollout = Rollout(path)
        expected = [OPTIONS["passes"]] * len(rollout.used)
        found = [counts[int(path.name), int(row)] for row in rollout.used]
        if found != expected or rollout.ledger["sampled"] != rollout.ledger["trained"]:
            wrong.append(f"{path.name}: {found}")
    return wrong


def kill_in_turns(
    folder: Path,
    kills: int,
    chance: random.Random,
    start: Callable[[Path, str, int], int],
    outcome: Callable[[Path], dict[str, Any]],
    phases: Mapping[str, int],
    also: Callable[[Path], list[str]] = lambda run: [],
    is_exact: Callable[[Path], bool] = lambda run: True,
) -> dict[str, Any]:
    """Kill `kills` lives at each aim, in turns, and compare every run that has ended with one that was left alone.

    Args:
        start: forks a life in a folder that is aimed at a moment; '': at none.
        outcome: what of a finished run must be that of the one that was left alone.
        phases: how often each may have come before the kill.
        also: what else is wrong with a run that has ended.
        is_exact: whether a run has to end as the one that was left alone did.
    """
    assert codes_of([start(folder / "whole", "", 0)]) == [0], (folder / "whole.out").read_text()[-3000:]
    whole, killed, different, runs, exact = outcome(folder / "whole"), Counter[str](), list[str](), 0, 0
    aims = (*phases, *FILES) * kills
    while aims:
        run, finished = folder / f"run-{runs}", False
        runs += 1
        while not finished:
            aim = aims[0] if aims else ""
            most = phases.get(aim) or FILES.get(aim, ("", 1))[1]
            (code,) = codes_of([start(run, aim, chance.randint(1, most))])
            assert code in (0, -signal.SIGKILL), (folder / f"{run.name}.out").read_text()[-3000:]
            finished = code == 0
            if not finished:
                killed[aim] += 1
                aims = aims[1:]
        if is_exact(run):
            result, exact = outcome(run), exact + 1
            different += [f"{run.name}: {name}" for name in whole if result[name] != whole[name]]
        different += also(run)
    return {"kills": killed, "runs": runs, "exact": exact, "different": different, "steps": len(whole["metrics"])}


def left_or_learned_wrong(run: Path) -> list[str]:
    """What a finished run has left of rollouts under way, and rows that it has not learned from as often as it should."""
    left = [path.name for path in (run / "rollouts").iterdir() if not path.name.isdigit()]
    return [f"{run.name}: {name} is left" for name in left] + learned_twice_or_never(run)


def kill_with_another_number_of_ranks(
    folder: Path, kills: int, chance: random.Random, kind: type[Aimed] = Aimed
) -> dict[str, Any]:
    """Kill a rank of 2 -> 1 -> 2 -> ...: every row is learned from as often as was said."""
    killed, lives, wrong = 0, 0, list[str]()
    while killed < kills:
        run = folder / f"run-{lives}"
        finished = False
        while not finished:
            ranks, victim = 2 - lives % 2, chance.randrange(2)
            lives += 1
            aim = chance.choice(list(PHASES)) if killed < kills else ""
            count = chance.randint(1, PHASES.get(aim, 1))

            def live(rank: int, run: Path = run, victim: int = victim, aim: str = aim, count: int = count) -> None:
                made = trainer(run, kind)
                if rank == victim % dist.world_size():
                    made.phase, made.left = aim, count
                made.train()

            codes = codes_of(start_ranks(run, ranks, live))
            finished = codes == [0] * ranks
            killed += -signal.SIGKILL in codes
            assert finished or -signal.SIGKILL in codes, Path(f"{run}.out").read_text()[-3000:]
        steps = len(list((run / "rows").iterdir()))
        wrong += learned_twice_or_never(run) + [f"{run.name}: {steps} steps"] * (steps != 24)
    return {"kills": killed, "lives": lives, "wrong": wrong}


def noisy_rewards(folder: Path, kills: int, chance: random.Random) -> dict[str, Any]:
    """Kill a run whose rewards are random; another that is given its rollouts samples nothing and ends in the same bits."""
    for kill in range(kills + 1):
        aim = chance.choice(AIMS) if kill < kills else ""
        most = PHASES.get(aim) or FILES.get(aim, ("", 1))[1]
        (code,) = codes_of([start(folder / "killed", aim, chance.randint(1, most), kind=Noisy)])
        assert code in (0, -signal.SIGKILL), (folder / "killed.out").read_text()[-3000:]
    given = {key: value for key, value in OPTIONS.items() if key != "keep_rollouts"}
    made = trainer(
        folder / "given", kind=Noisy, source_options={**given, "rollouts": str(folder / "killed" / "rollouts")}
    )
    made.train()
    results = [outcome(folder / name) for name in ("killed", "given")]
    different = [name for name in ("weights", "metrics", "rows") if results[0][name] != results[1][name]]
    return {"different": different, "sampled": len(made.maker.begun), "rollouts": len(results[0]["rollouts"])}


def two_ranks(folder: Path) -> dict[str, Any]:
    """Two ranks sample what one does, token for token; a signal to one of them, while it samples, stops both at once."""
    codes_of([start(folder / "one", "", 0, max_steps=4)])
    codes = codes_of(start_ranks(folder / "two", 2, lambda rank: trainer(folder / "two", max_steps=4).train()))
    one, two = (Rollout(folder / name / "rollouts" / "00000000") for name in ("one", "two"))
    same = all(np.array_equal(one.store[name].values, two.store[name].values) for name in one.store.columns)
    ends = [weights_of(folder / name)["table.weight"] for name in ("one", "two")]
    difference = float((ends[0] - ends[1]).abs().max())

    def slowly(rank: int) -> None:
        made = trainer(folder / "stopped")
        made.slow_s = 0.0 if rank == 0 else 0.3  # rank 0 waits for it
        made.train()

    children = start_ranks(folder / "stopped", 2, slowly)
    part = folder / "stopped" / "rollouts" / "00000000.building" / "parts" / "part-000001.npz"  # the first of rank 1
    while not part.exists():
        time.sleep(0.01)
    began = time.monotonic()
    os.kill(children[1], signal.SIGTERM)
    stopped = codes_of(children)
    seconds = time.monotonic() - began
    parts = len(list(part.parent.glob("part-*.npz")))
    return {
        "codes": codes,
        "same": same,
        "difference": difference,
        "stopped": stopped,
        "seconds": seconds,
        "parts": parts,
    }


def main(folder: Path, kills: int, options: list[str]) -> None:
    """Everything, as JSON."""
    torch.set_num_threads(1)
    import torch.distributed.checkpoint as _  # noqa: F401

    trainer(folder / "unused")  # what is imported now is not imported in every life
    began, chance = time.monotonic(), random.Random(11)
    report = kill_in_turns(folder, kills, chance, start, outcome, PHASES, left_or_learned_wrong)
    report["two_ranks"] = two_ranks(folder)
    if "--episodes" in options:
        from policy_lives import killed_in_an_episode_and_on_two_ranks  # which imports this file

        report["episodes"] = killed_in_an_episode_and_on_two_ranks(folder / "episodes")
    if "--ranks" in options:
        report["ranks"] = kill_with_another_number_of_ranks(folder / "elastic", 3 * kills, chance)
        report["noisy"] = noisy_rewards(folder, 2 * kills, chance)
    report["seconds"] = round(time.monotonic() - began, 1)
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
