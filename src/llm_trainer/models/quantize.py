"""Parameters of `bitsandbytes` in 4 bits: what they stand for. The only file that imports it; it imports nothing else of
ours than `inside`, so that every room may import it.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.models.inside import is_kind_of

# How far scales may be from each other that were rounded to 8 bits around means that differ in their last bit.
SCALES_ROUNDED = 0.02
# They warn of a kernel that is only for inference, and of every product in 8 bits, which is in fp16 as it has to be.
_TALKS = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")


def hush() -> None:
    """Keep bitsandbytes quiet of what concerns nobody here; before anything imports it, as peft does by itself."""
    for name in _TALKS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _state_of(parameter: Tensor) -> Any:
    """How a parameter in 4 bits is to be read; None: it is not in 4 bits."""
    return parameter.quant_state if is_kind_of(parameter, "bitsandbytes.", "Params4bit") else None  # type: ignore[attr-defined]


def is_in_few_bits(tensor: Tensor) -> bool:
    """Whether a tensor is a weight in 4 or 8 bits."""
    return type(tensor).__module__.startswith("bitsandbytes.")


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a layer's weights are in 4 or 8 bits."""
    return type(module).__module__.startswith("bitsandbytes.")


def is_quantized(model: nn.Module) -> bool:
    """Whether layers of a model are in 4 or 8 bits."""
    return any(map(is_quantized_layer, model.modules()))


def stored_bytes(parameter: Tensor) -> float:
    """What a parameter takes, with the scales of its blocks or rows."""
    state = _state_of(parameter)
    scales = getattr(parameter, "SCB", None)
    if state is not None:
        scales = state.absmax
        if state.nested:
            return parameter.nbytes + scales.nbytes + state.state2.absmax.nbytes
    return parameter.nbytes + (0 if scales is None else scales.nbytes)


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


def is_made_of(parameter: Tensor, scales: Tensor | None, weight: Tensor) -> bool:
    """Whether a parameter in few bits is what becomes of `weight`, up to the rounding of scales.

    Args:
        parameter: in 4 or 8 bits.
        scales: of its rows, in 8 bits.
        weight: in the type that it had.
    """
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit

    weight, state = weight.to(parameter.device), _state_of(parameter)
    if state is None:
        bits, rows, _ = int8_vectorwise_quant(weight.to(torch.float16))
        return torch.equal(bits, parameter) and scales is not None and torch.equal(rows, scales)
    if weight.shape != state.shape:
        return False
    bits, again = quantize_4bit(
        weight.to(state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=parameter.dtype,
    )
    if not torch.equal(bits.view(torch.uint8), parameter.detach().view(torch.uint8)):
        return False
    return torch.allclose(dequantize_4bit(bits, again), dequantized(parameter), rtol=SCALES_ROUNDED, atol=0)
