"""What is about to happen, on one screen, before the first step; and what a step costs."""

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import torch

from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.optim.optimizers import state_bytes
from llm_trainer.plan.gpus import half_peak

if TYPE_CHECKING:
    from llm_trainer.train.run import Run


@lru_cache
def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of five: the peak of a device that no table lists."""
    n = 2048 if device.type != "cpu" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # the read waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_flops(engine: Engine) -> float:
    """FLOP/s that MFU is measured against: from the data sheet for known GPUs, else a timed matrix product."""
    dtype = torch.bfloat16 if engine.precision_name == "bf16" else torch.float32
    if engine.device.type == "cuda":
        known = half_peak(torch.cuda.get_device_name(engine.device))
        if known is not None and engine.precision_name != "fp32":
            return known
        dtype = torch.float16 if engine.precision_name == "fp16" else dtype
    return _measured_peak(engine.device, dtype)


@dataclass(frozen=True)
class Size:
    """What is trained, counted before an engine takes it apart.

    Attributes:
        parameters: all of them, tied ones once.
        trained: those with gradients.
        bytes: of all.
        trained_bytes: of those with gradients.
        optimizer_bytes: that the optimizer will keep as its state.
        flops_per_token: of a training step; None for modules that are no transformers language model.
    """

    parameters: int
    trained: int
    bytes: int
    trained_bytes: int
    optimizer_bytes: int
    flops_per_token: float | None

    @classmethod
    def of(cls, run: "Run") -> Self:
        """The size of a run's model."""
        from transformers import PreTrainedModel

        from llm_trainer.models.build import flops_per_token

        model = run.trainer.base_model
        every, trained = list(model.parameters()), [p for p in model.parameters() if p.requires_grad]
        flops = flops_per_token(model, _mean_row_length(run) or 1) if isinstance(model, PreTrainedModel) else None
        return cls(
            parameters=sum(p.numel() for p in every),
            trained=sum(p.numel() for p in trained),
            bytes=sum(p.numel() * p.element_size() for p in every),
            trained_bytes=sum(p.numel() * p.element_size() for p in trained),
            optimizer_bytes=state_bytes(run.trainer.optimizer),
            flops_per_token=flops,
        )


def _mean_row_length(run: "Run") -> int | None:
    if not isinstance(run.source, SampleStream):
        return None
    return round(float(run.source.dataset.lengths.mean()))


def _human(count: float, unit: str = "") -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}{unit}"
    return f"{count:.3g} {unit}"


def expected_memory(run: "Run") -> dict[str, float]:
    """Bytes on one device, by purpose: weights, gradients, optimizer, and activations where their formula is known."""
    whole = {
        "weights": run.size.bytes,
        "gradients": run.size.trained_bytes,
        "optimizer": run.size.optimizer_bytes,
    }
    memory = {name: size * part for (name, size), part in zip(whole.items(), run.engine.parts(), strict=True)}
    activations = _expected_activations(run)
    return memory if activations is None else memory | {"activations": activations}


def _expected_activations(run: "Run") -> float | None:
    """What the layers keep of a micro-batch for the backward, in bytes; None for other layers than those of `plan`."""
    from transformers import PreTrainedModel

    from llm_trainer.models.build import ARCHITECTURES
    from llm_trainer.plan.memory import Widths, layer_activations
    from llm_trainer.plan.shapes import shape_of

    model, length, source = run.trainer.base_model, _mean_row_length(run), run.source
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in ARCHITECTURES:
        return None
    if length is None or not isinstance(source, SampleStream):
        return None
    tokens = run.settings.micro_batch_tokens or source.batch_size * length
    widths, shape = Widths(4 if run.engine.precision_name == "fp32" else 2, 4), shape_of(model)
    kept = (
        widths.residual * shape.hidden_size if run.settings.gradient_checkpointing else layer_activations(shape, widths)
    )
    return tokens * shape.num_layers * kept


def _batch_equation(run: "Run") -> str:
    ranks, accumulation = dist.world_size(), run.accumulation
    if not isinstance(run.source, SampleStream):
        return f"{accumulation} micro-batches x {ranks} ranks = {accumulation * ranks} micro-batches per step"
    source = run.source
    rows = f"{source.batch_size} rows x {accumulation} accumulation x {ranks} ranks = {source.rows_per_step} rows"
    tokens = source.rows_per_step * float(source.dataset.lengths.mean())
    budget = f", cut by {source.micro_batch_tokens:,} tokens" if source.micro_batch_tokens else ""
    return f"{rows} = {_human(tokens, 'tokens')} per step{budget}"


def screen(run: "Run") -> str:
    """Model, batch-size equation, steps, precision, expected memory, data, and where things go."""
    trainer, model = run.trainer, run.trainer.base_model
    total, trained = run.size.parameters, run.size.trained
    memory = expected_memory(run)
    parts = ", ".join(f"{name} {_human(size, 'B')}" for name, size in memory.items())
    steps = run.total_steps()
    facts = {
        "trainer": f"{type(trainer).__name__} of {type(model).__name__}",
        "parameters": f"{_human(total)} ({total:,})" + ("" if trained == total else f", {_human(trained)} trained"),
        "batch": _batch_equation(run),
        "steps": "unknown" if steps is None else f"{steps:,}, from step {run.progress.step:,}",
        "learning rate": _describe_rate(run),
        "engine": f"{type(run.engine).__name__}, {dist.num_processes()} process(es)",
        "precision": f"{run.engine.precision_name} on {run.engine.device}",
        "memory": f"{_human(sum(memory.values()), 'B')} expected: {parts}",
        "checkpoints": str(run.save_dir),
        "logs": str(run.log_dir),
        **{name: str(value) for name, value in trainer._get_extra_config_info().items()},
    }
    lines = [f"{name:>14}  {text}" for name, text in facts.items()]
    for ledger in run.settings.ledgers:
        lines += [f"{'data':>14}  {ledger.name}", *(f"{'':>14}  {line}" for line in ledger.lines())]
    return "\n".join(lines)


def _describe_rate(run: "Run") -> str:
    from llm_trainer.optim.schedules import Scheduler

    scheduler = run.trainer.scheduler
    return scheduler.describe() if isinstance(scheduler, Scheduler) else f"{run.learning_rate():g}"
