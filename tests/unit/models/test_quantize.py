"""Parameters in 4 bits are what they stand for: in counts, and in the search for numbers that are not finite."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_trainer.engine.torch import TorchEngine
from llm_trainer.models.build import check_finite, num_parameters
from llm_trainer.models.quantize import dequantized, num_values
from llm_trainer.models.scored import scored
from llm_trainer.train.guards import broken_tensor
from llm_trainer.train.size import Size

ROWS, COLUMNS = 8, 64


def stand_in(scale: float) -> nn.Parameter:
    """Bits that are NaN as floats, in a class with the name and attributes of the library's."""
    kind: Any = type("Params4bit", (nn.Parameter,), {"__module__": "bitsandbytes.nn.modules"})
    bits = torch.full((ROWS * COLUMNS // 8, 1), -1, dtype=torch.int32).view(torch.float32)
    parameter: nn.Parameter = kind(bits, requires_grad=False)
    scales = torch.full((ROWS,), scale)
    parameter.quant_state = SimpleNamespace(shape=torch.Size([ROWS, COLUMNS]), nested=False, absmax=scales)  # type: ignore[attr-defined]
    return parameter


def of_the_library(scale: float, double: bool = True) -> nn.Parameter:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    weight = torch.linspace(-1, 1, ROWS * COLUMNS).view(ROWS, COLUMNS) * scale
    settings = {"quant_type": "nf4", "compress_statistics": double, "quant_storage": torch.float32}
    parameter: nn.Parameter = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings).to("cpu")
    return parameter


@pytest.mark.parametrize("make", [stand_in, of_the_library])
def test_numbers_in_4_bits_are_counted_and_their_bits_are_no_numbers(make: Any) -> None:
    module = nn.Module()
    module.bits, module.plain = make(1.0), nn.Parameter(torch.ones(3))
    assert num_values(module.bits) == ROWS * COLUMNS and module.bits.numel() * 8 == ROWS * COLUMNS
    assert num_parameters(module) == ROWS * COLUMNS + 3
    size = Size.of(module, torch.optim.SGD([module.plain], lr=0.1), None)
    assert (size.parameters, size.trained) == (ROWS * COLUMNS + 3, 3)
    assert size.bytes == ROWS * COLUMNS // 2 + 3 * 4
    check_finite(module, "a folder")
    engine = TorchEngine(torch.device("cpu"), "fp32")
    assert broken_tensor(engine, module) is None
    module.bits = stand_in(float("nan"))
    with pytest.raises(ValueError, match="in bits"):
        check_finite(module, "a folder")
    assert "bits" in str(broken_tensor(engine, module))


@pytest.mark.parametrize("double", [False, True])
def test_numbers_are_those_that_the_layer_computes_with_in_either_mode(double: bool) -> None:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(COLUMNS, ROWS, bias=False, compute_dtype=torch.float32)
    layer.weight = of_the_library(1.0, double)
    layer.support_avx512bf16_for_cpu = True  # as on a machine that has it
    assert "no transformers model" in scored(nn.Sequential(layer)).whole_logits
    weight: Tensor = dequantized(layer.weight)
    inputs = torch.randn(5, COLUMNS, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(inputs), inputs @ weight.t())
    output = layer.train()(inputs)
    torch.testing.assert_close(output, inputs @ weight.t())
    torch.testing.assert_close(torch.autograd.grad(output.sum(), inputs)[0], weight.sum(0).expand(5, -1))
    assert not weight.requires_grad
