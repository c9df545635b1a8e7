"""`llm-trainer plan`: what a run would need on a cluster, and how long it would take there. Nothing is started."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.plan.choices import Choice
    from llm_trainer.plan.shapes import Job, Shape
    from llm_trainer.plan.speed import Cluster


def plan(
    run: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="the configuration of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c...", help="changes to it")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="devices in all")] = 8,
    gpu: Annotated[str, typer.Option(help="their kind: h100, a100-80, rtx4090, ...")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="devices in one machine")] = 8,
    network: Annotated[
        float | None, typer.Option(min=0.01, help="GB/s that a device sends to other machines; default: the usual")
    ] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="tokens to train on, such as 15e9")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="share of the peak while nothing waits")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="for machines; sizes in bytes, times in seconds")] = False,
) -> None:
    """Plan a run on GPUs that are not here: memory, largest micro-batch, step time, days, and what to choose."""
    import json
    from dataclasses import replace

    from llm_trainer.config.load import load_config
    from llm_trainer.config.registry import algorithm
    from llm_trainer.plan.choices import choices, recommend
    from llm_trainer.plan.describe import describe
    from llm_trainer.plan.gpus import GB, find_gpu
    from llm_trainer.plan.speed import Cluster

    kind = find_gpu(gpu)
    if network is not None:
        kind = replace(kind, network=network * GB)
    cluster = Cluster(kind, gpus, min(gpus, gpus_per_node))
    config = load_config(run, overrides or ())
    shape, job = describe(config, algorithm(config, str(run)), kind.has_bf16)
    per_micro_batch = config.data_loader_config.micro_batch_tokens or config.batch_size * job.sample_tokens
    found = choices(shape, job, cluster, per_micro_batch, mfu)
    chosen, why = recommend(shape, job, cluster, found)
    steps = config.run_config.max_steps
    budget = tokens or (steps and steps * job.rows * job.sample_tokens * gpus)
    if as_json:
        typer.echo(json.dumps(_for_machines(shape, job, cluster, found, chosen, why, budget), indent=1))
        return
    for line in [*_facts(shape, job, cluster, mfu, budget), "", *_table(found, chosen, budget), "", f"take  {why}"]:
        typer.echo(line)
    if chosen is not None:
        typer.echo(f"      {' '.join(_changes(config, job, chosen))}")


def _facts(shape: Shape, job: Job, cluster: Cluster, mfu: float, budget: float | None) -> list[str]:
    from llm_trainer.plan.choices import RESERVE, usable

    gpu, rows = cluster.gpu, job.rows * cluster.devices
    sequences = f"{job.rows_per_sample} x {job.row_tokens:,}" if job.rows_per_sample > 1 else f"{job.row_tokens:,}"
    peak = gpu.single_flops if job.precision == "fp32" else gpu.half_flops
    return [
        f"model  {shape.num_parameters:,} parameters, {shape.num_layers} layers of width {shape.hidden_size:,}",
        f"step   {job.rows:,} rows x {cluster.devices:,} GPUs x {sequences} tokens "
        f"= {rows * job.sample_tokens:,} tokens (padding counts as tokens), in {job.precision}",
        f"GPUs   {cluster.devices:,} x {gpu.chip}: {usable(cluster) / 1e9:.1f} GB each ({RESERVE:.0%} are left free), "
        f"{peak / 1e12:.0f} TFLOP/s at {mfu:.0%}, {cluster.bandwidth / 1e9:.0f} GB/s between them",
        f"length {f'{budget:,.0f} tokens' if budget else 'not known: give --tokens, or run_config.max_steps'}",
    ]


def _table(found: list[Choice], chosen: Choice | None, budget: float | None) -> list[str]:
    """One line per choice: GB by purpose with the run's own micro-batch, then the fastest way that fits."""
    parts = [part for part in asdict(found[0].memory) if any(asdict(choice.memory)[part] for choice in found)]
    head = ["", "strategy", "recompute", "logits", *parts, "GB", "rows", "batch", "step s", "wait", "MFU", "tokens/s"]
    lines = [[*head, "days"]]
    for choice in found:
        memory = asdict(choice.memory)
        told = [
            "*" if choice is chosen else "",
            choice.strategy.name,
            "yes" if choice.checkpointing else "no",
            "chunked" if choice.chunked else "whole",
            *(f"{memory[part] / 1e9:.1f}" for part in parts),
            f"{choice.memory.total / 1e9:.1f}",
            f"{choice.largest_rows:,}",
        ]
        if (speed := choice.speed) is None:
            lines.append([*told, *["-"] * 6])
            continue
        days = f"{budget / speed.tokens_per_second / 86400:.2f}" if budget else "-"
        split = f"{choice.micro_rows} x {choice.accumulation}"
        times = [f"{speed.step_s:.3g}", f"{speed.exposed_s / speed.step_s:.0%}", f"{speed.mfu:.0%}"]
        lines.append([*told, split, *times, f"{speed.tokens_per_second:,.0f}", days])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join(
            text.ljust(w) if i < 4 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]


def _changes(config: TrainConfig, job: Job, chosen: Choice) -> list[str]:
    """The choice as changes to the configuration."""
    from llm_trainer.config.registry import algorithm
    from llm_trainer.config.table import key_of

    section = key_of(algorithm(config, "plan"))
    strategy, engine = chosen.strategy, []
    if strategy.is_zero:
        engine = [f"ds_config.zero_config.stage={strategy.optimizer + strategy.gradients + strategy.weights}"]
        engine += [f"ds_config.{job.precision}_config.enabled=true"] * (job.precision != "fp32")
    return [
        f"run_config.engine={'deepspeed' if strategy.is_zero else 'fsdp' if strategy.weights else 'torch'}",
        *engine,
        f"run_config.gradient_checkpointing={str(chosen.checkpointing).lower()}",
        f"batch_size={chosen.micro_rows}",
        f"{section}.gradient_accumulation_steps={chosen.accumulation}",
    ]


def _for_machines(
    shape: Shape, job: Job, cluster: Cluster, found: list[Choice], chosen: Choice | None, why: str, budget: float | None
) -> dict[str, Any]:
    def told(choice: Choice) -> dict[str, Any]:
        speed = choice.speed
        times = None if speed is None else asdict(speed) | {"step_s": speed.step_s}
        days = {} if speed is None or not budget else {"days": budget / speed.tokens_per_second / 86400}
        names = {"strategy": choice.strategy.name, "total_bytes": choice.memory.total}
        return asdict(choice) | names | {"speed": times} | days

    return {
        "model": asdict(shape),
        "job": asdict(job),
        "cluster": asdict(cluster) | {"bandwidth": cluster.bandwidth},
        "choices": [told(choice) for choice in found],
        "recommendation": {"choice": None if chosen is None else told(chosen), "reason": why},
    }
