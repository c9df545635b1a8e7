"""What waits in host memory, and products in 8 bits, for `gpu.py`: the same numbers, then memory and speed."""

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from engines import SMALLEST_VOCABULARY
from gpu_report import Report, fastest, peak_memory, wait_for
from gpu_training import make_model

from llm_trainer.compiler import CompiledLayers
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.options import Settings
from llm_trainer.engine import recompute
from llm_trainer.engine.device import FLOAT8, check_float8
from llm_trainer.engine.layers import layers_of
from llm_trainer.engine.recompute import recompute_activations
from llm_trainer.models import float8

ROUNDS = 3


def training_step(model: Any, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A forward and a backward in bf16 of all rows at once; returns the loss."""

    def step() -> torch.Tensor:
        model.zero_grad(set_to_none=True)
        with torch.autocast(ids.device.type, torch.bfloat16):
            hidden = model.model(ids).last_hidden_state
        loss: torch.Tensor = hidden.float().square().mean()  # without a head, whose memory hides that of layers
        loss.backward()
        return loss.detach()

    return step


def measured(step: Callable[[], torch.Tensor], report: Report, tokens: int) -> dict[str, float]:
    """Speed, and the peak of memory of a step."""
    step()
    if report.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    speeds = [tokens / fastest(step, report.device, 2) for _ in range(1 if report.tiny else ROUNDS)]
    return {"tokens/s": statistics.median(speeds), "peak GiB": peak_memory(report.device)}


def offload(report: Report) -> None:
    """Recomputation with and without inputs on the host: equal gradients, another peak, the time that it takes."""
    shape, rows = ("tiny", [(2, 16)]) if report.tiny else ("0.6b", [(4, 4096), (1, 32768)])
    if report.device.type not in recompute.COPIES:
        report.leave_out("inputs on the host", "the device has no memory of its own")
        return
    for size in rows:
        ids = torch.randint(3, SMALLEST_VOCABULARY, size, device=report.device)
        gradients = []
        for name, offloads in (("recomputed", False), ("recomputed, inputs on the host", True)):
            torch.manual_seed(0)
            model = make_model(shape, report.device, report.attention).train()
            options = Settings(gradient_checkpointing=True, activation_offload=offloads)
            recompute_activations([model], report.device, options)
            step = training_step(model, ids)
            numbers = measured(step, report, ids.numel())
            # The first steps of all have the same gradients; the copies of the last one are long over.
            step()
            wait_for(report.device)
            gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
            if offloads:
                far = max((a - b).abs().max().item() for a, b in zip(*gradients, strict=True))
                largest = max(gradient.abs().max().item() for gradient in gradients[0])
                numbers |= {"gradient off by": far / largest}
            report.row(f"{name}, {size[0]} x {size[1]:,}", numbers)
            del model, step


def products(report: Report) -> None:
    """bf16 and every scaling of float8: speed, and how far loss and gradient of the first step are from bf16."""
    if importlib.util.find_spec("torchao") is None:
        report.leave_out("float8", "it needs torchao, which is not installed")
        return
    shape, size = ("tiny", (2, 16)) if report.tiny else ("1.7b", (4, 4096))
    ids = torch.randint(3, SMALLEST_VOCABULARY, size, device=report.device)
    first: dict[str, torch.Tensor] = {}
    for scaling in ("bf16", *FLOAT8):
        report.attempt(scaling, one_scaling, report, shape, ids, scaling, first)


def one_scaling(report: Report, shape: str, ids: torch.Tensor, scaling: str, first: dict[str, torch.Tensor]) -> None:
    """The row of one way to multiply; `first` holds what bf16 found."""
    torch.manual_seed(0)
    model = make_model(shape, report.device, report.attention).train()
    if scaling != "bf16":
        try:
            check_float8(scaling, report.device, "bf16")
        except ConfigError as error:
            report.leave_out(scaling, str(error))
            return
        float8.prepare(model, scaling)
    step = training_step(model, ids)
    loss = step()
    gradient = torch.cat([parameter.grad.flatten().float() for parameter in model.model.layers[0].parameters()])
    if scaling == "bf16":
        first |= {"loss": loss, "gradient": gradient}
    away = (loss / first["loss"] - 1).abs().item()
    cosine = torch.nn.functional.cosine_similarity(gradient, first["gradient"], dim=0).item()
    numbers = {"loss off by": away, "cosine of gradients": cosine}
    for label, compiled in (("plain", False), ("compiled", True)):
        if compiled and not report.can_compile:
            continue
        if compiled:
            layers = CompiledLayers()
            layers.add(layers_of(model))
            layers.switch(True)
        found = measured(step, report, ids.numel())
        numbers |= {f"{name}, {label}": value for name, value in found.items()}
    report.row(scaling, numbers)


def bits(report: Report) -> None:
    """The whole section."""
    report.attempt("inputs on the host", offload, report)
    report.attempt("float8", products, report)
