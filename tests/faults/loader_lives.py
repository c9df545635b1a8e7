"""Lives of a training process whose DataLoader has workers: `python loader_lives.py FOLDER` prints how each ended, as JSON.

Imports once and forks the lives, each in a session of its own, all at the same time.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from victim import Rows, make_trainer

LIVES: dict[str, int | None] = {  # name -> the signal that all processes of the session get; None: what the run does
    "ends": None,
    "fails": None,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr1": signal.SIGUSR1,
    "kill": signal.SIGKILL,  # to the training process alone, while its workers are busy for a minute
}


class Noticed(Dataset):
    """Rows that leave behind the number of the process that fetches them."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.rows, self.folder, self.seconds = Rows(40), folder, seconds

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        (self.folder / f"worker-{os.getpid()}").touch()
        time.sleep(self.seconds)
        return self.rows[index]


def live(name: str, folder: Path) -> None:
    """Train; by itself only the first two lives come to an end."""
    from llm_trainer import Hook
    from llm_trainer.data.collate import collate_padded

    rows = Noticed(folder, 60 if name == "kill" else 0.002)
    loader = DataLoader(
        rows, batch_size=2, shuffle=True, collate_fn=collate_padded, num_workers=2, persistent_workers=True
    )
    hooks = [Hook("fail", fail, every_steps=12)] if name == "fails" else []
    epochs = 2 if name == "ends" else 1000
    options = {"train_loader": loader, "val_loader": None, "scheduler": None, "max_epochs": epochs}
    make_trainer(folder / "run", hooks=hooks, **options).train()


def fail(run: Any) -> None:
    """What a user's hook may do."""
    raise OSError("an error of a user's hook")


def start(name: str, folder: Path) -> int:
    """Fork a life; it ends as a script does, with everything that the interpreter does at its end."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    folder.mkdir()
    out = os.open(folder / "out", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    live(name, folder)
    sys.exit(0)


def workers_of(folder: Path) -> list[int]:
    """Processes that fetched rows."""
    return [int(path.name.removeprefix("worker-")) for path in folder.glob("worker-*")]


def is_alive(process: int) -> bool:
    """Whether a process runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it holds before so many seconds have passed."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def end_of(child: int, folder: Path) -> dict[str, Any]:
    """How a life ended, and how many of its workers were left some seconds later."""
    status: list[int] = []

    def has_ended() -> bool:
        if not status:
            done, code = os.waitpid(child, os.WNOHANG)
            status.extend([code] if done else [])
        return bool(status)

    ended, workers = wait_for(has_ended, 60), workers_of(folder)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    wait_for(lambda: not any(map(is_alive, workers)), 10)
    left = [worker for worker in workers if is_alive(worker)]
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status[0]) if ended else "did not end"
    return {"code": code, "workers": len(workers), "left": len(left), "out": (folder / "out").read_text()[-2000:]}


def main(folder: Path) -> None:
    """Start all lives, send each its signal once both workers are there, and report."""
    torch.set_num_threads(1)
    make_trainer(folder / "unused")
    children = {name: start(name, folder / name) for name in LIVES}
    for name, number in LIVES.items():
        if number is not None:
            assert wait_for(lambda name=name: len(workers_of(folder / name)) == 2, 60), name
            send = os.kill if number == signal.SIGKILL else os.killpg
            send(children[name], number)
    print(json.dumps({name: end_of(child, folder / name) for name, child in children.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
