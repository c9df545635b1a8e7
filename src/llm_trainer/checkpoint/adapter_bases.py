"""What adapters stand on: where their base is, and what tells it from others."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from llm_trainer.checkpoint.adapter_names import (
    CONFIG_FILE,
    base_tensors,
    saves_adapters,
)
from llm_trainer.checkpoint.tensor_files import TensorFolder, bytes_of
from llm_trainer.checkpoint.valid import THREADS, CheckpointError
from llm_trainer.checkpoint.weights import (
    read_weights,
    tensors_by_name,
)
from llm_trainer.models.inside import unwrapped
from llm_trainer.models.quantize import is_in_few_bits, is_made_of

BASE_FILE, BASE_FOLDER = "base.json", "base"
# Settings of a model that change no logits.
OF_NO_NUMBER = {"architectures", "dtype", "torch_dtype", "use_cache", "output_router_logits", "transformers_version"}
OF_NO_NUMBER |= {"bos_token_id", "eos_token_id", "pad_token_id", "name_or_path", "problem_type"}
OF_NO_NUMBER |= {"qat"}  # for what bits the weights were trained
# Settings of bitsandbytes that change what weights become, beside the layers that are left out.
OF_BITS = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")


@dataclass(frozen=True)
class Base:
    """What adapters stand on: the content of `base.json`.

    Attributes:
        source: the folder, or the name on the hub, that it was loaded from; None: it is in the folder `base` beside this.
        revision: of a name on the hub.
        fingerprint: see `fingerprint`; None: nobody knows, since it was not us who wrote the adapters.
        architecture: transformers' class.
        dtype: of its numbers, such as 'float32'.
        quantization: how its weights are kept in fewer bits, as its configuration says.
        kept_because: why it is in the folder `base`; empty where it is not.
        began_as: where the base came from before an initialisation of adapters changed it, of one in the folder `base`.
        active: names of the adapters that compute, where there are several; the first one is called 'default'.
    """

    source: str | None
    revision: str | None = None
    fingerprint: str | None = None
    architecture: str = ""
    dtype: str = ""
    quantization: dict[str, Any] | None = None
    kept_because: str = ""
    began_as: str | None = None
    active: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = "the folder 'base' beside the adapters"
        if self.source is not None:
            place = f"'{self.source}'"
            if self.revision is not None:
                place += f" (revision {self.revision})"
        if self.quantization is not None:
            place += " in few bits,"
        return f"{place} with the fingerprint {self.fingerprint}"


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A short hash of names, types, shapes and bits; of tied tensors one is given."""
    with ThreadPoolExecutor(THREADS) as pool:
        lines = sorted(pool.map(_line_of, tensors))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def fingerprint_of(model: nn.Module) -> str:
    """That of the base of a model with adapters, which is not sharded."""
    inner = unwrapped(model).get_base_model()  # type: ignore[operator]
    if _quantization_of(inner) is not None:
        base = find_base(model)
        if base is not None and base.fingerprint is not None:
            return base.fingerprint
    return fingerprint(base_tensors(model).items())


def _line_of(named: tuple[str, Tensor]) -> str:
    name, tensor = named
    return f"{name} {tensor.dtype} {list(tensor.shape)} {hashlib.sha256(bytes_of(tensor)).hexdigest()}"


