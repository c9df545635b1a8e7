"""A machine may lose its power: nothing gets its name before all of it is on the disk, and a name is waited for too."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer.checkpoint import CheckpointManager, save_checkpoint, write_model
from policies import tiny, train
from quick_disk import SYNC


class Watched:
    """What a process has synced, and what it renamed before that.

    Attributes:
        named: every path that got its name from another one, in order.
        too_early: names that something got which was not on the disk as a whole.
        unsaid: folders with a new name that was not waited for.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.named: list[Path] = []
        self.too_early: list[str] = []
        self.unsaid: set[Path] = set()
        self._synced: set[tuple[int, int]] = set()
        monkeypatch.setattr(os, "fsync", self._sync)
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._noting(getattr(os, name)))

    def _sync(self, descriptor: int) -> None:
        SYNC(descriptor)
        found = os.fstat(descriptor)
        self._synced.add((found.st_ino, found.st_mtime_ns))
        self.unsaid.discard(Path(os.readlink(f"/proc/self/fd/{descriptor}")))

    def _noting(self, rename: Callable[..., None]) -> Callable[..., None]:
        def noting(old: Any, new: Any, **options: Any) -> None:
            old, new = Path(old), Path(new)
            inside = old.rglob("*") if old.is_dir() and not old.is_symlink() else ()
            for path in (old, *inside):
                found = path.lstat()
                if not path.is_symlink() and (found.st_ino, found.st_mtime_ns) not in self._synced:
                    self.too_early.append(f"{path.name} of {new}")
            rename(old, new, **options)
            self.named.append(new)
            self.unsaid.add(new.parent.resolve())

        return noting


def of_a_checkpoint(folder: Path) -> str:
    manager = CheckpointManager(folder)
    manager.save(1, lambda place: write_model(tiny(), place), {"step": 1, "tensor": torch.ones(3)}, is_best=True)
    return "checkpoint-00000001"


def of_a_single_file(folder: Path) -> str:
    save_checkpoint(folder / "one.pt", model=tiny(), step=1)
    return "one.pt"


def of_a_rollout(folder: Path) -> str:
    train("grpo", folder, reward_in_process=True, max_steps=1)
    return "rollouts/00000000"


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux, where a descriptor has a path")
@pytest.mark.parametrize("write", [of_a_checkpoint, of_a_single_file, of_a_rollout])
def test_what_has_its_name_is_on_the_disk(
    write: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    assert tmp_path / write(tmp_path) in watched.named
    assert watched.too_early == [] and watched.unsaid == set()
