"""Model weights, optimizer state by parameter name, and the state of random generators."""

import json
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_trainer.checkpoint.tensor_files import Shard, TensorFile, TensorFolder, write_files
from llm_trainer.checkpoint.valid import CheckpointError
from llm_trainer.model_group import MODEL
from llm_trainer.models.inside import has_adapters, unwrapped

MODEL_FILE_BYTES = 5 * 10**9  # larger models are several files, which several threads write and verify
IMPLEMENTATION = {"params", "foreach", "fused", "capturable", "differentiable"}  # of this machine, not of the run


def plain_name(name: str) -> str:
    """A parameter's name without what compiled or checkpointed layers insert into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def tensors_by_name(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of `model`: its parameters and persistent buffers themselves; tied ones are one tensor."""
    return {plain_name(name): tensor for name, tensor in unwrapped(model).state_dict(keep_vars=True).items()}


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that is sharded over ranks (FSDP2), which all take part; another tensor itself."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder that is not written yet: its small files (configuration, tokenizer), and its tensors by file.

    Attributes:
        links: files of an earlier checkpoint, by what they are called in this one too.
    """

    small: Mapping[str, bytes] = field(default_factory=dict)
    tensors: Mapping[str, TensorFile] = field(default_factory=dict)
    links: Mapping[str, Path] = field(default_factory=dict)

    def inside(self, folder: str) -> "ModelFiles":
        """The same files in a folder."""

        def moved(files: Mapping[str, Any]) -> dict[str, Any]:
            return {f"{folder}/{name}": content for name, content in files.items()}

        return ModelFiles(moved(self.small), moved(self.tensors), moved(self.links))

    def joined(self, other: "ModelFiles") -> "ModelFiles":
        """These files and others."""
        return ModelFiles(
            {**self.small, **other.small}, {**self.tensors, **other.tensors}, {**self.links, **other.links}
        )

    def write_small(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.small.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def write_model(
    model: nn.Module, folder: str | Path, tokenizer: Any = None, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Write the weights: a transformers model as a Hugging Face folder, any other module as `model.safetensors`.

    Each tensor keeps its dtype; tied weights are written once. A tokenizer is written beside them.

    Args:
        weights: The full tensors of a model that is sharded; by default the model's own.
    """
    files = model_files(model, tokenizer, weights)
    files.write_small(Path(folder))
    write_files(Path(folder), files.tensors)


def model_files(model: nn.Module, tokenizer: Any = None, weights: Mapping[str, Tensor] | None = None) -> ModelFiles:
    """What `write_model` writes; the tensors are those of `weights`, or views of them."""
    model = unwrapped(model)
    if weights is None:
        weights = model.state_dict()
    large: dict[str, TensorFile] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        if is_pretrained(model):
            with without_progress_bars(), _weights_left_out(large):
                model.save_pretrained(folder, state_dict=dict(weights), max_shard_size=MODEL_FILE_BYTES)  # type: ignore[operator]
        else:
            once = {_memory(weights[name]): name for name in reversed(list(weights))}
            large["model.safetensors"] = tensor_file({name: weights[name] for name in once.values()})
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        small = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return ModelFiles(small, large)


def tensor_file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> TensorFile:
    """A file of whole tensors, as they are."""
    shards = {name: Shard.whole(tensor.detach()) for name, tensor in tensors.items()}
    return TensorFile(shards, metadata or {"format": "pt"})


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers draws one for every folder that it reads or writes; the run has its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _weights_left_out(files: dict[str, TensorFile]) -> Iterator[None]:
    """transformers' `save_pretrained` puts its files of weights into `files`, in place of writing them.

    It also asks accelerate what a model is wrapped in. We know that: nothing, by now. accelerate would import DeepSpeed to
    ask it too: a second or more, and a line about accelerators on the screen of a run that does not use it.
    """
    from transformers import modeling_utils

    def keep(weights: dict[str, Tensor], path: str, metadata: Any = None) -> None:
        files[Path(path).name] = tensor_file(weights, metadata)

    theirs: Any = modeling_utils
    unwrap_model, save = theirs.unwrap_model, theirs.safe_save_file
    theirs.unwrap_model, theirs.safe_save_file = lambda model: model, keep
    try:
        yield
    finally:
        theirs.unwrap_model, theirs.safe_save_file = unwrap_model, save


