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
from llm_trainer.rewards.functions import RewardError
from llm_trainer.train.hooks import Hook
from writers import BigramTrainer, prompts
from writers import make_trainer as make_bigrams

FINAL = 20  # steps of a whole run
LAYOUTS: list[dict[str, Any]] = [{}, {"engine": "fsdp"}]


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

    watch.GRACE_S = watch.FAIL_ALIKE_S = 1.0
    make_trainer(folder, FINAL, hooks=[Hook("fail", fail, every_steps=1)]).train()


def all_fail(folder: Path, **options: Any) -> None:
    """In their first life, both ranks raise inside a forward of the evaluation after step 3; they save every two steps."""
    steps = {"save_interval_steps": 2, "eval_interval": 3, "checkpoints_to_keep": 1, "best_file": False}
    trainer = make_trainer(folder, FINAL, **steps, **options)
    is_first = not any(folder.glob("checkpoint-*"))
    dist.gather_objects(None)  # both have looked

    def fail(*args: Any) -> None:
        if is_first and trainer.run.progress.step == 3 and not trainer.base_model.training:
            raise ValueError("the forward is lost")

    trainer.base_model.model.layers[1].register_forward_pre_hook(fail)
    trainer.train()


class Judged(BigramTrainer):
    """The judge of rank 1 alone fails, in the evaluation that comes in the middle of a rollout."""

    def passes(self, phase: str) -> None:
        if phase == "rewarding" and dist.rank() == 1 and self.run.progress.step == 3:
            raise RewardError("Connection refused by the judge")


def judge_fails(folder: Path) -> None:
    options: dict[str, Any] = {"grad_accum_steps": 1, "val_loader": prompts(4), "eval_interval": 3}
    make_bigrams(folder, kind=Judged, save_interval_steps=2, **options).train()


def fail_alike(folder: Path, wholes: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Two lives of `all_fail` on each layout; compared with runs that nothing happened to."""
    report = []
    for i, options in enumerate(LAYOUTS):
        play, place = partial(all_fail, **options), folder / f"alike-{i}"
        first = fork_ranks(play, place, 2)
        saved = [path.name for path in place.glob("checkpoint-*")]
        again = fork_ranks(play, place, 2)
        same = again["codes"] == [0, 0] and newest(place) == wholes[i]
        report.append({"saved": saved, "same": same, **{k: first[k] for k in ("codes", "texts")}})
    return report


def newest(folder: Path) -> dict[str, str]:
    """Hashes of the files of the newest checkpoint that are the same in every run: weights and optimizer."""
    manifest = json.loads((sorted(folder.glob("checkpoint-*"))[-1] / "manifest.json").read_text())
    files = {name: file["sha256"] for name, file in manifest["files"].items()}
    return {name: files[name] for name in files if name.endswith((".safetensors", ".distcp"))}


def undisturbed(folder: Path) -> list[dict[str, str]]:
    """What runs have saved that nothing happened to, of each layout."""
    wholes = []
    for i, options in enumerate(LAYOUTS):
        assert fork_ranks(partial(train, **options), folder / f"whole-{i}", 2)["codes"] == [0, 0]
        wholes.append(newest(folder / f"whole-{i}"))
    return wholes


def kills(folder: Path, number: int, whole: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Kill a rank at a random moment, `number` times, and go on; compared with runs that nothing happened to."""
    noise, report = random.Random(0), []
    for trial in range(number):
        kind, rank, step = trial % len(LAYOUTS), noise.randrange(2), noise.randrange(1, FINAL - 5)
        place = folder / f"killed-{trial}"
        first = fork_ranks(partial(train, die=(rank, step), **LAYOUTS[kind]), place, 2)
        again = fork_ranks(partial(train, **LAYOUTS[kind]), place, 2)
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

        report: dict[str, Any] = {}
        for scenario in (stuck, fails, judge_fails):
            report[scenario.__name__] = fork_ranks(scenario, folder / scenario.__name__, 2)
        for name in ("fails", "judge_fails"):
            report[name]["saved"] = sorted(path.name for path in (folder / name).glob("checkpoint-*"))
        wholes = undisturbed(folder)
        print(json.dumps(report | {"alike": fail_alike(folder, wholes), "kills": kills(folder, number, wholes)}))


if __name__ == "__main__":
    if sys.argv[1] == "--restarted":
        restarted(Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]))