def find_base(model: nn.Module) -> Base | None:
    """What `model`, which is not sharded yet, stands on: looked for where it was loaded from, and compared bit for bit.

    None: it has no adapters, or a checkpoint cannot hold these alone. Then it holds all of the model.
    """
    if not saves_adapters(model):
        return None
    theirs: Any = unwrapped(model)
    inner = theirs.get_base_model()
    tensors = base_tensors(theirs)
    active: tuple[str, ...] = ()
    if len(theirs.peft_config) > 1:
        active = tuple(theirs.active_adapters)
    base = Base(
        source=inner.name_or_path or None,
        revision=getattr(inner.config, "_commit_hash", None),
        architecture=class_of(inner).__name__,
        dtype=str(inner.dtype).removeprefix("torch."),
        quantization=_quantization_of(inner),
        active=active,
    )
    if base.quantization is None:
        base = replace(base, fingerprint=fingerprint(tensors.items()))
    folder = None if base.source is None else place_of(base.source, base.revision)
    if base.source is None:
        because = "it was made in memory, and loaded from nowhere"
    elif folder is None:
        because = f"there is no model at '{base.source}', where it says to come from"
    else:
        if Path(base.source).is_dir():
            base = replace(base, source=str(Path(base.source).absolute()))
        other = _first_difference(inner, tensors, folder)
        if other is None and base.quantization is not None:
            return replace(base, fingerprint=fingerprint_in_few_bits(inner, folder, tensors))
        if other is None:
            return base
        because = f"it is not the model at '{base.source}' any more: {other} differs"
    if base.quantization is not None:
        return None
    began_as = base.source if folder is not None else None
    return replace(base, source=None, revision=None, kept_because=because, began_as=began_as)


def _quantization_of(inner: Any) -> dict[str, Any] | None:
    """How the weights of a model are kept in few bits; None: they are not."""
    config = getattr(inner.config, "quantization_config", None)
    return config if config is None or isinstance(config, dict) else config.to_dict()


def fingerprint_in_few_bits(inner: Any, folder: Path, tensors: Mapping[str, Tensor]) -> str:
    """That of a base whose weights are in few bits: of the weights that these were made of, and how.

    NOTE: not of the bits. Their scales are scaled themselves, by a mean whose last bit depends on the number of threads and
    on the device: on another machine the same base would look like another one.

    Args:
        inner: the base.
        folder: that it was loaded from.
        tensors: of the base; they are looked at where the folder holds the bits themselves.
    """
    if _holds_bits(inner, folder):
        return fingerprint(tensors.items())
    quantization = _quantization_of(inner) or {}
    settings = {name: quantization.get(name) for name in OF_BITS}
    settings["skipped"] = sorted(quantization.get("llm_int8_skip_modules") or ())
    weights = _weights_in(inner, folder)
    found = fingerprint((name, weight.to(inner.dtype)) for name, weight in weights.items())
    return hashlib.sha256(f"{found} {json.dumps(settings)}".encode()).hexdigest()[:32]


def _holds_bits(inner: Any, folder: Path) -> bool:
    """Whether the weights in a folder are in few bits already."""
    config = class_of(inner).config_class.from_pretrained(folder)
    return getattr(config, "quantization_config", None) is not None


def _weights_in(inner: Any, folder: Path) -> dict[str, Tensor]:
    """The weights in a folder, of tied ones the first, by the names in a model like the base."""
    if _quantization_of(inner) is not None and _holds_bits(inner, folder):
        return TensorFolder(folder).read_all()
    skeleton = skeleton_of(inner)
    with torch.random.fork_rng(devices=[]):  # what is missing there would be drawn
        found = read_weights(skeleton, folder)
    seen: dict[int, str] = {}
    for name, tensor in tensors_by_name(skeleton).items():
        seen.setdefault(id(tensor), name)
    return {name: found[name] for name in seen.values() if name in found}


