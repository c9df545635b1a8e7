"""Products of a language model's layers in 8-bit floating point while it is trained, by torchao. Imported in functions.

Both factors of a product are scaled to the range of 8 bits and rounded (Micikevicius et al. 2022, arXiv 2209.05433); weights,
and what lies between layers, stay as they are. Only what is trained on is computed so: in evaluation mode a layer multiplies
plainly, so that layouts, evaluations, samples and probes see what the weights are and not what they were rounded to.
"""

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trainer.config.errors import ConfigError, require
from llm_trainer.models.experts import recorded_routers
from llm_trainer.models.inside import is_kind_of, sees_images

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEY = "quantization_config.float8"
MULTIPLE = 16  # of a matrix's sides, which the hardware asks for
EMULATES = False  # for tests: the same rounding on any device, then plain products, which is slower than without


def prepare(model: "PreTrainedModel", scaling: str) -> None:
    """Let the layers of a language model multiply in 8 bits while it is trained; before its optimizer is made.

    Head, embeddings and routers stay as they are, and layers whose sides are no multiples of 16.

    Args:
        model: whose parameters keep their names, values and types.
        scaling: one of `QuantizationConfig.float8`; a scale for each tensor or row, in `rowwise_with_gw_hp` with the gradients
            of weights in bf16.

    Raises:
        ConfigError: torchao is missing, the model sees images, or no layer can.
    """
    require("torchao", KEY, "leave it out")
    if sees_images(model.config):
        raise ConfigError(f"{KEY}: this model reads images, which was never tried with it; expected a language model")
    meant = {name for name, module in model.named_modules() if _may(module)} - _left_out(model)
    if not meant:
        raise ConfigError(
            f"{KEY}: no layer of this {type(model).__name__} has sides that are multiples of {MULTIPLE}; leave it out"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(model, module_filter_fn=lambda module, name: name in meant, config=_config(scaling))
    kind = _in_training()
    for name in meant:
        model.get_submodule(name).__class__ = kind


def describe_rounded(model: nn.Module) -> str:
    """How many layers multiply in 8 bits, for the screen before training; empty: none."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    rounded = [module for module in layers if is_kind_of(module, "torchao.", "Float8Linear")]
    if not rounded:
        return ""
    return f"{len(rounded)} of {len(layers)} linear layers multiply in 8 bits while they learn, the others in bf16"


def _may(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


def _left_out(model: "PreTrainedModel") -> set[str]:
    """The names of the head and of the routers."""
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if module is head} | recorded_routers(model).keys()


def _config(scaling: str) -> Any:
    """How torchao scales and multiplies.

    NOTE: the gradient of a weight is a sum over tokens, of which a micro-batch has any number and the hardware wants a
    multiple of 16: they are filled up with zeros, which change no sum.
    """
    from torchao.float8 import Float8LinearConfig

    return replace(Float8LinearConfig.from_recipe_name(scaling), pad_inner_dim=True, emulate=EMULATES)


def _in_training() -> type[nn.Linear]:
    """torchao's layer, which multiplies plainly in evaluation mode."""
    from torchao.float8.float8_linear import Float8Linear

    class InTraining(Float8Linear):  # type: ignore[misc, no-any-unimported]
        def forward(self, entering: Tensor) -> Tensor:
            if not self.training:
                return nn.functional.linear(entering, self.weight, self.bias)
            # Autocast does not know this layer.
            device = entering.device.type
            if torch.is_autocast_enabled(device):
                entering = entering.to(torch.get_autocast_dtype(device))
            found: Tensor = super().forward(entering)
            return found

    return InTraining
