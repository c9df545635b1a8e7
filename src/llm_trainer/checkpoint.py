"""Checkpoints that survive a kill at any moment, a full disk and a flipped byte.

A folder per step. Everything is written into `checkpoint-<step>.partial-<pid>`, then a manifest with the size and hash
of every file, then all of it is flushed to the disk, and only then renamed into place:

    checkpoint-00000100/
      model/               whatever `model_writer` wrote: a Hugging Face folder, or model.safetensors
      tensors/             the tensors of the state (optimizer, random state) by `torch.distributed.checkpoint`
      tensors.json         the parts of the state that hold tensors, with names in their place
      trainer_state.json   the rest of the state, plain and readable
      manifest.json        written last

So a folder with the final name is complete, or was damaged afterwards, which the manifest shows.
Optimizer state is kept by parameter *name*: it means the same in one process, under DDP and under FSDP2.
"""

import errno
import hashlib
import json
import logging
import os
import pickle
import random
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

WARN: Callable[[str], object] = logging.getLogger(__name__).warning
FOLDER = re.compile(r"checkpoint-(\d+)")
LEFT_BEHIND = re.compile(r"(.+)\.(partial|replaced)-(\d+)")
STORAGE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
}
IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}  # of this machine, not of the run
JSON_FILES = ("trainer_state.json", "tensors.json")


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read or applied; the message says which, why and what is still valid."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint: the folder of its weights (for `read_model`) and its state, the tensors on the CPU."""

    path: Path
    step: int
    metric: float | None
    model_folder: Path
    state: dict[str, Any]


# --- the folder per step


