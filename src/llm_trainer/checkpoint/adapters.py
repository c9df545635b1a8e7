"""Models with adapters (`peft`): a checkpoint holds what was trained, as a folder of PEFT's, and says where the base is.

model/
  adapter_config.json, adapter_model.safetensors   as PEFT writes them: `PeftModel.from_pretrained(base, "model")`
  base.json                                        where the base is, and what tells it from others (`Base`)
  base/                                            the base itself, where it is nowhere else
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from llm_trainer.checkpoint.adapter_bases import BASE_FILE, BASE_FOLDER, Base, skeleton_of
from llm_trainer.checkpoint.adapter_names import CONFIG_FILE, WEIGHTS_FILE, Layout, base_names, layout_of
from llm_trainer.checkpoint.tensor_files import TensorFolder
from llm_trainer.checkpoint.valid import CheckpointError
from llm_trainer.checkpoint.weights import (
    ModelFiles,
    first_few,
    model_files,
    plain_name,
    read_weights,
    tensor_file,
    tensors_by_name,
)
from llm_trainer.models.inside import unwrapped


@dataclass(frozen=True)
class Saved:
    """What of a model with adapters one checkpoint holds.

    Attributes:
        base: what it stands on.
        layout: how PEFT writes it.
        more: names of what is trained and none of PEFT's business, such as a norm that somebody has unfrozen: it lies
            beside the adapters under its own name, by which PEFT loads it.
        linked: the folder of an earlier checkpoint that has the base, which is then not written again.
    """

    base: Base
    layout: Layout
    more: tuple[str, ...]
    linked: Path | None = None

    @classmethod
    def of(cls, model: nn.Module, base: Base, stepped: Collection[str], linked: Path | None) -> "Saved":
        """
        Args:
            model: has adapters.
            base: of it.
            stepped: names of parameters that the optimizer has ever updated.
            linked: see above.
        """
        layout = layout_of(model)
        tensors = tensors_by_name(model)
        theirs = {id(tensors[name]) for name in layout.files()}
        more = []
        for name, tensor in tensors.items():
            if id(tensor) not in theirs and (tensor.requires_grad or name in stepped):
                more.append(name)
        return cls(base, layout, tuple(more), linked)

    def writes_base(self) -> bool:
        return self.base.source is None and self.linked is None

    def names(self, model: nn.Module) -> list[str]:
        """Of the tensors that are needed."""
        wanted = [*self.layout.files(), *self.more]
        if self.writes_base():
            wanted += base_names(model, self.layout).values()
        return list(dict.fromkeys(wanted))

    def trained(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors without the base."""
        return {name: weights[name] for name in (*self.layout.files(), *self.more)}

    def files(self, model: nn.Module, tokenizer: Any, weights: Mapping[str, Tensor]) -> ModelFiles:
        """The folder of `model`."""
        inner = unwrapped(model).get_base_model()  # type: ignore[operator]
        small: dict[str, bytes] = {}
        with TemporaryDirectory() as written:
            if inner.can_generate() and inner.generation_config is not None:
                inner.generation_config.save_pretrained(written)
            if tokenizer is not None:
                tokenizer.save_pretrained(written)
            for path in sorted(Path(written).rglob("*")):
                if path.is_file():
                    small[path.relative_to(written).as_posix()] = path.read_bytes()
        for file, config in self.layout.configs.items():
            small[file] = _as_json(self._config(config))
        small[BASE_FILE] = _as_json(asdict(self.base))
        tensors = {}
        for file, names in self.layout.names.items():
            tensors[file] = {key: weights[name] for key, name in names.items()}
        tensors[WEIGHTS_FILE].update({name: weights[name] for name in self.more})
        files = ModelFiles(small, {file: tensor_file(content) for file, content in tensors.items()})
        if self.linked is not None:
            links = {path.relative_to(self.linked).as_posix(): path for path in _files_of(self.linked / BASE_FOLDER)}
            return replace(files, links=links)
        if not self.writes_base():
            return files
        originals = {original: weights[name] for original, name in base_names(model, self.layout).items()}
        base = model_files(skeleton_of(inner), None, originals)
        return files.joined(base.inside(BASE_FOLDER))

    def _config(self, config: dict[str, Any]) -> dict[str, Any]:
        """An adapter_config.json as it is to be opened: on the base as it is, and not on one that is changed once more."""
        config = config | {"base_model_name_or_path": self.base.source, "revision": self.base.revision}
        if isinstance(config.get("init_lora_weights"), str):
            config["init_lora_weights"] = True  # PiSSA, OLoRA and their like take out of the base what they begin with
            config |= {"eva_config": None, "lora_ga_config": None}
        return config


def _as_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=2).encode()


def _files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def read_adapters(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What the folder of adapters has of `model`, by its names; with the base, where that is kept in the folder.

    Raises:
        CheckpointError: it holds something that `model` does not have.
    """
    layout = layout_of(model)
    found: dict[str, Tensor] = {}
    if (folder / BASE_FOLDER).is_dir():
        inner = unwrapped(model).get_base_model()  # type: ignore[operator]
        base = read_weights(skeleton_of(inner), folder / BASE_FOLDER)
        names = base_names(model, layout)
        found = {name: base[original] for original, name in names.items() if original in base}
    own = {plain_name(name) for name in unwrapped(model).state_dict(keep_vars=True)}
    unexpected = []
    for file, keys in layout.names.items():
        tensors = TensorFolder((folder / file).parent)
        for key in tensors.shapes:
            name = keys.get(key, key)
            if name not in own:
                unexpected.append(key)
                continue
            found[name] = tensors.read(key)
    if unexpected:
        raise CheckpointError(
            f"the adapters in '{folder}' do not fit this model: {first_few({'unexpected': unexpected})}. Expected adapters "
            f"of the same kind, on the same layers: {CONFIG_FILE} says which"
        )
    return found
