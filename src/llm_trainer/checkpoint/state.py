"""A nested state as readable JSON and a folder of tensors, and back, without executing anything."""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_trainer.checkpoint.valid import CheckpointError

JSON_FILES = ("trainer_state.json", "tensors.json")


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `state` as two JSON files and a folder of tensors, unless all ranks together have written that one."""
    tensors: dict[str, Tensor] = {}
    contents: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # without tensors, with tensors
    for name, part in state.items():
        before = len(tensors)
        plain = set_tensors_aside(part, name, tensors)
        contents[len(tensors) > before][name] = plain
    for file, content in zip(JSON_FILES, contents, strict=True):
        (folder / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
    if tensors and not (folder / "tensors").exists():
        write_tensors(folder / "tensors", tensors)


def set_tensors_aside(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON that `restore` turns back exactly, with its tensors moved to `tensors[path]`."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return {"!tensor": path}
    if isinstance(value, Mapping):
        items = [(key, set_tensors_aside(item, f"{path}/{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("!") for key, _ in items):
            return dict(items)
        return {"!items": [[set_tensors_aside(key, path, tensors), item] for key, item in items]}
    if isinstance(value, list | tuple):
        listed = [set_tensors_aside(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
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


def restore(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [restore(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match list(value.items()):
        case [("!tensor", name)]:
            return tensors[name]
        case [("!tuple", items)]:
            return tuple(restore(item, tensors) for item in items)
        case [("!items", items)]:
            return {restore(key, tensors): restore(item, tensors) for key, item in items}
    return {key: restore(item, tensors) for key, item in value.items()}


def write_tensors(folder: Path, tensors: dict[str, Tensor], together: bool = False) -> None:
    """Write tensors in the format of `torch.distributed.checkpoint`, from this process alone or all ranks `together`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    failure: BaseException | None = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=not together)
        except CheckpointException as error:  # not an Exception in torch; what happened is inside
            failure = next(iter(error.failures.values()))[0]
    if failure is not None:
        raise failure  # out of the except block, which would overwrite its context: the system's own error


def read_tensors(folder: Path, like: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Tensor]:
    """Read all tensors that any number of ranks wrote with `torch.distributed.checkpoint`, onto the CPU.

    Args:
        like: The sharded tensor (FSDP2) as whose shards one of this name and of its shape is read, if there is one.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / ".metadata").open("rb") as file:
                return _MetadataUnpickler(file).load()

    reader = Reader(folder)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue  # bytes would be unpickled: not ours, never read
        model, dtype = like(name), entry.properties.dtype
        if model is not None and model.shape == entry.size:
            tensors[name] = torch.empty_like(model, dtype=dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
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
