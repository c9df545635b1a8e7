"""A nested state as readable JSON and a folder of tensors, and back, without executing anything."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from llm_trainer.checkpoint import older
from llm_trainer.checkpoint.tensor_files import TensorFolder
from llm_trainer.checkpoint.valid import CheckpointError

JSON_FILES = ("trainer_state.json", "tensors.json")


@dataclass(frozen=True)
class StateFiles:
    """A nested state as it will lie in a checkpoint: text by file name, and the tensors that are named in it."""

    texts: dict[str, str]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Take a state apart; the text is of now, the tensors are those of the state."""
        tensors: dict[str, Tensor] = {}
        contents: tuple[dict[str, Any], dict[str, Any]] = ({}, {})  # without tensors, with tensors
        for name, part in state.items():
            before = len(tensors)
            plain = set_tensors_aside(part, name, tensors)
            contents[len(tensors) > before][name] = plain
        texts = {}
        for file, content in zip(JSON_FILES, contents, strict=True):
            texts[file] = json.dumps(content, indent=1)
        return cls(texts, tensors)

    def write_texts(self, folder: Path) -> None:
        for file, text in self.texts.items():
            (folder / file).write_text(text, encoding="utf-8")


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


def read_tensors(folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, however many ranks wrote them; on the CPU, and mapped where that is possible.

    Args:
        like: The sharded tensor (FSDP2) as whose shards one of this name and of its shape is read, if there is one.
    """
    if (folder / ".metadata").exists():
        return older.read_tensors(folder, like)
    files = TensorFolder(folder)
    tensors = {}
    for name, shape in files.shapes.items():
        model = like(name)
        if model is not None and tuple(model.shape) == shape:
            tensors[name] = files.read_like(name, model)
        else:
            tensors[name] = files.read(name)
    return tensors
