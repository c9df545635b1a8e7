"""Ranks that die, without a launcher that would notice. Started by test_lost_rank.py."""

import json
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))
from layouts import make_trainer
from ranks import fork_ranks, import_once

from llm_trainer.engine import dist, watch
from llm_trainer.train.hooks import Hook

FINAL = 20  # steps of a whole run


def train(folder: Path, die: tuple[int, int] | None = None, **options: Any) -> None:
    """A run in which rank `die[0]` kills itself somewhere in the step after `die[1]`; checkpoints every two steps."""

    def maybe(run: Any) -> None:
        if die == (dist.rank(), run.progress.step):
            moment = random.Random(die[1]).random() * 0.05
            signal.setitimer(signal.ITIMER_REAL, moment + 1e-3)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))

    hooks = [Hook("die", maybe, every_steps=1)]
    steps = {"save_interval_steps": 2, "eval_interval": 1000, "checkpoints_to_keep": 1, "best_file": False}
    make_trainer(folder, FINAL, hooks=hooks, **steps, **options).train()


def stuck(folder: Path) -> None:
    """Rank 1 dies while rank 0 waits for it in something that does not notice, as a collective on a GPU would."""
    watch.GRACE_S = 1.0

    def wait(run: Any) -> None:
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(100)

    make_trainer(folder, FINAL, hooks=[Hook("wait", wait, every_steps=1)]).train()


def fails(folder: Path) -> None:
    """Rank 1 raises; the others learn it at once, whatever they are doing."""

    def fail(run: Any) -> None:
        if dist.rank() == 1:
            raise ValueError("rank 1 has had enough")
        time.sleep(100)

    watch.GRACE_S = 1.0
    make_trainer(folder, FINAL, hooks=[Hook("fail", fail, every_steps=1)]).train()


def newest(folder: Path) -> dict[str, str]:
    """Hashes of the files of the newest checkpoint that are the same in every run: weights and optimizer."""
    manifest = json.loads((sorted(folder.glob("checkpoint-*"))[-1] / "manifest.json").read_text())
    files = {name: file["sha256"] for name, file in manifest["files"].items()}
    return {name: files[name] for name in files if name.endswith((".safetensors", ".distcp"))}


def kills(folder: Path, number: int) -> list[dict[str, Any]]:
    """Kill a rank at a random moment, `number` times, and go on; compared with runs that nothing happened to."""
    noise, report = random.Random(0), []
    layouts: list[dict[str, Any]] = [{}, {"engine": "fsdp"}]
    whole = []
    for i, options in enumerate(layouts):
        assert fork_ranks(partial(train, **options), folder / f"whole-{i}", 2)["codes"] == [0, 0]
        whole.append(newest(folder / f"whole-{i}"))
    for trial in range(number):
        kind, rank, step = trial % len(layouts), noise.randrange(2), noise.randrange(1, FINAL - 5)
        place = folder / f"killed-{trial}"
        first = fork_ranks(partial(train, die=(rank, step), **layouts[kind]), place, 2)
        again = fork_ranks(partial(train, **layouts[kind]), place, 2)
        assert again["codes"] == [0, 0], "".join(again["texts"])[-3000:]
        same = newest(place) == whole[kind]
        report.append(
            {"rank": rank, "step": step, "same": same, **{k: first[k] for k in ("codes", "texts", "seconds")}}
        )
    return report


def restarted(folder: Path) -> None:
    """Under a launcher that starts everybody again: in the first life the second rank is killed."""
    torch.set_num_threads(1)
    dist.start(torch.device("cpu"), 60)
    first = not folder.exists()
    dist.gather_objects(None)  # everybody has looked
    train(folder, die=(1, 11) if first else None)
    dist.stop()


def main(number: int) -> None:
    import_once()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_trainer(folder / "unused", 1)  # imports the rest

        report = {scenario.__name__: fork_ranks(scenario, folder / scenario.__name__, 2) for scenario in (stuck, fails)}
        print(json.dumps(report | {"kills": kills(folder, number)}))


if __name__ == "__main__":
    if sys.argv[1] == "--restarted":
        restarted(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]))
