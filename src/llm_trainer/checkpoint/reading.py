"""Reading a checkpoint, ours or another framework's: verified first, and nothing in it is executed."""

import json
import logging
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trainer.checkpoint.adapter_bases import base_of
from llm_trainer.checkpoint.folders import bases_in, check_bases, left_out, read_model
from llm_trainer.checkpoint.state import JSON_FILES, read_tensors, restore
from llm_trainer.checkpoint.valid import (
    CheckpointError,
    find_damage,
    is_damaged_zip,
    name_valid_neighbour,
    read_manifest,
    valid_checkpoints,
)
from llm_trainer.checkpoint.weights import load_optimizer_state_by_name, load_weights
from llm_trainer.model_group import MODEL, members_of, weights_of_group
from llm_trainer.models.inside import unwrapped

OTHER_MODELS = "other_models"  # in a file of several models: the weights of all but the first
BASES = "bases"  # in best_model.pt: what the models with adapters stand on, of which it holds what was trained
WEIGHTS_OF = "weights_of"  # in best_model.pt: the checkpoint that has the rest, and hashes by which it is known
# Where other frameworks keep weights in a file.
THEIR_WEIGHTS = ("model_state_dict", "model_state", "state_dict", "module")
OF_OTHERS = "found in a file of another framework"
WARN: Callable[[str], object] = logging.getLogger(__name__).warning


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint: the folder of its weights (for `read_model`) and its state, the tensors on the CPU."""

    path: Path
    step: int
    metric: float | None
    model_folder: Path
    state: dict[str, Any]


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
    theirs = state.pop(OF_OTHERS, None)
    if theirs is not None and (optimizer is not None or scheduler is not None):
        raise CheckpointError(
            f"'{path}' was saved by another framework (found {', '.join(theirs)}), whose optimizer state goes by position and "
            f"is not taken over. Start from its weights: init_weights_path of a configuration, or "
            f"load_checkpoint(path, model=model) of llm_trainer.checkpoint"
        )
    for name, wanted in (("optimizer", optimizer), ("scheduler", scheduler)):
        if wanted is not None and name not in state:
            raise CheckpointError(f"'{path}' holds no {name} state: pass {name}=None to load the weights alone")
    others = state.pop(OTHER_MODELS, {})
    bases = {name: base_of(content) for name, content in state.pop(BASES, {}).items()}
    if isinstance(weights, Path):
        bases = bases_in(model, weights)
    if verify == "full":
        check_bases(model, bases, path)
    if isinstance(weights, Path):
        read_model(model, weights)
    else:
        load_weights(model, joined_weights(model, weights, others, path), path, left_out(model, bases))
    if optimizer is not None:
        load_optimizer_state_by_name(model, optimizer, state.pop("optimizer"))
    if scheduler is not None:
        scheduler.load_state_dict(state.pop("scheduler"))
    return state


def read_checkpoint(
    path: str | Path, like: Callable[[str], Tensor | None] = lambda name: None, verify: str = "full"
) -> tuple[Path | dict[str, Tensor], dict[str, Any]]:
    """The weights (or the folder of `write_model` that they are in) and the state of a checkpoint: see `load_checkpoint`.

    Of a file of several models, `OTHER_MODELS` of the state holds the weights of all but the first.

    Args:
        like: See `read_tensors`.
        verify: `"full"` reads all of it once to compare hashes; `"sizes"` trusts a process that has done so.
    """
    path = verified(path) if verify == "full" else Path(path)
    if path.is_dir():
        loaded = load_folder(path, "sizes", like)
        return loaded.model_folder, loaded.state
    content = _load_file(path)
    if "model" in content:
        return content.pop("model"), content
    for name in THEIR_WEIGHTS:
        if isinstance(content.get(name), Mapping):
            return _without_wrapper(content[name]), {OF_OTHERS: sorted(content)}
    return content, {}


def joined_weights(
    model: nn.Module, weights: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Tensor]], source: str | Path
) -> dict[str, Tensor]:
    """The weights of a file by their names in `model`, which may be a group of models.

    Args:
        model: into which they go.
        weights: of the first model.
        others: of the others by name; what `model` does not have is left out.
        source: the file, for the message.

    Raises:
        CheckpointError: it lacks one of the group.
    """
    wanted = members_of(unwrapped(model))
    found = {MODEL: weights, **others}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise CheckpointError(
            f"'{source}' holds no {', '.join(missing)}, which this run saves too: it is of another algorithm, or of a run "
            f"whose reference did not move. For the weights of its model alone set init_weights_path"
        )
    return weights_of_group(unwrapped(model), {name: found[name] for name in wanted})


def _without_wrapper(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by the names that they have without DistributedDataParallel or DeepSpeed around the model."""
    is_wrapped = all(name.startswith("module.") for name in weights)
    return {name.removeprefix("module.") if is_wrapped else name: tensor for name, tensor in weights.items()}


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
        if (path / "latest").is_file() and not (path / "manifest.json").exists():
            problem = (
                f"'{path}' is a checkpoint of DeepSpeed's own: run the zero_to_fp32.py that lies in it, and name the file "
                f"of weights that it makes"
            )
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
            f"'{path}' holds more than tensors and plain values, which is never unpickled: save only those, with the "
            f"program that wrote it ({error})"
        ) from error
