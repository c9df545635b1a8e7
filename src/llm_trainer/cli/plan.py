"""`llm-trainer plan`: what a run would need on a cluster, and how long it would take there. Nothing is started."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.plan.choices import Choice
    from llm_trainer.plan.shapes import Job, Shape
    from llm_trainer.plan.speed import Cluster

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


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

    from llm_trainer.cli.main import algorithm
    from llm_trainer.config.load import load_config
    from llm_trainer.plan.choices import choices, recommend
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


def describe(config: TrainConfig, name: str, has_bf16: bool = True) -> tuple[Shape, Job]:
    """The model and the work of a step on one device, for the algorithm called `name`; no weights are made.

    Args:
        config: the whole run.
        name: of the trainer.
        has_bf16: what 16 bit means on the device.
    """
    from llm_trainer.assemble import OPTIMIZER_NAMES, accumulation
    from llm_trainer.models.build import flops_per_token
    from llm_trainer.plan.shapes import Job, optimizer_bytes, shape_of
    from llm_trainer.trainers import get_trainer_class

    model = _empty(_configuration(config), reward=name == "reward")
    shape = shape_of(model)
    length = config.dataset_block_size or model.config.max_position_embeddings
    precision = config.run_config.precision
    if precision == "auto":
        precision = "bf16" if has_bf16 else "fp16"
    flops = flops_per_token(model, length)
    if name == "reward" and shape.tied:
        flops -= 6 * shape.vocabulary_parameters  # which are only looked up
    optim = config.optim_config
    job = Job(
        row_tokens=length,
        rows=config.batch_size * accumulation(config, get_trainer_class(name)),
        rows_per_sample=2 if name in ("dpo", "reward") else 1,
        flops_per_token=flops,
        state_bytes=optimizer_bytes(OPTIMIZER_NAMES.get(optim.optim_type, optim.optim_type), optim.momentum, model),
        precision=precision,
        has_head=name != "reward",
        **_frozen(config, name, shape, flops, length, precision),
    )
    return shape, job


def _configuration(config: TrainConfig) -> PretrainedConfig:
    """The shape of the model in transformers' words."""
    from dataclasses import replace

    from llm_trainer.config.errors import ConfigError
    from llm_trainer.data.encode.tokenizer import load_tokenizer
    from llm_trainer.models.build import build_config

    wanted = config.model_config
    if isinstance(wanted, str):
        return _of_folder(wanted)
    if wanted.vocab_size is None:
        if config.tokenizer is None:
            raise ConfigError("model_config.vocab_size: none given, and no tokenizer that would tell; give one of them")
        wanted = replace(wanted, vocab_size=len(load_tokenizer(config.tokenizer)))
    return build_config(wanted)


def _of_folder(source: str) -> PretrainedConfig:
    from transformers import AutoConfig

    from llm_trainer.config.errors import ConfigError

    try:
        return AutoConfig.from_pretrained(source)
    except OSError as error:
        raise ConfigError(
            f"model_config: {source!r} holds no model: expected a Hugging Face folder with config.json ({error})"
        ) from None


def _empty(configuration: PretrainedConfig, reward: bool = False) -> PreTrainedModel:
    """A model without memory, on the meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    from llm_trainer.models.rewarding import reward_model

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
        return reward_model(model) if reward else model


def _frozen(config: TrainConfig, name: str, shape: Shape, flops: float, length: int, precision: str) -> dict[str, Any]:
    """What the algorithm computes and keeps besides the trained model, as keywords of `Job`; forwards are a third of
    `flops`.
    """
    from llm_trainer.losses.preference import PreferenceLoss, resolve_loss_type
    from llm_trainer.models.build import flops_per_token
    from llm_trainer.plan.shapes import shape_of
    from llm_trainer.trainers.distill import CHUNK_ELEMENTS

    if name == "dpo" and (dpo := config.dpo_config) is not None:
        loss = PreferenceLoss(resolve_loss_type(dpo.loss_type, dpo.loss_ipo))
        if not loss.needs_reference or dpo.precompute_ref_log_probs:
            return {}
        return {"frozen_bytes": 4.0 * shape.num_parameters, "frozen_flops_per_token": flops / 3}
    if name == "kto" and config.kto_config is not None:
        mismatched = config.kto_config.loss_type == "kto"  # both models score mismatched answers too, for the KL
        return {"frozen_bytes": 4.0 * shape.num_parameters, "frozen_flops_per_token": flops / 3 * (1 + 2 * mismatched)}
    section = config.pretrain_config or config.sft_config
    kd = None if section is None else section.kd_config
    if kd is None or kd.teacher_model is None:
        return {}
    teacher = _empty(_of_folder(kd.teacher_model))
    return {
        "frozen_bytes": float(_BYTES[precision] * shape_of(teacher).num_parameters),
        "frozen_flops_per_token": flops_per_token(teacher, length) / 3,
        "teacher_chunk": CHUNK_ELEMENTS,
    }


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
    from llm_trainer.assemble import SECTIONS

    section = next(name for name in SECTIONS if getattr(config, name) is not None)
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
