"""How a model is loaded with weights in 4 or 8 bits, by bitsandbytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_trainer.config.errors import ConfigError, require
from llm_trainer.config.quantization import QuantizationConfig
from llm_trainer.models.inside import auto_class
from llm_trainer.models.quantize import hush, is_quantized
from llm_trainer.models.targets import ends_in

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STORAGE = {"uint8": torch.uint8, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WITHOUT = "leave quantization_config out, which keeps the weights as they are"


def loading_options(
    config: QuantizationConfig, source: str | Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Keywords of `from_pretrained` that quantize what is loaded.

    Args:
        config: how.
        source: the folder or hub name that will be loaded.
        device: where the weights will be.
        dtype: that layers are multiplied in.

    Raises:
        ConfigError: packages are missing, the model is quantized already, or a name is not in it.
    """
    _require("quantization_config", WITHOUT)
    from transformers import AutoConfig, BitsAndBytesConfig
    from transformers.quantizers.base import get_keys_to_not_convert

    described = AutoConfig.from_pretrained(source)
    if getattr(described, "quantization_config", None) is not None:
        raise ConfigError(
            f"quantization_config: {source} is quantized already, as its config.json says; leave the section out"
        )
    with torch.device("meta"):
        empty = auto_class(described).from_config(described)
    skipped = [*get_keys_to_not_convert(empty), *_found(empty, config.skip_modules)]
    if config.bits == 8:
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    else:
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.kind,
            bnb_4bit_use_double_quant=config.double,
            bnb_4bit_quant_storage=STORAGE[config.storage],
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        )
    return {"quantization_config": how, "device_map": {"": device}}


def _found(model: "PreTrainedModel", endings: list[str]) -> list[str]:
    """The names of the layers that are meant.

    Raises:
        ConfigError: an ending matches none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    found: list[str] = []
    for ending in endings:
        meant = [name for name in names if ends_in(name, ending)]
        if not meant:
            leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ConfigError(
                f"quantization_config.skip_modules: {ending} matches no layer of this {type(model).__name__}; its layers "
                f"end in {leaves}"
            )
        found += meant
    return found


def loading_again(described: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `from_pretrained` that quantize as a model was, by what its configuration said of it; on the CPU.

    Raises:
        ConfigError: packages are missing.
    """
    _require("adapters that were trained on weights in few bits", "merge them where it is")
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig.from_dict(dict(described))
    return {"quantization_config": how, "device_map": {"": torch.device("cpu")}}


def _require(what: str, instead: str) -> None:
    for package in ("bitsandbytes", "accelerate"):
        require(package, what, instead)
    hush()


def check_quantized(model: torch.nn.Module) -> None:
    """
    Raises:
        ConfigError: no layer of a model that was to be quantized is.
    """
    if not is_quantized(model):
        raise ConfigError(
            f"quantization_config: this {type(model).__name__} is not loaded in few bits here; expected a language model "
            f"under adapters. To train this one, {WITHOUT}"
        )
