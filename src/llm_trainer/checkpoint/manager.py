"""The checkpoints of one run: a folder per step, or a single `.pt` file."""

import itertools
import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trainer.checkpoint.atomic import clear_left_behind, exchange, partial_path, replace, whole_or_nothing
from llm_trainer.checkpoint.state import JSON_FILES, StateFiles, read_tensors, restore, set_tensors_aside
from llm_trainer.checkpoint.tensor_files import Shard, shard_files, write_files
from llm_trainer.checkpoint.valid import (
    CheckpointError,
    Written,
    find_damage,
    is_damaged_zip,
    name_valid_neighbour,
    read_manifest,
    step_folders,
    step_of,
    valid_checkpoints,
    write_manifest,
)
from llm_trainer.checkpoint.weights import (
    load_optimizer_state_by_name,
    load_weights,
    optimizer_state_by_name,
    plain_name,
    read_model,
    unwrap,
)
from llm_trainer.disk import bytes_in, explained, flush, remove

OUR_COPY = ".published"  # marks a published model that is a copy, which the next one may replace
WEIGHTS_OF = "weights_of"  # in best_model.pt: the checkpoint that has the rest, and hashes by which it is known
WARN: Callable[[str], object] = logging.getLogger(__name__).warning


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint: the folder of its weights (for `read_model`) and its state, the tensors on the CPU."""

    path: Path
    step: int
    metric: float | None
    model_folder: Path
    state: dict[str, Any]


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


def load_folder(
    path: str | Path, verify: str = "full", like: Callable[[str], Tensor | None] = lambda name: None
) -> LoadedCheckpoint:
    """Read and verify one checkpoint folder; nothing in it is executed.

    Args:
        like: See `read_tensors`.

    Raises:
        CheckpointError: A file is missing or damaged; the message names it and the newest valid checkpoint beside it.
    """
    path = Path(path)
    if problem := find_damage(path, verify):
        raise CheckpointError(f"{problem}. {name_valid_neighbour(path)}")
    manifest = read_manifest(path)
    plain, with_tensors = (json.loads((path / name).read_text()) for name in JSON_FILES)
    tensors = {}
    if (path / "tensors").exists():
        tensors = read_tensors(path / "tensors", like)
    state = {name: restore(part, tensors) for name, part in {**plain, **with_tensors}.items()}
    return LoadedCheckpoint(path, manifest["step"], manifest["metric"], path / "model", state)


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
    return write_file(path, unwrap(model).state_dict(), state)


def write_file(path: str | Path, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write weights and state as one `.pt` file: see `save_checkpoint`."""
    path = Path(path)
    content: dict[str, Any] = {"model": {plain_name(name): value for name, value in weights.items()}, **state}
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


def load_checkpoint(
    path: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    scheduler: Any = None,
    like: Callable[[str], Tensor | None] = lambda name: None,
    verify: str = "full",
) -> dict[str, Any]:
    """Load a checkpoint into `model` and, where given, `optimizer` and `scheduler`; returns the rest of its state.

    Args:
        path: A `.pt` file (of `save_checkpoint`, or a plain state dict), a checkpoint folder, or the folder of a run,
            whose newest valid checkpoint is taken.
        like: See `read_tensors`.
        verify: See `read_checkpoint`.

    Raises:
        CheckpointError: The file is missing or damaged (the message names the newest valid checkpoint beside it), does
            not fit the model, or lacks the state of an optimizer or scheduler that was asked for.
    """
    if verify == "full":
        path = verified(path, with_state=optimizer is not None or scheduler is not None)
    weights, state = read_checkpoint(path, like, "sizes")
    for name, wanted in (("optimizer", optimizer), ("scheduler", scheduler)):
        if wanted is not None and name not in state:
            raise CheckpointError(f"'{path}' holds no {name} state: pass {name}=None to load the weights alone")
    if isinstance(weights, Path):
        read_model(model, weights)
    else:
        load_weights(model, weights, path)
    if optimizer is not None:
        load_optimizer_state_by_name(model, optimizer, state.pop("optimizer"))
    if scheduler is not None:
        scheduler.load_state_dict(state.pop("scheduler"))
    return state


def read_checkpoint(
    path: str | Path, like: Callable[[str], Tensor | None] = lambda name: None, verify: str = "full"
) -> tuple[Path | dict[str, Tensor], dict[str, Any]]:
    """The weights (or the folder of `write_model` that they are in) and the state of a checkpoint: see `load_checkpoint`.

    Args:
        like: See `read_tensors`.
        verify: `"full"` reads all of it once to compare hashes; `"sizes"` trusts a process that has done so.
    """
    path = verified(path) if verify == "full" else Path(path)
    if path.is_dir():
        loaded = load_folder(path, "sizes", like)
        return loaded.model_folder, loaded.state
    state = _load_file(path)
    return (state.pop("model"), state) if "model" in state else (state, {})


def verified(path: str | Path, with_state: bool = False) -> Path:
    """The checkpoint folder or file that `path` means, after all of it has been read and compared with its hashes.

    Args:
        path: a checkpoint, or the folder of a run, whose newest valid one is meant.
        with_state: best_model.pt, which holds weights alone, means the checkpoint folder that they are of.

    Raises:
        CheckpointError: It is missing or damaged; the message names the newest valid checkpoint beside it.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "manifest.json").exists():
            newest = next(valid_checkpoints(path, warn=WARN), None)
            if newest is not None:
                return newest
        problem = find_damage(path)
        if problem is not None:
            raise CheckpointError(f"{problem}. {name_valid_neighbour(path)}")
        return path
    if not path.is_file():
        raise CheckpointError(f"'{path}' does not exist. {name_valid_neighbour(path)}")
    if is_damaged_zip(path):
        raise CheckpointError(f"'{path}' is truncated or damaged. {name_valid_neighbour(path)}")
    of = _load_file(path).get(WEIGHTS_OF) if with_state else None
    return path if of is None else verified(_folder_of(path, of))


def _folder_of(path: Path, of: Mapping[str, Any]) -> Path:
    """The checkpoint folder whose weights are those of the file `path`, as that says."""
    for folder in (path.parent / of["checkpoint"], *path.parent.glob(f"set-aside-*/{of['checkpoint']}")):
        with suppress(OSError, ValueError):  # not there, or damaged
            files = read_manifest(folder)["files"]
            if all(files[name]["sha256"] == sha256 for name, sha256 in of["files"].items()):
                return folder
    raise CheckpointError(
        f"'{path}' holds the weights of {of['checkpoint']}, and what else a run needs to go on is in that folder, which is "
        f"no longer beside it. {name_valid_neighbour(path)}. For the weights alone call "
        f"checkpoint.load_checkpoint(path, model=...), or set init_weights_path"
    )


def _load_file(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds more than tensors and plain values, which is never unpickled: save only those ({error})"
        ) from error