class CheckpointManager:
    """The checkpoints of one run: saves, rotates, and finds the newest one that is whole.

    Args:
        folder: Where the checkpoints are; created if needed. One process writes.
        keep: How many of the newest are kept; the best one and the last whole one are never deleted.
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
        _clear_left_behind(self.folder)

    def save(
        self,
        step: int,
        model_writer: Callable[[Path], object],
        state: Mapping[str, Any],
        *,
        metric: float | None = None,
        is_best: bool = False,
        tensor_writer: Callable[[Path, dict[str, Tensor]], object] | None = None,
    ) -> Path:
        """Write the checkpoint of `step` (replacing one of the same step) and rotate; nothing is lost if it fails.

        Args:
            model_writer: Writes the weights into the folder it is given, e.g. `partial(write_model, model)`.
            state: Nested dicts, lists and tuples of numbers, strings and tensors.
            metric: The validation metric of this step, kept in the manifest.
            is_best: This is the best checkpoint so far: rotation spares it until a newer best one is saved.
            tensor_writer: Writes `{name: tensor}` into a folder; default `write_tensors`. A sharded engine passes one
                in which all ranks take part.

        Raises:
            CheckpointError: The disk is full or read-only, or `state` holds something that cannot be restored.
        """
        target = self.folder / f"checkpoint-{step:08d}"
        partial = _partial(target)
        with _whole_or_nothing(partial, target):
            (partial / "model").mkdir(parents=True)
            model_writer(partial / "model")
            _write_state(partial, state, tensor_writer or write_tensors)
            _write_manifest(partial, {"step": step, "metric": metric, "is_best": is_best})
            if target.exists():  # a folder cannot be renamed over another: set it aside; the constructor puts it back
                os.rename(target, target.with_name(f"{target.name}.replaced-{os.getpid()}"))
            os.rename(partial, target)
            _flush(self.folder)
        self._rotate(target)
        return target

    def latest(self, verify: str = "full") -> Path | None:
        """The newest checkpoint whose manifest holds; damaged ones are reported and skipped.

        Args:
            verify: `"full"` compares sizes and hashes, `"sizes"` only sizes.
        """
        return next(self._valid(verify), None)

    def best(self, verify: str = "full") -> Path | None:
        """The newest valid checkpoint that was saved with `is_best=True`."""
        return next((path for path in self._valid(verify) if _read_manifest(path)["is_best"]), None)

    def load(self, path: str | Path | None = None, verify: str = "full") -> LoadedCheckpoint:
        """Read the checkpoint `path`, by default the newest valid one.

        Raises:
            CheckpointError: It is damaged (the message names the newest valid one), or there is none.
        """
        path = Path(path) if path is not None else self.latest(verify)
        if path is None:
            raise CheckpointError(f"no valid checkpoint in '{self.folder}': expected a folder checkpoint-<step>")
        return load_folder(path, verify)

    def _valid(self, verify: str) -> Iterator[Path]:
        return valid_checkpoints(self.folder, verify, self.warn)

    def _rotate(self, just_saved: Path) -> None:
        """Delete what is older than `just_saved` and neither among the newest whole ones nor the best."""
        whole = list(valid_checkpoints(self.folder, "sizes"))
        best = [path for path in whole if _read_manifest(path)["is_best"]][:1]
        for path in _step_folders(self.folder):
            if _step(path) < _step(just_saved) and path not in [*whole[: self.keep], *best]:
                doomed = _partial(path)  # under a name that is cleared at the next start, should we die half-way
                os.rename(path, doomed)
                _remove(doomed)


def valid_checkpoints(
    folder: Path, verify: str = "full", warn: Callable[[str], object] = lambda problem: None
) -> Iterator[Path]:
    """The checkpoint folders whose manifest holds, newest step first; `warn` hears about the others on the way."""
    for path in _step_folders(folder):
        if problem := find_damage(path, verify):
            warn(f"checkpoint skipped: {problem}")
        else:
            yield path


def load_folder(path: str | Path, verify: str = "full") -> LoadedCheckpoint:
    """Read and verify one checkpoint folder; nothing in it is executed.

    Raises:
        CheckpointError: A file is missing or damaged; the message names it and the newest valid checkpoint beside it.
    """
    path = Path(path)
    if problem := find_damage(path, verify):
        raise CheckpointError(f"{problem}. {_name_valid_neighbour(path)}")
    manifest = _read_manifest(path)
    plain, with_tensors = (json.loads((path / name).read_text()) for name in JSON_FILES)
    tensors = read_tensors(path / "tensors") if (path / "tensors").exists() else {}
    state = {name: _restore(part, tensors) for name, part in {**plain, **with_tensors}.items()}
    return LoadedCheckpoint(path, manifest["step"], manifest["metric"], path / "model", state)


def find_damage(path: Path, verify: str = "full") -> str | None:
    """What is wrong with a checkpoint folder, or None: every file is compared with the manifest.

    Args:
        verify: `"full"` compares sizes and hashes, `"sizes"` only sizes.
    """
    try:
        files = _read_manifest(path)["files"]
    except FileNotFoundError:
        return f"'{path}' is not a complete checkpoint: it has no manifest.json"
    except ValueError as error:
        return f"'{path / 'manifest.json'}' is damaged ({error})"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"'{file}' is missing"
        if (size := file.stat().st_size) != expected["size"]:
            return f"'{file}' is damaged: {size} bytes instead of {expected['size']}"
        if verify == "full" and _sha256(file) != expected["sha256"]:
            return f"'{file}' is damaged: its hash differs from the manifest"
    return None


def _step_folders(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, newest step first."""
    found = [path for path in folder.iterdir() if FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step, reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which vouches for itself too."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != _json_hash(manifest):
        raise ValueError("its own hash differs")
    return manifest


def _json_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """List and flush everything under `folder`: first the files, then the manifest, then the folders that name them."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    content = {**facts, "files": listed}
    sealed = json.dumps({"sha256": _json_hash(content), **content}, indent=1)
    (folder / "manifest.json").write_text(sealed, encoding="utf-8")
    for path in [*files, folder / "manifest.json", *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        _flush(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial-{os.getpid()}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _clear_left_behind(folder: Path) -> None:
    """Remove what dead processes left; a replaced checkpoint whose successor never arrived is put back."""
    for path in sorted(folder.iterdir()):
        match = LEFT_BEHIND.fullmatch(path.name)
        if not match or _is_other_process(int(match[3])):
            continue
        with suppress(OSError):  # the disk may have failed, or another rank clears: what stays is for the next start
            if match[2] == "replaced" and not (folder / match[1]).exists():
                os.rename(path, folder / match[1])
            else:
                _remove(path)


def _is_other_process(pid: int) -> bool:
    """Whether another live process has this id. Our own id on a folder is a predecessor's: containers reuse ids."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _whole_or_nothing(partial: Path, target: Path) -> Iterator[None]:
    """Leave no `partial` behind, however the block ends; tell a full or read-only disk from a mistake in the code."""
    try:
        _remove(partial)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if (reason := _storage_failure(error)) is None:
            raise
        raise CheckpointError(_explain_storage_failure(reason, partial, target)) from error
    finally:
        if target.parent.is_dir():
            _clear_left_behind(target.parent)


def _storage_failure(error: BaseException) -> str | None:
    """The operating system's reason behind an error of safetensors, torch or Python; None: it has another cause."""
    cause: BaseException | None = error
    while cause is not None:
        in_rust = re.search(r"\(os error (\d+)\)", str(cause))  # safetensors has the number in its text only
        code = int(in_rust[1]) if in_rust else cause.errno if isinstance(cause, OSError) else None
        if code in STORAGE_ERRORS:
            return os.strerror(code)
        cause = cause.__cause__ or cause.__context__
    return None


def _explain_storage_failure(reason: str, partial: Path, target: Path) -> str:
    """The message for a failed save: what was written, what is free, and what is still valid."""
    if not target.parent.is_dir():
        return f"'{target}' could not be saved: {reason}. Choose another folder"
    written = sum(path.stat().st_size for path in [partial, *partial.rglob("*")] if path.is_file())
    free = shutil.disk_usage(target.parent).free
    previous = [_read_manifest(path)["files"].values() for path in valid_checkpoints(target.parent, "sizes")][:1]
    needed = max([written, *(sum(file["size"] for file in files) for files in previous)])
    return (
        f"'{target}' could not be saved: {reason}. It needs at least {needed / 1e6:.1f} MB; {written / 1e6:.1f} MB "
        f"were written and {free / 1e6:.1f} MB are free. Free some space or choose another folder. "
        f"{_name_valid_neighbour(target)}"
    )


def _name_valid_neighbour(path: Path) -> str:
    """One sentence that names the newest whole checkpoint in the folder of `path`."""
    if path.parent.is_dir():
        files = sorted(path.parent.glob("*.pt"), key=lambda file: file.stat().st_mtime, reverse=True)
        whole = (file for file in files if not _is_damaged_zip(file))
        if valid := next(valid_checkpoints(path.parent), None) or next(whole, None):
            return f"The newest valid checkpoint there is '{valid}'"
    return "There is no valid checkpoint beside it"


# --- state: json and tensors


def _write_state(
    folder: Path, state: Mapping[str, Any], tensor_writer: Callable[[Path, dict[str, Tensor]], object]
) -> None:
    """Write `state` as two JSON files and a folder of tensors."""
    tensors: dict[str, Tensor] = {}
    parts: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, part in state.items():
        before = len(tensors)
        plain = _set_tensors_aside(part, name, tensors)
        parts[len(tensors) > before][name] = plain
    for file, content in zip(JSON_FILES, parts, strict=True):
        (folder / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
    if tensors:
        tensor_writer(folder / "tensors", tensors)


def _set_tensors_aside(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON that `_restore` turns back exactly, with its tensors moved to `tensors[path]`."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"!tensor": path}
    if isinstance(value, Mapping):
        items = [(key, _set_tensors_aside(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("!") for key, _ in items):
            return dict(items)
        return {"!items": [[_set_tensors_aside(key, path, tensors), item] for key, item in items]}
    if isinstance(value, list | tuple):
        listed = [_set_tensors_aside(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return {"!tuple": listed} if isinstance(value, tuple) else listed
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str):
        return str.__str__(value)  # torch.__version__ is of a subclass, which `weights_only` loading refuses
    if value is None or isinstance(value, bool | int | float):
        return value
    raise CheckpointError(
        f"the state '{path}' is a {type(value).__name__}, which a checkpoint cannot restore: "
        "use numbers, strings, tensors, and lists, tuples and dicts of them"
    )


def _restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("!tensor", name)]:
            return tensors[name]
        case [("!tuple", items)]:
            return tuple(_restore(item, tensors) for item in items)
        case [("!items", items)]:
            return {_restore(key, tensors): _restore(item, tensors) for key, item in items}
    return {key: _restore(item, tensors) for key, item in value.items()}


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors in the format of `torch.distributed.checkpoint`, from this process alone."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    failure: BaseException | None = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
        except CheckpointException as error:  # not an Exception in torch; what happened is inside
            failure = next(iter(error.failures.values()))[0]
    if failure is not None:
        raise failure  # out of the except block, which would overwrite its context: the system's own error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Read all tensors that any number of ranks wrote with `torch.distributed.checkpoint`, onto the CPU."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / ".metadata").open("rb") as file:
                return _MetadataUnpickler(file).load()

    reader = Reader(folder)
    described = {
        name: entry
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)  # bytes would be unpickled: not ours, never read
    }
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in described.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


class _MetadataUnpickler(pickle.Unpickler):
    """torch pickles the description of the tensors; a foreign checkpoint must not get to run code through it."""

    ALLOWED = re.compile(
        r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|StorageMeta|_MEM_FORMAT_ENCODING)"
        r"|torch\.distributed\.checkpoint\.metadata\.(Tensor|Bytes|Chunk)(StorageMetadata|Properties)"
        r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
        r"|torch\.(Size|float\d+\w*|bfloat16|u?int\d+|bool|complex\d+|serialization\._get_layout)"
        r"|pathlib\.(_local\.)?(PosixPath|WindowsPath)|collections\.OrderedDict"
    )

    def find_class(self, module: str, name: str) -> Any:
        if not self.ALLOWED.fullmatch(f"{module}.{name}"):
            raise CheckpointError(f"the tensors' .metadata asks for {module}.{name}, which no tensor needs: not loaded")
        return super().find_class(module, name)


# --- model weights


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and `torch.compile`, whose names are those of a single process."""
    while isinstance(model, DistributedDataParallel) or "_orig_mod" in dict(model.named_children()):
        model = model.module if isinstance(model, DistributedDataParallel) else model.get_submodule("_orig_mod")
    return model


def plain_name(name: str) -> str:
    """A parameter's name without what compiled or checkpointed layers insert into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def write_model(model: nn.Module, folder: str | Path, tokenizer: Any = None) -> None:
    """Write the weights: a transformers model as a Hugging Face folder, any other module as `model.safetensors`.

    Each tensor keeps its dtype; tied weights are written once. A tokenizer is written beside them.
    """
    folder, model = Path(folder), unwrap(model)
    folder.mkdir(parents=True, exist_ok=True)
    if _is_pretrained(model):
        model.save_pretrained(folder)  # type: ignore[operator]
    else:
        save_model(model, str(folder / "model.safetensors"))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def read_model(model: nn.Module, folder: str | Path) -> None:
    """Load what `write_model` wrote into `model`, in place, bit for bit; dtypes and devices stay as they are.

    Non-persistent buffers (rotary frequencies) are not in a checkpoint: they keep what the model was built with.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    folder, model = Path(folder), unwrap(model)
    if not _is_pretrained(model):
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"'{folder}' has no model.safetensors to load into a {type(model).__name__}")
        load_weights(model, load_file(folder / "model.safetensors"), folder)
        return
    # transformers renames and merges weights while loading (experts), so its own loader has to do it. It loads all
    # weights in one dtype: the widest of the model, which holds the others exactly.
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else max([torch.float32, *dtypes], key=lambda dtype: dtype.itemsize)
    loaded, report = type(model).from_pretrained(folder, dtype=dtype, output_loading_info=True)  # type: ignore[attr-defined]
    problems = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        raise CheckpointError(f"the weights in '{folder}' do not fit a {type(model).__name__}: {_first_few(problems)}")
    load_weights(model, loaded.state_dict(), folder)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy named tensors into `model`; of tied parameters one name is enough.

    Args:
        source: Where they come from, for the message.

    Raises:
        CheckpointError: Names or shapes differ; the model is unchanged.
    """
    model, weights = unwrap(model), {plain_name(name): tensor for name, tensor in weights.items()}
    names = {plain_name(name): name for name in model.state_dict()}
    own = dict(zip(names, model.state_dict().values(), strict=True))
    given = {_memory(own[name]) for name in weights if name in own}
    problems = {
        "missing": [name for name in own if name not in weights and _memory(own[name]) not in given],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} ({list(tensor.shape)} instead of {list(own[name].shape)})"
            for name, tensor in weights.items()
            if name in own and tensor.shape != own[name].shape
        ],
    }
    if any(problems.values()):
        raise CheckpointError(f"the weights in '{source}' do not fit a {type(model).__name__}: {_first_few(problems)}")
    model.load_state_dict({names[name]: tensor for name, tensor in weights.items()}, strict=False)


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _first_few(problems: Mapping[str, list[str]], num: int = 3) -> str:
    return "; ".join(
        f"{len(names)} {kind}: {', '.join(names[:num])}{', ...' if len(names) > num else ''}"
        for kind, names in problems.items()
        if names
    )


def _is_pretrained(model: nn.Module) -> bool:
    """Whether this is a transformers model; transformers (seconds to import) is not imported to say no."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


# --- optimizer state


def optimizer_state_by_name(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state with parameter names where `Optimizer.state_dict` has positions.

    Returns:
        `{"state": {name: {key: tensor or number}}, "param_groups": [{"params": [name], "lr": ..., ...}]}`.
        Parameters that were never stepped have no entry; a tied parameter goes by its first name.

    Raises:
        CheckpointError: The optimizer holds a parameter that the model does not have.
    """
    names = _parameter_names(model)
    groups, state = [], {}
    for group in optimizer.param_groups:
        members = {_name_of(parameter, names): parameter for parameter in group["params"]}
        groups.append({**{k: v for k, v in group.items() if k not in IMPLEMENTATION}, "params": list(members)})
        state.update({name: dict(optimizer.state[p]) for name, p in members.items() if optimizer.state.get(p)})
    return {"state": state, "param_groups": groups}


def load_optimizer_state_by_name(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state_by_name` returned, bit for bit (torch would cast to the parameter's dtype).

    Hyper-parameters of the groups (lr, betas, ...) are restored too. Tensors go to their parameter's device, and are
    cut where the parameter is sharded (FSDP2).

    Raises:
        CheckpointError: The groups hold other parameters than those saved; the optimizer is unchanged.
    """
    names = _parameter_names(model)
    groups, old_groups = optimizer.param_groups, saved["param_groups"]
    if len(groups) != len(old_groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(old_groups)} parameter groups, this has {len(groups)}"
        )
    members = [{_name_of(parameter, names): parameter for parameter in group["params"]} for group in groups]
    for index, (own, old) in enumerate(zip(members, old_groups, strict=True)):
        problems = {
            "missing": [name for name in own if name not in old["params"]],
            "unexpected": [name for name in old["params"] if name not in own],
        }
        if any(problems.values()):
            raise CheckpointError(f"the checkpoint's optimizer differs in group {index}: {_first_few(problems)}")
    for group, own, old in zip(groups, members, old_groups, strict=True):
        group.update({key: value for key, value in old.items() if key != "params"})
        host_step = not (group.get("fused") or group.get("capturable"))  # where torch's kernels read it
        for name, parameter in own.items():
            optimizer.state.pop(parameter, None)
            if entry := saved["state"].get(name):
                optimizer.state[parameter] = {
                    key: _place(value, parameter, on_host=host_step and key == "step") for key, value in entry.items()
                }


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in unwrap(model).named_parameters()}


def _name_of(parameter: nn.Parameter, names: Mapping[nn.Parameter, str]) -> str:
    if parameter not in names:
        raise CheckpointError(
            f"the optimizer holds a parameter of shape {list(parameter.shape)} that is not the model's: "
            "build the optimizer from this model's parameters, after the model took its final form"
        )
    return names[parameter]


def _place(value: Any, parameter: nn.Parameter, on_host: bool) -> Any:
    """A copy of a state tensor where its parameter is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, Tensor):
        return value
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor) and value.shape == parameter.shape:
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)
    return value.detach().to("cpu" if on_host else parameter.device, copy=True)


# --- random state


def random_state() -> dict[str, Any]:
    """The state of all global random generators: Python, numpy, torch, and torch's on every CUDA device."""
    numpy_state = np.random.get_state(legacy=False)
    assert isinstance(numpy_state, dict)
    numpy_state["state"] = {**numpy_state["state"], "key": numpy_state["state"]["key"].tolist()}
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": random.getstate(), "numpy": numpy_state, "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned; states of CUDA devices that are not here are left out."""
    random.setstate(state["python"])
    inner = state["numpy"]["state"]
    np.random.set_state({**state["numpy"], "state": {**inner, "key": np.array(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(state["torch"].cpu())
    for device, generator in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(generator.cpu(), device)


# --- single file


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
    path = Path(path)
    content: dict[str, Any] = {"model": {plain_name(k): v for k, v in unwrap(model).state_dict().items()}, **state}
    if optimizer is not None:
        content["optimizer"] = optimizer_state_by_name(model, optimizer)
    if scheduler is not None:
        content["scheduler"] = scheduler.state_dict()
    for name in content.keys() - {"model"}:
        tensors: dict[str, Tensor] = {}
        content[name] = _restore(_set_tensors_aside(content[name], name, tensors), tensors)  # only what will load
    partial = _partial(path)
    with _whole_or_nothing(partial, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)
    return path


def load_checkpoint(
    path: str | Path, *, model: nn.Module, optimizer: Optimizer | None = None, scheduler: Any = None
) -> dict[str, Any]:
    """Load a checkpoint into `model` and, where given, `optimizer` and `scheduler`; returns the rest of its state.

    Args:
        path: A `.pt` file (of `save_checkpoint`, or a plain state dict), a checkpoint folder, or the folder of a run,
            whose newest valid checkpoint is taken.

    Raises:
        CheckpointError: The file is missing or damaged (the message names the newest valid checkpoint beside it), does
            not fit the model, or lacks the state of an optimizer or scheduler that was asked for.
    """
    path = Path(path)
    weights: Path | dict[str, Tensor]
    if path.is_dir():
        newest = path if (path / "manifest.json").exists() else next(valid_checkpoints(path, warn=WARN), path)
        loaded = load_folder(newest)
        weights, state = loaded.model_folder, loaded.state
    else:
        state = _load_file(path)
        weights, state = (state.pop("model"), state) if "model" in state else (state, {})
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


def _load_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"'{path}' does not exist. {_name_valid_neighbour(path)}")
    if _is_damaged_zip(path):
        raise CheckpointError(f"'{path}' is truncated or damaged. {_name_valid_neighbour(path)}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"'{path}' holds more than tensors and plain values, which is never unpickled: save only those ({error})"
        ) from error


def _is_damaged_zip(path: Path) -> bool:
    """torch.load does not notice a flipped byte; the checksums inside the zip file do."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is not None
    except zipfile.BadZipFile:
        return True
