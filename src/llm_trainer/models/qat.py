"""Weights that are trained as they will be in 4 or 8 bits (QAT), by torchao. The only file that imports it, in functions.

Every layer but the head multiplies with its weights as they will be rounded: in groups of 32 with a scale each, as whole
numbers of 4 or 8 bits. The gradient passes the rounding as if it were not there (Jacob et al. 2018, arXiv 1712.05877).
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_trainer.config.errors import ConfigError, require
from llm_trainer.models.inside import sees_images, transformers_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 32  # weights with one scale
KEY = "qat"  # in the config.json of a model that was trained so: how


def prepare(model: "PreTrainedModel", kind: str) -> None:
    """Let the layers of a model compute with weights as they will be rounded; before its optimizer is made.

    Args:
        model: whose weights are all there, and trained.
        kind: int4 or int8.

    Raises:
        ConfigError: torchao is missing, or a layer cannot be cut into groups.
    """
    require("torchao", "quantization_config.qat", "leave it out")
    _check(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

        quantize_(model, QATConfig(_rounding(kind), step="prepare"), _is_meant(model))
    setattr(model.config, KEY, kind)


def convert(model: "PreTrainedModel", kind: str) -> None:
    """Turn the layers of a model into ones of torchao in few bits, which compute what the prepared ones did.

    Args:
        model: prepared or, as its folder is opened, plain.
        kind: that it was prepared for.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig
        from torchao.quantization.qat.linear import FakeQuantizedLinear

        if any(isinstance(module, FakeQuantizedLinear) for module in model.modules()):
            quantize_(model, QATConfig(_rounding(kind), step="convert"))
        else:
            quantize_(model, _rounding(kind), _is_meant(model))


def forget(model: nn.Module) -> None:
    """A model that was trained so before, and is trained plain from now on."""
    inner = transformers_model(model)
    if inner is not None and kind_of(inner) is not None:
        delattr(inner.config, KEY)


def kind_of(model: "PreTrainedModel") -> str | None:
    """How a model that was opened has been trained; None: with plain weights."""
    kind: str | None = getattr(model.config, KEY, None)
    return kind


def round_weights(model: "PreTrainedModel") -> None:
    """Give a model that was trained so, and is opened plain, the numbers that it computed with; it is plain from then on.

    Raises:
        ConfigError: torchao is missing.
    """
    kind = kind_of(model)
    assert kind is not None
    require(
        "torchao", f"a model that was trained for {kind} (quantization_config.qat)", "export it where it was trained"
    )
    is_meant = _is_meant(model)
    convert(model, kind)
    for name, module in model.named_modules():
        if is_meant(module, name):
            weight: Any = module.weight
            module.weight = nn.Parameter(weight.dequantize())
    delattr(model.config, KEY)


def _rounding(kind: str) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=getattr(torch, kind), granularity=PerGroup(GROUP))


def _is_meant(model: "PreTrainedModel") -> Callable[[nn.Module, str], bool]:
    """Of a module and its name, whether it is a layer whose weights are rounded."""
    head = model.get_output_embeddings()

    def is_meant(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module is not head

    return is_meant


def _check(model: "PreTrainedModel") -> None:
    """
    Raises:
        ConfigError: a layer cannot be cut into groups, or there are others than layers of a language model.
    """
    if sees_images(model.config):
        raise ConfigError(
            "quantization_config.qat: this model reads images, and its tower would be rounded too, which was never tried; "
            "expected a language model"
        )
    is_meant = _is_meant(model)
    layers = {name: module for name, module in model.named_modules() if is_meant(module, name)}
    for name, layer in layers.items():
        width = layer.in_features
        assert isinstance(width, int)
        if width % GROUP:
            raise ConfigError(
                f"quantization_config.qat: {name} has {width} inputs, and weights are rounded in groups of {GROUP} along "
                f"them; expected a multiple"
            )