def place_of(source: str, revision: str | None) -> Path | None:
    """The folder of a model: a path, or what was downloaded of a name on the hub; None: it is not here."""
    if Path(source).is_dir():
        return Path(source)
    if source.startswith((".", "/", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(source, "config.json", revision=revision)
    except HFValidationError:  # no name that the hub could have
        return None
    return Path(found).parent if isinstance(found, str) else None


def class_of(model: nn.Module) -> Any:
    """The class of a model, also where sharding has made another one of it."""
    return next(kind for kind in type(model).__mro__ if not kind.__name__.startswith("FSDP"))


def skeleton_of(inner: Any) -> nn.Module:
    """A model like the base, without adapters and without weights."""
    with torch.device("meta"):
        skeleton = class_of(inner)(deepcopy(inner.config))
    skeleton.generation_config = getattr(inner, "generation_config", None)
    return skeleton


def _first_difference(inner: Any, tensors: Mapping[str, Tensor], folder: Path) -> str | None:
    """The first tensor of a base that is another one in a folder, or is not there."""
    in_few_bits = _quantization_of(inner) is not None
    dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if dtypes != {inner.dtype} and not in_few_bits:
        return f"the type of some weights ({', '.join(sorted(map(str, dtypes)))})"
    try:
        there = class_of(inner).config_class.from_pretrained(folder).to_dict()
        own = inner.config.to_dict()
        if in_few_bits:
            own["quantization_config"] = there.get("quantization_config")
        setting = _other_setting(own, there)
        if setting is not None:
            return f"{setting} of its configuration"
        theirs = _weights_in(inner, folder)
    except (CheckpointError, OSError, SafetensorError) as error:
        return f"what lies there ({error})"
    if in_few_bits and not _holds_bits(inner, folder):
        tensors, changed = _not_in_few_bits(tensors, theirs, inner.dtype)
        if changed is not None:
            return changed
    for name, tensor in tensors.items():
        other = theirs.get(name)
        if other is None or other.shape != tensor.shape:
            return name
        if not torch.equal(other.to(tensor.dtype), tensor.detach().cpu()):
            return name
    return None


def _not_in_few_bits(
    tensors: Mapping[str, Tensor], theirs: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors that are as they were loaded, and the first of the others that was not made of those in a folder.

    Args:
        tensors: of a base.
        theirs: the weights in the folder.
        dtype: that these were read in, before they were quantized.
    """
    scales: set[str] = set()
    for name, tensor in tensors.items():
        if not is_in_few_bits(tensor):
            continue
        layer = name.removesuffix("weight")
        scales.update(other for other in tensors if other.startswith(layer) and other != f"{layer}bias")
        weight = theirs.get(name)
        if weight is None or not is_made_of(tensor, tensors.get(f"{layer}SCB"), weight.to(dtype)):
            return {}, name
    return {name: tensor for name, tensor in tensors.items() if name not in scales}, None


def _other_setting(own: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """The first setting by which two configurations compute something else, such as the type of RoPE."""
    for name in sorted(own.keys() | there.keys(), key=str):  # labels go by number
        if name in OF_NO_NUMBER or str(name).startswith("_") or "dropout" in str(name):
            continue
        ours, theirs = own.get(name), there.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            inside = _other_setting(ours, theirs)
            if inside is not None:
                return f"{name}.{inside}"
        elif ours != theirs:
            return name
    return None


def check_base(own: str | None, whose: str, there: Base, folder: Path, fix: str = "") -> None:
    """Compare the base of a model with the one that adapters were trained on.

    Args:
        own: fingerprint of the former.
        whose: it is, for the message.
        there: the latter.
        folder: of the adapters.
        fix: what to do; empty: load the right one.

    Raises:
        CheckpointError: it is another one, and the right one is not in the folder.
    """
    if there.source is None or there.fingerprint is None or there.fingerprint == own:
        return
    fix = fix or f"load the base from '{there.source}' as {there.dtype}"
    raise CheckpointError(
        f"the adapters in '{folder}' were trained on {there}, and {whose} base has the fingerprint {own}: it is another "
        f"model, or the same one in another dtype. Expected the same weights bit for bit: {fix}"
    )


def base_of(content: Mapping[str, Any]) -> Base:
    """What `base.json` says."""
    return Base(**(content | {"active": tuple(content.get("active", ()))}))  # type: ignore[operator]


def read_base(folder: Path) -> Base | None:
    """What the adapters in a folder stand on; None: there are none.

    Raises:
        CheckpointError: base.json is none of ours.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    try:
        if (folder / BASE_FILE).is_file():
            return base_of(json.loads((folder / BASE_FILE).read_text(encoding="utf-8")))
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"'{folder}': {BASE_FILE} or {CONFIG_FILE} cannot be read ({error})") from None
    return Base(config.get("base_model_name_or_path"), config.get("revision"))
