"""The checkpoints of one run: a folder per step, or a single `.pt` file."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trainer.checkpoint.atomic import clear_left_behind, exchange, partial_path, replace, whole_or_nothing
from llm_trainer.checkpoint.reading import OTHER_MODELS, WARN, LoadedCheckpoint, load_folder
from llm_trainer.checkpoint.state import StateFiles, restore, set_tensors_aside
from llm_trainer.checkpoint.tensor_files import Shard, shard_files, write_files
from llm_trainer.checkpoint.valid import (
    CheckpointError,
    Written,
    read_manifest,
    step_folders,
    step_of,
    valid_checkpoints,
    write_manifest,
)
from llm_trainer.checkpoint.weights import (
    optimizer_state_by_name,
    plain_name,
)
from llm_trainer.disk import bytes_in, explained, flush, remove
from llm_trainer.model_group import MODEL, weights_by_member
from llm_trainer.models.inside import unwrapped

OUR_COPY = ".published"  # marks a published model that is a copy, which the next one may replace


class CheckpointManager:
    """The checkpoints of one run: saves, rotates, and finds the newest valid one.

    Args:
        folder: Where the checkpoints are; created if needed. One process writes.
        keep: How many of the newest are kept; the best one and the last valid one are never deleted.
        warn: Called with a message when a damaged checkpoint is skipped.

    Raises:
        CheckpointError: The folder cannot be written.
    """

    def __init__(self, folder: str | Path, keep: int = 2, warn: Callable[[str], object] = WARN) -> None:
        if keep < 1:
            raise CheckpointError(f"keep is {keep}; at least the newest checkpoint must be kept: use keep >= 1")
        self.folder, self.keep, self.warn = Path(folder), keep, warn
        probe = self.folder / f".write-test-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"checkpoints cannot be written to '{self.folder}': {error.strerror}. "
                "Choose another output folder, or make this one writable"
            ) from error
        clear_left_behind(self.folder)

    def save(
        self,
        step: int,
        model_writer: Callable[[Path], object],
        state: Mapping[str, Any],
        *,
        metric: float | None = None,
        is_best: bool = False,
    ) -> Path:
        """Write the checkpoint of `step` (replacing one of the same step), publish and rotate; nothing is lost if it fails.

        Args:
            model_writer: Writes the weights into the folder it is given, e.g. `partial(write_model, model)`.
            state: Nested dicts, lists and tuples of numbers, strings and tensors.
            metric: The validation metric of this step, kept in the manifest.
            is_best: This is the best checkpoint so far: rotation spares it until a newer best one is saved.

        Raises:
            CheckpointError: The disk is full or read-only, or `state` holds something that cannot be restored.
        """
        files = StateFiles.of(state)

        def write(folder: Path) -> dict[str, Written]:
            (folder / "model").mkdir()
            model_writer(folder / "model")
            files.write_texts(folder)
            shards = {name: Shard.whole(tensor) for name, tensor in files.tensors.items()}
            return write_files(folder, shard_files(shards, rank=0))

        return self.write(step, write, metric=metric, is_best=is_best)

    def write(
        self,
        step: int,
        write: Callable[[Path], Mapping[str, Written]],
        *,
        metric: float | None = None,
        is_best: bool = False,
    ) -> Path:
        """Like `save`, of a checkpoint that `write` writes into the folder it is given.

        It returns the files, by their path in the folder, whose hashes it knows, and which are on the disk already.
        """
        target = self.folder / f"checkpoint-{step:08d}"
        partial = partial_path(target)
        with whole_or_nothing(partial, target):
            partial.mkdir()
            written = write(partial)
            write_manifest(partial, {"step": step, "metric": metric, "is_best": is_best}, written)
            replace(partial, target)
            flush(self.folder)
        self.publish(may_copy=False)
        self._rotate(target)
        return target

    def set_aside(self, after: int) -> tuple[int, Path] | None:
        """Move the checkpoints of steps later than `after` into a folder of their own; how many, and where to."""
        later = [path for path in step_folders(self.folder) if step_of(path) > after]
        if not later:
            return None
        folder = _unused(self.folder, "set-aside")
        folder.mkdir()
        for path in sorted(later):
            self._move(path, folder / path.name)
        return len(later), folder

    def _move(self, path: Path, to: Path) -> None:
        """Move a checkpoint; if `model` leads to it now, it does so before, meanwhile and afterwards."""
        if self._published() != path:
            path.rename(to)
            return
        if path.is_symlink():  # a process that was killed right here has moved it
            to = self.folder / os.readlink(path)
        else:
            to.symlink_to(to.relative_to(self.folder), target_is_directory=True)  # leads nowhere until it is exchanged
            if not exchange(path, to):
                to.unlink()
                path.rename(to)
        self._lead_to(to)
        remove(path)

    def latest(self, verify: str = "full") -> Path | None:
        """The newest checkpoint whose manifest holds; damaged ones are reported and skipped.

        Args:
            verify: `"full"` compares sizes and hashes, `"sizes"` only sizes.
        """
        return next(self._valid(verify), None)

    def best(self, verify: str = "full") -> Path | None:
        """The newest valid checkpoint that was saved with `is_best=True`."""
        return next(filter(_is_best, self._valid(verify)), None)

    def publish(self, may_copy: bool = True) -> Path | None:
        """Make `model` in the folder lead to the weights to use, the best checkpoint's or else the newest's: a stable path.

        Args:
            may_copy: where the file system has no links, copy the weights; else what is there stays.

        Returns:
            That path; None when there is no checkpoint.

        Raises:
            DiskError: there is no space for a copy; what is there stays.
        """
        valid = list(valid_checkpoints(self.folder, "sizes"))
        chosen = next(filter(_is_best, valid), None) or next(iter(valid), None)
        if chosen is None:
            return None
        if not self._lead_to(chosen) and may_copy:
            copy = partial_path(self.folder / "model")
            with explained(self.folder / "model", copy, needed=bytes_in(chosen / "model")):
                shutil.copytree(chosen / "model", copy)
                (copy / OUR_COPY).touch()
            self._replace_model(copy)
        return self.folder / "model"

    def _lead_to(self, checkpoint: Path) -> bool:
        """Let `model` be a link to a checkpoint's weights; whether that could be done."""
        link = partial_path(self.folder / "model")
        try:
            remove(link)  # of a process of the same id that was killed
            link.symlink_to(checkpoint.relative_to(self.folder) / "model", target_is_directory=True)
            self._replace_model(link)
        except OSError:  # a file system without links, or a full one
            return False
        return True

    def _replace_model(self, new: Path) -> None:
        model = self.folder / "model"
        if model.is_dir() and not model.is_symlink() and not (model / OUR_COPY).exists():  # the user's: it is kept
            model.rename(_unused(self.folder, "model.before"))
        replace(new, model)
        flush(self.folder)  # before anything that it led to is deleted

    def _published(self) -> Path | None:
        """The checkpoint that `model` leads to."""
        link = self.folder / "model"
        return self.folder / os.readlink(link).removesuffix("/model") if link.is_symlink() else None

    def load(self, path: str | Path | None = None, verify: str = "full") -> LoadedCheckpoint:
        """Read the checkpoint `path`, by default the newest valid one.

        Raises:
            CheckpointError: It is damaged (the message names the newest valid one), or there is none.
        """
        path = path or self.latest(verify)
        if path is None:
            raise CheckpointError(f"no valid checkpoint in '{self.folder}': expected a folder checkpoint-<step>")
        return load_folder(path, verify)

    def _valid(self, verify: str) -> Iterator[Path]:
        return valid_checkpoints(self.folder, verify, self.warn)

    def _rotate(self, just_saved: Path) -> None:
        """Delete what is older than `just_saved` and neither among the newest valid ones nor the best."""
        valid = list(valid_checkpoints(self.folder, "sizes"))
        best = next(filter(_is_best, valid), None)
        for path in step_folders(self.folder):
            is_spared = path in [*valid[: self.keep], best, self._published()]
            if step_of(path) < step_of(just_saved) and not is_spared:
                doomed = partial_path(path)  # under a name that is cleared at the next start, should we die half-way
                os.rename(path, doomed)
                remove(doomed)


