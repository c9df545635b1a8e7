"""`llm-trainer plan`: what a run would need on a cluster, and how long it would take there. Nothing is started."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_trainer.cli.automatic import Automatic
from llm_trainer.config.errors import counted
from llm_trainer.config.load import load_config
from llm_trainer.config.registry import algorithm
from llm_trainer.config.table import key_of
from llm_trainer.engine.room import checkpoint_copy
from llm_trainer.plan.choices import RESERVE, Choice, choices, recommend, usable
from llm_trainer.plan.describe import Shown, describe
from llm_trainer.plan.gpus import GB, find_gpu
from llm_trainer.plan.memory import on_the_host
from llm_trainer.plan.shapes import Job, Shape
from llm_trainer.plan.speed import Cluster, Speed
from llm_trainer.train.preflight import describe_choices

if TYPE_CHECKING:
    pass


def plan(
    run: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="the configuration of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c...", help="changes to it")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="number of devices")] = 8,
    gpu: Annotated[str, typer.Option(help="their type: h100, a100-80, rtx4090, ...")] = "h100",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="devices in one machine")] = 8,
    network: Annotated[
        float | None,
        typer.Option(min=0.01, help="GB/s that a device sends to other machines; default: typical of its type"),
    ] = None,
    tokens: Annotated[float | None, typer.Option(min=1, help="tokens to train on, such as 15e9")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="fraction of the peak FLOP/s while nothing waits")] = 0.4,
    images: Annotated[float, typer.Option(min=0, help="different images in a row of data, on average")] = 1.0,
    patches: Annotated[
        int | None,
        typer.Option(min=1, help="that the tower sees of an image; default: as its configuration says, where it does"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="machine-readable; sizes in bytes, times in seconds")] = False,
) -> None:
    """Plan a run on GPUs that are not here: memory, largest micro-batch, step time, days, and what to choose."""
    # 1. the devices and the run
    kind = find_gpu(gpu)
    if network is not None:
        kind = replace(kind, network=network * GB)
    cluster = Cluster(kind, gpus, min(gpus, gpus_per_node))
    config = load_config(run, overrides or ())
    name = algorithm(config, str(run))
    shape, job = describe(config, name, kind.has_bf16, Shown(images, patches))

    # 2. all ways to train it, and the best one
    automatic = Automatic(config, name)
    found = choices(shape, job, cluster, automatic.micro_tokens(job), mfu)
    chosen, why = recommend(shape, job, cluster, found)
    budget = tokens
    if budget is None and config.run_config.max_steps:
        budget = config.run_config.max_steps * job.rows * job.sample_tokens * gpus

    # 3. as a table or as JSON
    host, left_open = 0, []
    if chosen is not None:
        steps = budget / (job.rows * job.sample_tokens * gpus) if budget else None
        left_open = automatic.choices(chosen, job.precision, steps)
        if config.run_config.save_in_background:
            host = _host_copy(shape, job, cluster, chosen)
    if as_json:
        facts = _for_machines(shape, job, cluster, found, chosen, why, budget)
        facts |= {"host_copy_bytes": host, "automatic": {choice.name: choice.facts for choice in left_open}}
        typer.echo(json.dumps(facts, indent=1))
        return
    advice = [f"auto  {line}" for line in describe_choices(left_open)]
    if host:
        copy = f"{host / 1e9:.1f} GB of the first machine's host memory, for the copy that checkpoints are written from"
        advice.append(f"host  {copy} [run_config.save_in_background=false]")
    if chosen is not None and chosen.checkpointing and job.offloads:
        inputs = on_the_host(shape, job, chosen.strategy, chosen.micro_tokens) * cluster.per_node / 1e9
        advice.append(
            f"host  {inputs:.2g} GB of each machine's host memory, for what enters the layers of a micro-batch and comes back "
            "in its backward [run_config.activation_offload=false]"
        )
    if job.disk_bytes:
        rollouts = f"{job.disk_bytes * gpus / 1e9:.2g} GB for each rollout, kept until the oldest checkpoint is younger"
        advice.append(f"disk  {rollouts}; times leave out what it takes to sample and reward one")
    if job.moving_bytes:
        advice.append(f"disk  {job.moving_bytes / 1e9:.2g} GB more in each checkpoint: the reference that moves")
    advice.append(f"take  {why}")
    if chosen is not None:
        advice.append(f"      {' '.join(_changes(key_of(name), job, chosen, config.batch_size))}")
    for line in [*_facts(shape, job, cluster, mfu, budget), "", *_table(found, chosen, job, budget), "", *advice]:
        typer.echo(line)


def _host_copy(shape: Shape, job: Job, cluster: Cluster, chosen: Choice) -> int:
    """Host memory, in bytes, that all processes of the first machine take to save a checkpoint in the background."""
    strategy = chosen.strategy
    width = 2 if strategy.is_zero and job.precision != "fp32" else 4
    share = 1 / cluster.devices if strategy.optimizer else 1.0

    def copied(is_main: bool) -> int:
        return checkpoint_copy(
            width * shape.num_parameters + job.moving_bytes,
            job.state_bytes,
            gathers_weights=strategy.weights,
            gathers_state=strategy.is_zero,
            share=share,
            is_main=is_main,
        )

    return copied(True) + (cluster.per_node - 1) * copied(False)


def _facts(shape: Shape, job: Job, cluster: Cluster, mfu: float, budget: float | None) -> list[str]:
    """The model, the step, the devices and the length of the run, a line each."""
    gpu, rows = cluster.gpu, job.rows * cluster.devices
    sequences = f"{job.row_tokens:,}"
    if job.rows_per_sample > 1:
        sequences = f"{job.rows_per_sample} x {sequences}"
    peak = gpu.single_flops if job.precision == "fp32" else gpu.half_flops
    trained = ""
    if shape.frozen_parameters:
        trained = f" ({shape.trained_parameters:,} trained)"
    length = "not known: give --tokens, or run_config.max_steps"
    if budget:
        length = f"{budget:,.0f} tokens"
    return [
        f"model  {shape.num_parameters:,} parameters{trained}, {shape.num_layers} layers of width {shape.hidden_size:,}",
        *_of_images(shape, job),
        f"step   {counted(job.rows, 'row')} x {counted(cluster.devices, 'GPU')} x {sequences} tokens "
        f"= {rows * job.sample_tokens:,} tokens (padding counts as tokens), in {job.precision}",
        f"GPUs   {cluster.devices:,} x {gpu.chip}: {usable(cluster) / 1e9:.1f} GB each ({RESERVE:.0%} are left free), "
        f"{peak / 1e12:.0f} TFLOP/s at {mfu:.0%}, {cluster.bandwidth / 1e9:.0f} GB/s between them",
        f"length {length}",
    ]


def _of_images(shape: Shape, job: Job) -> list[str]:
    """The parts of a model that sees, and what rows show; nothing of another model."""
    tower = shape.tower
    if tower is None:
        return []
    sizes = {"language model": shape.language, "tower": tower.tower, "projector": tower.projector}
    said = []
    for name, size in sizes.items():
        trained = "frozen"
        if size.trained:
            trained = "trained" if size.trained == size.number else f"{size.trained:,} trained"
        said.append(f"{name} {size.number:,} ({trained})")
    shows = "what images cost is not counted: how many patches they are depends on their size; give --patches"
    if job.patches:
        share = job.image_flops / (job.flops_with_images * job.sample_tokens)
        each = job.patches / job.images
        shows = f"{job.images:.3g} a row, of {each:,.0f} patches each: {share:.0%} of the FLOPs [--images, --patches]"
    return [f"parts  {', '.join(said)}", f"images {shows}"]


def _recomputed(choice: Choice, job: Job) -> str:
    """Whether layers are computed again, and where what enters them waits."""
    if not choice.checkpointing:
        return "no"
    return "yes, host" if job.offloads else "yes"


def _table(found: list[Choice], chosen: Choice | None, job: Job, budget: float | None) -> list[str]:
    """One line per choice: GB by purpose with the run's own micro-batch, then the fastest way that fits."""
    memories = [asdict(choice.memory) for choice in found]
    purposes = []
    for purpose in memories[0]:
        if any(memory[purpose] for memory in memories):
            purposes.append(purpose)
    way = ["", "strategy", "recompute", "logits"]
    speed = ["batch", "step s", "wait", "MFU", "tokens/s", "days"]
    lines = [[*way, *purposes, "GB", "rows", *speed]]
    for choice, memory in zip(found, memories, strict=True):
        lines.append(
            [
                "*" if choice is chosen else "",
                choice.strategy.name,
                _recomputed(choice, job),
                "chunked" if choice.chunked else "whole",
                *(f"{memory[purpose] / 1e9:.1f}" for purpose in purposes),
                f"{choice.memory.total / 1e9:.1f}",
                f"{choice.largest_rows:,}",
                *(_speed_cells(choice, budget) or ["-"] * len(speed)),
            ]
        )
    return _aligned(lines, num_left=len(way))