def read_model(model: nn.Module, folder: str | Path) -> None:
    """Load what `write_model` wrote into `model`, in place; see `folders.read_model`."""
    model, folder = unwrapped(model), Path(folder)
    own = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    files = _files_by_name(model, folder)
    if files is None or any(own[name].shape != shape for name, shape in files.shapes.items()):
        load_weights(model, read_weights(model, folder), folder)
        return
    with torch.no_grad():
        for name in files.shapes:
            own[name].copy_(files.read_like(name, own[name]))


def _files_by_name(model: nn.Module, folder: Path) -> TensorFolder | None:
    """The files in a folder if they hold the tensors of `model` just by their names; None: something has to be done to them."""
    if is_pretrained(model):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        conversions = get_model_conversion_mapping(cast(Any, model), add_legacy=False)
        if any(isinstance(conversion, WeightConverter) for conversion in conversions):
            return None
    files = TensorFolder(folder)
    own = tensors_by_name(model)
    given = {_memory(own[name]) for name in files.shapes if name in own}
    missing = [name for name in own if name not in files.shapes and _memory(own[name]) not in given]
    return None if missing or not files.shapes or files.shapes.keys() - own.keys() else files


def read_weights(model: nn.Module, folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a model like `model` that `write_model` wrote; see `folders.read_weights`.

    Args:
        model: may be on the meta device.
    """
    folder, model = Path(folder), unwrapped(model)
    if not is_pretrained(model):
        if not (folder / "model.safetensors").is_file():
            raise CheckpointError(f"'{folder}' has no model.safetensors to load into a {type(model).__name__}")
        return TensorFolder(folder).read_all()
    files = _files_by_name(model, folder)
    if files is not None:
        return files.read_all()
    # transformers renames and merges weights while loading (experts), so its own loader has to do it. It loads all
    # weights in one dtype: the widest of the model, which holds the others exactly.
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        (dtype,) = dtypes
    else:
        dtype = max([torch.float32, *dtypes], key=lambda dtype: dtype.itemsize)
    # NOTE: sharding makes a class of its own of it.
    model_class: Any = next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))
    _check_family(model, folder)
    with without_progress_bars():
        loaded, report = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    problems = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(problems.values()):
        raise CheckpointError(f"the weights in '{folder}' do not fit a {model_class.__name__}: {first_few(problems)}")
    return loaded.state_dict()


def _check_family(model: nn.Module, folder: Path) -> None:
    """transformers reads the weights of another family too, renames what it can, and makes the rest anew.

    Raises:
        CheckpointError: the folder has a model of another family.
    """
    described = folder / "config.json"
    if not described.is_file():
        return  # its own reader says what is missing
    found = json.loads(described.read_text(encoding="utf-8")).get("model_type")
    expected = cast(Any, model).config.model_type
    if found not in (None, expected):
        raise CheckpointError(f"'{folder}' holds a model of type {found}, the run trains one of type {expected}")


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str | Path,
    left_out: Callable[[str], bool] = lambda name: False,
) -> None:
    """Copy named tensors into `model`; of tied parameters one name is enough.

    Args:
        source: Where they come from, for the message.
        left_out: whether a tensor of this name need not be among them, and stays as it is.

    Raises:
        CheckpointError: Names or shapes differ; the model is unchanged.
    """
    model, weights = unwrapped(model), {plain_name(name): tensor for name, tensor in weights.items()}
    names = {plain_name(name): name for name in model.state_dict()}
    own = dict(zip(names, model.state_dict().values(), strict=True))
    given = {_memory(own[name]) for name in weights if name in own}
    problems = {
        "missing": [n for n in own if n not in weights and _memory(own[n]) not in given and not left_out(n)],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": of_another_shape(weights, {name: tensor.shape for name, tensor in own.items()}),
    }
    if any(problems.values()):
        hint = ""
        if has_adapters(model) and not any(name.startswith("base_model.") for name in weights):
            hint = (
                ". They are those of a whole model, and this run trains adapters (adapter_config): expected a save_dir of its "
                "own, or the run as it was"
            )
        raise CheckpointError(
            f"the weights in '{source}' do not fit a {type(model).__name__}: {first_few(problems)}{hint}"
        )
    sharded = {names[name]: shard_like(tensor, own[name]) for name, tensor in weights.items()}
    model.load_state_dict(sharded, strict=False)


def of_another_shape(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> list[str]:
    """The tensors that do not have the shape that the model has under their name, for messages."""
    found = []
    for name, tensor in weights.items():
        if name in shapes and tensor.shape != shapes[name]:
            found.append(f"{name} ({list(tensor.shape)} instead of {list(shapes[name])})")
    return found


def _memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """What two names of one tensor share; a part of a sharded one may be empty and then shares nothing."""
    from torch.distributed.tensor import DTensor

    here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return here.data_ptr() or id(tensor), tensor.shape, tensor.stride()


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """`value` sharded as `like` is, without asking other ranks: they all have all of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def first_few(problems: Mapping[str, list[str]]) -> str:
    """`5 missing: a, b, c, ...; 1 unexpected: d`, of what there is."""
    listed = []
    for kind, names in problems.items():
        shown = names[:3]
        if len(names) > len(shown):
            shown.append("...")
        if names:
            listed.append(f"{len(names)} {kind}: {', '.join(shown)}")
    return "; ".join(listed)


def is_pretrained(model: nn.Module) -> bool:
    """Whether this is a transformers model; transformers (seconds to import) is not imported to say no."""
    return any(base.__module__ == "transformers.modeling_utils" for base in type(model).__mro__)


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
        groups.append(portable_group(group, list(members)))
        state.update({name: dict(optimizer.state[p]) for name, p in members.items() if optimizer.state.get(p)})
    return {"state": state, "param_groups": groups}


def portable_group(group: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """A parameter group with the names of its parameters, and without what is this machine's choice."""
    kept = {key: value for key, value in group.items() if key not in IMPLEMENTATION}
    return kept | {"params": names}


def load_optimizer_state_by_name(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state_by_name` returned, bit for bit (torch would cast to the parameter's dtype).

    Hyper-parameters of the groups (lr, betas, ...) are restored too. Tensors go to their parameter's device, and are
    sharded where the parameter is (FSDP2).

    Raises:
        CheckpointError: The groups hold other parameters than those saved; the optimizer is unchanged.
    """
    names = _parameter_names(model)
    groups, old_groups = optimizer.param_groups, saved["param_groups"]
    members = []
    for group in groups:
        members.append({_name_of(parameter, names): parameter for parameter in group["params"]})
    check_groups(members, old_groups)
    by_row: tuple[str, ...] = getattr(optimizer, "of_rows", ())
    for group, own, old in zip(groups, members, old_groups, strict=True):
        group.update({key: value for key, value in old.items() if key != "params"})
        step_on_host = not (group.get("fused") or group.get("capturable"))  # where torch's kernels read it
        for name, parameter in own.items():
            optimizer.state.pop(parameter, None)
            for key, value in saved["state"].get(name, {}).items():
                on_host = step_on_host and key == "step"
                optimizer.state[parameter][key] = _to_device(value, parameter, on_host, key in by_row)


def check_groups(members: Sequence[Collection[str]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Compare the parameter names of an optimizer's groups with those of saved ones.

    Raises:
        CheckpointError: They differ.
    """
    if len(members) != len(saved):
        raise CheckpointError(f"the checkpoint's optimizer has {len(saved)} parameter groups, this has {len(members)}")
    for index, (own, old) in enumerate(zip(members, saved, strict=True)):
        problems = {
            "missing": [name for name in own if name not in old["params"]],
            "unexpected": [name for name in old["params"] if name not in own],
        }
        if any(problems.values()):
            said = f"the checkpoint's optimizer differs in group {index}: {first_few(problems)}"
            in_group = {f"{MODEL}.{name}" for name in problems["missing"]}
            if in_group == set(problems["unexpected"]):
                said += (
                    ". It is of a run of several models, such as a critic or a reference that moves: go on as that run"
                )
            raise CheckpointError(said)


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: plain_name(name) for name, parameter in unwrapped(model).named_parameters()}


def _name_of(parameter: nn.Parameter, names: Mapping[nn.Parameter, str]) -> str:
    if parameter not in names:
        raise CheckpointError(
            f"the optimizer holds a parameter of shape {list(parameter.shape)} that is not the model's: "
            "build the optimizer from this model's parameters, after the model took its final form"
        )
    return names[parameter]


def _to_device(value: Any, parameter: nn.Parameter, on_host: bool, by_row: bool) -> Any:
    """A copy of a state tensor on its parameter's device, or on the host, and sharded as its parameter is.

    Args:
        value: of the state.
        parameter: whose state it is.
        on_host: it stays on the host.
        by_row: it has a row for each row of the parameter, if not its shape.
    """
    if not isinstance(value, Tensor):
        return value
    if (by_row or value.shape == parameter.shape) and not on_host:
        value = shard_like(value, parameter)
    device = torch.device("cpu") if on_host else parameter.device
    return value.detach().to(device, copy=True)


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
