"""Kills a run between two of its own file operations: `python aimed.py FOLDER KILLS AIM...` prints what happened as JSON.

A life that is aimed at counts the operations on the files of its aim (Python's audit events) and kills itself at one of
them, at once or some milliseconds later. After every kill, whoever opens `save_dir/model` must find a model. Every run that
got to its end is compared with one that was left alone, bit for bit.
"""

import importlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from victim import Rows, fork_life, make_trainer, outcome, wait

from llm_trainer.checkpoint.valid import step_folders, step_of

AIMS = {  # paths inside save_dir
    "publish": r"model(\.(partial|replaced)-.*)?",
    "best_model": r"best_model\.pt.*",
    "store": r"cache/.*",
    "save": r"(checkpoint-\d+\.partial-|\.).*",
    "rotate": r"checkpoint-\d+",
}
OPERATIONS = {
    "open",
    "os.mkdir",
    "os.rename",
    "os.link",
    "os.symlink",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.rmtree",
}


class StoredRows(Rows):
    """The rows of `Rows`, from a token store that is built at first."""

    def __init__(self, folder: Path) -> None:
        from llm_trainer.data.encode import workers
        from llm_trainer.data.encode.store import Part

        super().__init__(62)
        workers.ROWS_PER_PART = 10
        folder.mkdir(parents=True, exist_ok=True)
        ids = [row.astype(np.uint16) for row in self._ids]
        store = workers.build_store(folder / "store", ids, lambda rows: Part({"input_ids": rows}), ["input_ids"])
        self._ids = [store["input_ids"][row] for row in range(len(store))]


def trainer(folder: Path) -> Any:
    """A run that prepares its data, saves often, keeps one checkpoint besides the best, and writes best_model.pt."""
    from llm_trainer.data.collate import collate_padded
    from llm_trainer.data.stream import SampleStream

    stream = SampleStream(StoredRows(folder / "cache"), collate_padded, rows_per_step=8, batch_size=2)
    options: dict[str, Any] = {
        "best_file": True,
        "checkpoints_to_keep": 1,
        "save_interval_steps": 2,
        "eval_interval": 2,
    }
    return make_trainer(folder, train_loader=stream, max_epochs=2, **options)


def start(folder: Path, aim: str = "", operation: int = 0, delay_s: float = 0.0) -> int:
    """Fork a life that trains in `folder` until its end, or until the given operation on the files of `aim`.

    A life without an aim leaves the number of operations of each behind.
    """

    def live() -> None:
        killers = {name: Killer(folder, AIMS[name], operation, delay_s) for name in AIMS if name == aim or not aim}
        for killer in killers.values():
            sys.addaudithook(killer)
        trainer(folder).train()
        if not aim:
            Path(f"{folder}.json").write_text(json.dumps({name: -killer.left for name, killer in killers.items()}))

    return fork_life(folder, live)


class Killer:
    """An audit hook that kills this process at its `operation`-th operation on files whose path matches; 0: it counts."""

    def __init__(self, folder: Path, pattern: str, operation: int, delay_s: float) -> None:
        self.pattern = re.compile(f"{re.escape(str(folder))}/({pattern})")
        self.left, self.delay_s = operation, delay_s

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not any(self._matches(argument) for argument in arguments[:2]):
            return
        self.left -= 1
        if self.left == 0 and self.delay_s:
            threading.Timer(self.delay_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
        elif self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def _matches(self, argument: Any) -> bool:
        return isinstance(argument, str | Path) and self.pattern.fullmatch(str(argument)) is not None


def opens(folder: Path) -> bool:
    """Whether `model` leads to weights that can be read; the first one is published after the first save, at step 2."""
    if not (folder / "model").exists():
        return max(map(step_of, step_folders(folder)), default=0) <= 2
    return len(load_file(folder / "model" / "model.safetensors")) > 0


def best_weights(folder: Path) -> dict[str, Any]:
    """What best_model.pt holds."""
    return torch.load(folder / "best_model.pt", weights_only=True)["model"]


def main(folder: Path, kills: int, aims: list[str]) -> None:
    """Kill `kills` lives at each aim, in turns, so that one run is killed at several."""
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.checkpoint")

    trainer(folder / "unused")  # what is imported now is not imported in every life
    began, chance = time.monotonic(), random.Random(11)
    assert wait(start(folder / "whole"), 120), "the run that is left alone"
    whole, whole_best = outcome(folder / "whole"), best_weights(folder / "whole")
    operations = json.loads((folder / "whole.json").read_text())
    killed, runs, wrong = dict.fromkeys(aims, 0), 0, list[str]()
    while min(killed.values()) < kills:
        run, finished, turn = folder / f"run-{runs}", False, 0
        runs += 1
        while not finished:
            left = [aim for aim in aims if killed[aim] < kills]
            if not left:
                finished = wait(start(run), 120)
                continue
            aim = left[turn % len(left)]
            turn += 1
            first, last = 1, operations[aim] // 2  # a life that goes on has fewer of them left
            if aim == "store":  # which one life builds: half of the kills are at its end, where it gets its name
                first, last = chance.choice([1, operations[aim] - 12]), operations[aim]
            operation = chance.randint(first, max(first, last))
            delay_s = chance.choice([0.0, 0.0, 0.0, chance.uniform(0, 0.004)])
            _, status = os.waitpid(start(run, aim, operation, delay_s), 0)
            code = os.waitstatus_to_exitcode(status)
            assert code in (0, -signal.SIGKILL), (folder / f"{run.name}.out").read_text()[-3000:]
            finished = code == 0
            killed[aim] += not finished
            if not opens(run):
                wrong.append(f"{run.name}: model does not open after a kill at {aim}")
        wrong += [f"{run.name}: {problem}" for problem in compare(run, whole, whole_best)]
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"kills": killed, "runs": runs, "wrong": wrong, "operations": operations, "seconds": seconds}))


def compare(run: Path, whole: dict[str, Any], whole_best: dict[str, Any]) -> list[str]:
    """What of a finished run differs from the one that was left alone, and what is left of dead lives.

    A store that is finished is not locked again, so the lock of who died right after it stays, and bothers nobody.
    """
    result, best = outcome(run), best_weights(run)
    problems = [f"{name} differs" for name in whole if result[name] != whole[name]]
    if not all(torch.equal(best[name], whole_best[name]) for name in whole_best):
        problems.append("best_model.pt differs")
    left = [path.name for path in run.iterdir() if re.search(r"partial|replaced|lock", path.name)]
    left += [path.name for path in (run / "cache").iterdir() if path.name not in ("store", "store.lock")]
    return problems + [f"{name} is left" for name in left]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
