"""What is about to happen, on one screen, before the first step; and what a step costs."""

import time
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine

if TYPE_CHECKING:
    from llm_trainer.run import Run

# Dense bf16/fp16 peak of a GPU in FLOP/s, from the vendors' data sheets (without structured sparsity).
GPU_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10": 125e12,
    "L4": 121e12,
    "4090": 165e12,
    "3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


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
        name = torch.cuda.get_device_name(engine.device)
        known = [peak for key, peak in GPU_PEAKS.items() if key in name]
        if known and engine.precision_name != "fp32":
            return known[0]
        dtype = torch.float16 if engine.precision_name == "fp16" else dtype
    return _measured_peak(engine.device, dtype)


def flops_per_token(run: "Run") -> float | None:
    """Training FLOPs of one token; None for modules that are no transformers language model."""
    from transformers import PreTrainedModel

    from llm_trainer.models.build import flops_per_token as of_model

    model = run.trainer.base_model
    if not isinstance(model, PreTrainedModel):
        return None
    return of_model(model, _mean_row_length(run) or 1)


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
    """Bytes on one device, by purpose: weights, gradients, optimizer, and activations where they can be estimated.

    Activations: 34 * T * B * D bytes per layer at 16 bit (Korthikanti et al. 2022, arXiv:2205.05198, eq. 1 without the
    attention matrix, which no backend here stores), twice that in fp32, T * B * D * 2 with gradient checkpointing.
    """
    model = run.trainer.base_model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    slots = 2 if {"betas"} <= run.trainer.optimizer.defaults.keys() else 1
    memory: dict[str, float] = {"weights": weights, "gradients": trained, "optimizer": slots * trained}
    length = _mean_row_length(run)
    config = getattr(model, "config", None)
    if length is not None and config is not None and isinstance(run.source, SampleStream):
        tokens = run.settings.micro_batch_tokens or run.source.batch_size * length
        bytes_each = 2 if run.settings.gradient_checkpointing else 34 if run.engine.precision_name != "fp32" else 68
        memory["activations"] = bytes_each * tokens * config.hidden_size * config.num_hidden_layers
    return memory


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
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = expected_memory(run)
    parts = ", ".join(f"{name} {_human(size, 'B')}" for name, size in memory.items())
    steps = run.total_steps()
    facts = {
        "trainer": f"{type(trainer).__name__} of {type(model).__name__}",
        "parameters": f"{_human(total)} ({total:,})" + ("" if trained == total else f", {_human(trained)} trained"),
        "batch": _batch_equation(run),
        "steps": "unknown" if steps is None else f"{steps:,}, from step {run.progress.step:,}",
        "learning rate": _describe_rate(run),
        "precision": f"{run.engine.precision_name} on {run.engine.device}, {dist.world_size()} process(es)",
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
    from llm_trainer.schedule import Scheduler

    scheduler = run.trainer.scheduler
    return scheduler.describe() if isinstance(scheduler, Scheduler) else f"{run.learning_rate():g}"