def _is_best(path: Path) -> bool:
    return read_manifest(path)["is_best"]


def _unused(folder: Path, name: str) -> Path:
    """The first of `name`-1, `name`-2, ... that is not there."""
    numbered = (folder / f"{name}-{number}" for number in itertools.count(1))
    return next(path for path in numbered if not path.exists())


def save_checkpoint(
    path: str | Path, *, model: nn.Module, optimizer: Optimizer | None = None, scheduler: Any = None, **state: Any
) -> Path:
    """Write one `.pt` file: it appears complete or not at all.

    Args:
        scheduler: Anything with `state_dict()` and `load_state_dict(state)`.
        **state: More to keep (epoch, step, ...): numbers, strings, tensors, and lists, tuples and dicts of them.

    Raises:
        CheckpointError: The disk is full or read-only, or the state holds something that cannot be restored.
    """
    if optimizer is not None:
        state["optimizer"] = optimizer_state_by_name(model, optimizer)
    if scheduler is not None:
        state["scheduler"] = scheduler.state_dict()
    model = unwrapped(model)
    return write_file(path, weights_by_member(model, model.state_dict()), state)


def write_file(path: str | Path, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write weights and state as one `.pt` file: see `save_checkpoint`.

    Args:
        weights: the tensors of each model by name; those of the first stand where a file of one model has them.
    """
    path = Path(path)
    plain: dict[str, dict[str, Tensor]] = {}
    for member, named in weights.items():
        plain[member] = {plain_name(name): value for name, value in named.items()}
    content: dict[str, Any] = {MODEL: plain.pop(MODEL)}
    if plain:
        content[OTHER_MODELS] = plain
    content.update(state)
    for name in state:
        tensors: dict[str, Tensor] = {}
        content[name] = restore(set_tensors_aside(content[name], name, tensors), tensors)  # only what will load
    partial = partial_path(path)
    with whole_or_nothing(partial, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)
    return path
