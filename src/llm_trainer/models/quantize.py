"""Parameters of `bitsandbytes` in 4 bits: what they stand for. The only file that imports it; it imports nothing else of
ours than `inside`, so that every room may import it.
"""

from typing import Any

from torch import Tensor, nn

from llm_trainer.models.inside import is_kind_of


def _state_of(parameter: Tensor) -> Any:
    """How a parameter in 4 bits is to be read; None: it is not in 4 bits."""
    return parameter.quant_state if is_kind_of(parameter, "bitsandbytes.", "Params4bit") else None  # type: ignore[attr-defined]


def is_quantized(model: nn.Module) -> bool:
    """Whether layers of a model are in 4 or 8 bits."""
    return any(type(module).__module__.startswith("bitsandbytes.") for module in model.modules())


def has_8_bits(model: nn.Module) -> bool:
    """Whether layers of a model are in 8 bits, where a token is treated by the others that come with it."""
    return any(is_kind_of(module, "bitsandbytes.", "Linear8bitLt") for module in model.modules())


def num_values(parameter: Tensor) -> int:
    """How many numbers a parameter stands for; in 4 bits they are more than its elements."""
    state = _state_of(parameter)
    return parameter.numel() if state is None else int(state.shape.numel())


def stored_numbers(parameter: Tensor) -> Tensor:
    """What of a parameter is numbers and not bits, whatever type these are kept in: of one in 4 bits its scales."""
    state = _state_of(parameter)
    if state is None:
        return parameter
    scales: Tensor = state.state2.absmax if state.nested else state.absmax
    return scales


def keep_layout(module: nn.Module) -> None:
    """Have the 4-bit layers in `module` keep their weights as they are, or get them back as they were.

    NOTE: on CPUs with AVX512-BF16 the first forward in evaluation mode would lay them out for inference, with scales
    rounded to bfloat16, and no gradient would come through such a layer any more.
    """
    for inner in module.modules():
        if is_kind_of(inner, "bitsandbytes.", "Linear4bit"):
            inner.state_dict()  # undoes it, where such a forward has been
            inner.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def dequantized(parameter: Tensor) -> Tensor:
    """The numbers that a parameter in 4 bits stands for, in the type that it had before; without a gradient to it."""
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(parameter.detach(), _state_of(parameter))
    return found
