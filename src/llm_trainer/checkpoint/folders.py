"""The folders of the models that a run saves: each under its name, and of models with adapters what these are.

A model that shares weights with one of which the adapters alone are saved, such as a critic on its body, is saved without
these: its folder holds what it has alone, and in shared.json where the rest is.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llm_trainer.checkpoint import adapter_bases, adapter_names, adapters, weights
from llm_trainer.checkpoint.adapter_bases import Base
from llm_trainer.checkpoint.adapters import Saved
from llm_trainer.checkpoint.tensor_files import TensorFolder
from llm_trainer.checkpoint.valid import CheckpointError
from llm_trainer.checkpoint.weights import ModelFiles, load_weights, model_files, tensor_file, tensors_by_name
from llm_trainer.model_group import MODEL, ModelGroup, members_of, weights_by_member, weights_of_group
from llm_trainer.models.inside import unwrapped

SHARED_FILE = "shared.json"


def names_alone(model: nn.Module, name: str, others: Collection[str]) -> set[str] | None:
    """Names of the tensors of a model in a group that are none of some others'; None: it shares none with these.

    Args:
        model: the group.
        name: of the one.
        others: names of the others, and perhaps its own.
    """
    members = members_of(unwrapped(model))
    theirs: set[int] = set()
    for other in set(others) - {name}:
        theirs |= set(map(id, tensors_by_name(members[other]).values()))
    own = tensors_by_name(members[name])
    alone = {inner for inner, tensor in own.items() if id(tensor) not in theirs}
    return alone if len(alone) < len(own) else None


def group_files(
    model: nn.Module, tokenizer: Any, tensors: Mapping[str, Tensor], with_adapters: Mapping[str, Saved]
) -> ModelFiles:
    """The folders of the models that a run saves, each under its name; the tokenizer is in that of the first.

    Args:
        model: a model, or a group of several.
        tensors: by their names in it; none on other processes than the main one.
        with_adapters: what is saved of those whose adapters alone learn, by name.
    """
    files = ModelFiles()
    by_member = weights_by_member(unwrapped(model), tensors)
    for name, member in members_of(unwrapped(model)).items():
        of_member = tokenizer if name == MODEL else None
        alone = names_alone(model, name, with_adapters)
        if name in with_adapters:
            found = with_adapters[name].files(member, of_member, by_member[name])
        elif alone is not None:
            rest = {"class": type(member).__name__, "the rest is in": sorted(with_adapters)}
            large = {"model.safetensors": tensor_file({inner: by_member[name][inner] for inner in sorted(alone)})}
            found = ModelFiles({SHARED_FILE: json.dumps(rest, indent=2).encode()}, large)
        else:
            found = model_files(member, of_member, by_member[name])
        files = files.joined(found.inside(name))
    return files


def read_model(model: nn.Module, folder: str | Path) -> None:
    """Load what a checkpoint has of `model`, in place, bit for bit; dtypes and devices stay as they are.

    Non-persistent buffers (rotary frequencies) are not in a checkpoint: they keep what the model was built with; nor is the
    base of a model with adapters, where it can be had elsewhere.

    Of a group of models each is read from its own folder; `folder` is that of the first.

    Raises:
        CheckpointError: Names or shapes differ, or the folder of a model is missing.
    """
    model, folder = unwrapped(model), Path(folder)
    if isinstance(model, ModelGroup):
        for name, member in members_of(model).items():
            place = _folder_of_member(folder, name)
            if (place / SHARED_FILE).is_file():
                _read_rest(model, name, place)
            else:
                read_model(member, place)
    elif _is_of_adapters(model, folder):
        load_weights(model, adapters.read_adapters(model, folder), folder, left_out(model, [MODEL]))
    else:
        weights.read_model(model, folder)


def read_weights(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """The tensors that a checkpoint has of a model like `model`, on the CPU; mapped where nothing has to be done to them.

    Of a group of models each is read from its own folder; `folder` is that of the first.

    Raises:
        CheckpointError: The folder holds another model, or one is missing.
    """
    folder, model = Path(folder), unwrapped(model)
    if isinstance(model, ModelGroup):
        found = {}
        for name, member in members_of(model).items():
            place = _folder_of_member(folder, name)
            is_rest = (place / SHARED_FILE).is_file()
            found[name] = TensorFolder(place).read_all() if is_rest else read_weights(member, place)
        return weights_of_group(model, found)
    if _is_of_adapters(model, folder):
        return adapters.read_adapters(model, folder)
    return weights.read_weights(model, folder)


def bases_in(model: nn.Module, folder: str | Path) -> dict[str, Base]:
    """What the adapters in a checkpoint stand on, by name; `folder` is that of the first model."""
    found = {}
    for name in members_of(unwrapped(model)):
        base = adapter_bases.read_base(Path(folder).with_name(name))
        if base is not None:
            found[name] = base
    return found


def check_bases(model: nn.Module, bases: Mapping[str, Base], source: str | Path) -> None:
    """Compare the bases of models that are not sharded with those that adapters were trained on.

    Args:
        bases: by name.
        source: where the adapters are, for the message.

    Raises:
        CheckpointError: one is another.
    """
    for name, member in members_of(unwrapped(model)).items():
        if name in bases and adapter_names.saves_adapters(member):
            own = adapter_bases.fingerprint_of(member)
            adapter_bases.check_base(own, "this model's", bases[name], Path(source))


def left_out(model: nn.Module, bases: Collection[str]) -> Callable[[str], bool]:
    """Whether a checkpoint leaves out a tensor of `model`, of this name: that of a base, which can be had elsewhere.

    Args:
        bases: names of the models of which it holds the adapters alone.
    """
    model = unwrapped(model)
    kept: set[str] = set()
    for name, member in members_of(model).items():
        prefix = ""
        if isinstance(model, ModelGroup):
            prefix = f"{name}."
        own = list(tensors_by_name(member))
        if name in bases and adapter_names.saves_adapters(member):
            own = list(adapter_names.layout_of(member).files())
        elif bases:
            own = list(names_alone(model, name, bases) or own)
        kept |= {f"{prefix}{inner}" for inner in own}
    return lambda name: name not in kept


def _read_rest(model: ModelGroup, name: str, folder: Path) -> None:
    """Load what a model of a group has alone; the others have the rest.

    Raises:
        CheckpointError: it is something else here.
    """
    alone = names_alone(model, name, list(members_of(model))) or set()
    load_weights(members_of(model)[name], TensorFolder(folder).read_all(), folder, lambda inner: inner not in alone)


def _is_of_adapters(model: nn.Module, folder: Path) -> bool:
    """
    Raises:
        CheckpointError: the folder holds adapters, and the model has none.
    """
    base = adapter_bases.read_base(folder)
    if base is not None and not adapter_names.saves_adapters(model):
        raise CheckpointError(
            f"'{folder}' holds the adapters of a model, and this {type(model).__name__} has none. Expected the model with its "
            f"adapters around it: peft.PeftModel.from_pretrained(base, '{folder}', is_trainable=True), of {base}; or, for all "
            f"weights in one, set init_weights_path"
        )
    return base is not None


def _folder_of_member(first: Path, name: str) -> Path:
    """Where a model of a group lies, beside the first one.

    Raises:
        CheckpointError: it does not.
    """
    folder = first.with_name(name)
    if not folder.is_dir():
        raise CheckpointError(
            f"'{first.parent}' holds no {name}, which this run saves too: it is of another algorithm, or of a run whose "
            f"reference did not move. For the weights of its model alone set init_weights_path"
        )
    return folder