def _speed_cells(choice: Choice, budget: float | None) -> list[str]:
    """Micro-batches, times and rates of a choice; nothing where it does not fit."""
    speed = choice.speed
    if speed is None:
        return []
    return [
        f"{choice.micro_rows} x {choice.accumulation}",
        f"{speed.step_s:.3g}",
        f"{speed.exposed_s / speed.step_s:.0%}",
        f"{speed.mfu:.0%}",
        f"{speed.tokens_per_second:,.0f}",
        f"{_days(speed, budget):.2f}" if budget else "-",
    ]


def _days(speed: Speed, budget: float) -> float:
    return budget / speed.tokens_per_second / 86400


def _aligned(lines: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Columns of equal width, the first `num_left` flush left, numbers flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        cells = []
        for index, (text, width) in enumerate(zip(line, widths, strict=True)):
            aligned_text = text.ljust(width) if index < num_left else text.rjust(width)
            cells.append(aligned_text)
        aligned.append("  ".join(cells))
    return aligned


def _changes(section: str, job: Job, chosen: Choice, batch_size: int) -> list[str]:
    """The choice as changes to the configuration, whose algorithm has `section`."""
    strategy = chosen.strategy
    changes = []
    if strategy.is_zero:
        stage = strategy.optimizer + strategy.gradients + strategy.weights
        changes.append("run_config.engine=deepspeed")
        changes.append(f"ds_config.zero_config.stage={stage}")
        if job.precision != "fp32":
            changes.append(f"ds_config.{job.precision}_config.enabled=true")
    elif strategy.weights:
        changes.append("run_config.engine=fsdp")
    else:
        changes.append("run_config.engine=torch")
    changes.append(f"run_config.gradient_checkpointing={str(chosen.checkpointing).lower()}")
    if job.offloads and not chosen.checkpointing:
        changes.append("run_config.activation_offload=false")
    micro_rows = chosen.micro_rows
    if chosen.why_tokens or job.completions > 1:  # the run cuts its steps itself
        micro_rows = batch_size
    changes.append(f"batch_size={micro_rows}")
    changes.append(f"{section}.gradient_accumulation_steps={job.rows // job.completions // micro_rows}")
    return changes


def _for_machines(
    shape: Shape, job: Job, cluster: Cluster, found: list[Choice], chosen: Choice | None, why: str, budget: float | None
) -> dict[str, Any]:
    """What --json prints; sizes in bytes, times in seconds."""
    recommended = None
    if chosen is not None:
        recommended = _choice_for_machines(chosen, budget)
    return {
        "model": asdict(shape),
        "job": asdict(job),
        "cluster": asdict(cluster) | {"bandwidth": cluster.bandwidth},
        "choices": [_choice_for_machines(choice, budget) for choice in found],
        "recommendation": {"choice": recommended, "reason": why},
    }


def _choice_for_machines(choice: Choice, budget: float | None) -> dict[str, Any]:
    facts = asdict(choice) | {"strategy": choice.strategy.name, "total_bytes": choice.memory.total}
    speed = choice.speed
    if speed is not None:
        facts["speed"] = asdict(speed) | {"step_s": speed.step_s}
        if budget:
            facts["days"] = _days(speed, budget)
    return facts
