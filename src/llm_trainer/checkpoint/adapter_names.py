"""What PEFT calls the tensors of a model with adapters, and what they are called in the base without.

Nothing of PEFT is imported here. A model with adapters writes its own folder (`save_pretrained`), of numbers in place of its
tensors: so it says under which key of which file each of them goes, whatever the kind of adapter.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from llm_trainer.checkpoint.weights import (
    is_pretrained,
    plain_name,
    tensors_by_name,
)
from llm_trainer.models.inside import has_adapters, unwrapped

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # of the names of the model in which PEFT has put adapters
INSIDE = ("base_layer", "original_module", "token_adapter")  # what a module of PEFT calls the one that it stands for


@dataclass(frozen=True)
class Layout:
    """How PEFT writes a model.

    Attributes:
        configs: the content of each adapter_config.json, by file.
        names: of the model's tensors, by file and key.
    """

    configs: Mapping[str, dict[str, Any]]
    names: Mapping[str, Mapping[str, str]]

    def files(self) -> dict[str, tuple[str, str]]:
        """File and key by the name of a tensor."""
        found = {}
        for file, names in self.names.items():
            found.update({name: (file, key) for key, name in names.items()})
        return found


def saves_adapters(model: nn.Module) -> bool:
    """Whether a checkpoint of `model` is a PEFT folder: it has adapters, which are tensors of their own, in a transformers
    model."""
    if not has_adapters(model):
        return False
    theirs: Any = model
    names = list(theirs.peft_config)
    has_root = len(names) == 1 or "default" in names
    is_prompt = any(config.is_prompt_learning for config in theirs.peft_config.values())
    return has_root and not is_prompt and is_pretrained(theirs.get_base_model())


def layout_of(model: nn.Module) -> Layout:
    """How PEFT writes `model`, which may be sharded; its tensors are not looked at."""
    theirs: Any = unwrapped(model)
    names = list(theirs.state_dict(keep_vars=True))
    numbers = {name: torch.tensor([number]) for number, name in enumerate(names)}
    configs: dict[str, dict[str, Any]] = {}
    found: dict[str, dict[str, str]] = {}
    with TemporaryDirectory() as written, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of embeddings that it would or would not save: the base is not its business
        theirs.save_pretrained(written, state_dict=numbers, save_embedding_layers=False)
        root = _root(theirs, Path(written))
        for path in sorted(root.rglob(WEIGHTS_FILE)):
            keys: dict[str, str] = {}
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # not a mapping
                    (number,) = file.get_tensor(key).tolist()
                    keys[plain_name(key)] = plain_name(names[number])
            folder = path.parent.relative_to(root)
            found[(folder / WEIGHTS_FILE).as_posix()] = keys
            config = json.loads((path.parent / CONFIG_FILE).read_text(encoding="utf-8"))
            configs[(folder / CONFIG_FILE).as_posix()] = config
    return Layout(configs, found)


def _root(model: Any, written: Path) -> Path:
    """Where the first adapter is: PEFT writes each into a folder of its name, unless it is called 'default'."""
    names = list(model.peft_config)
    return written / names[0] if len(names) == 1 and names != ["default"] else written


def base_names(model: nn.Module, layout: Layout | None = None) -> dict[str, str]:
    """Names of what PEFT's folder leaves out, by the names that they have in the base without adapters.

    Of tied tensors the first name, as `Engine.stream_weights` has it.

    Args:
        layout: that of the model, where it is known.
    """
    model = unwrapped(model)
    adapters = (layout or layout_of(model)).files()
    tensors = model.state_dict(keep_vars=True)
    # What several layers share is saved under one of its names, as the rows of new tokens of tied embeddings are.
    seen = {id(tensor) for raw_name, tensor in tensors.items() if plain_name(raw_name) in adapters}
    found = {}
    for raw_name, tensor in tensors.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[_name_in_base(model, raw_name)] = plain_name(raw_name)
    return found


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What PEFT's folder leaves out, by its names in the base."""
    own = tensors_by_name(model)
    return {original: own[name] for original, name in base_names(model).items()}


def _name_in_base(model: nn.Module, name: str) -> str:
    kept, module = [], model.get_submodule(PREFIX.rstrip("."))
    for step in name.removeprefix(PREFIX).split("."):
        is_theirs = type(module).__module__.startswith("peft.")
        if not (is_theirs and step in INSIDE):
            kept.append(step)
        module = module._modules.get(step) or module
    return plain_name(".".join(kept))
