"""The door of the config style: a `TrainConfig` becomes the objects that a trainer takes. Below it there are no configs."""

from typing import Any

import torch
from torch import nn

from llm_trainer.builder.objects import Builder
from llm_trainer.builder.seeing import eval_tags
from llm_trainer.checkpoint import CheckpointManager
from llm_trainer.config.errors import fields_of
from llm_trainer.config.load import dump_config
from llm_trainer.config.options import Balancing, EarlyStopping, Execution
from llm_trainer.config.registry import accumulation
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.encode.tokenizer import check_vocabulary
from llm_trainer.engine import dist
from llm_trainer.engine.choose import check_precision, join_processes
from llm_trainer.engine.device import check_float8, choose_precision
from llm_trainer.engine.recompute import check_offload
from llm_trainer.engine.threads import settle_threads
from llm_trainer.lock import lock_of_run
from llm_trainer.models.attention import attends, describe_attention
from llm_trainer.models.experts import describe_experts
from llm_trainer.optim.optimizers import OPTIMIZERS, configure_optimizer, describe_kernel, kernel_on
from llm_trainer.optim.schedules import create_scheduler
from llm_trainer.state import Choice


def assemble(config: TrainConfig, trainer_class: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `trainer_class` from a configuration.

    Args:
        config: the whole run.
        trainer_class: a subclass of `BaseTrainer`, which makes its model and its own keywords with the help of a `Builder`.
        given: keywords that the caller passes himself; they are not made here.

    Raises:
        ValueError: (or a subclass) what the configuration describes cannot be made; the message says why.
    """
    run, build = config.run_config, Builder(config, trainer_class, given)

    # 1. What can go wrong at once, goes wrong now and not after an hour of tokenizing.
    deepspeed = None if config.ds_config is None else config.ds_config.to_json()
    check_precision(build.engine, run.precision, deepspeed, build.device, given.get("use_amp", True))
    check_offload(run, build.device, build.engine, deepspeed)
    bits = config.quantization_config
    if bits is not None and bits.float8 is not None:
        check_float8(bits.float8, build.device, choose_precision(run.precision, build.device))
    join_processes(build.device, build.engine, config.fsdp_config, run.ddp_timeout_s)
    settle_threads(dist.num_processes() > 1)  # before the first product; the run says it
    with dist.main_process_first():
        if dist.is_main():
            with lock_of_run(run.save_dir).held():  # another run in the folder is an error
                CheckpointManager(run.save_dir)  # so is a folder that cannot be written

    # What one rank cannot make stops all of them.
    with dist.on_duty(lambda: "Nothing has been trained yet"):
        objects = _objects(config, trainer_class, given, build)
        dist.gather_patiently(None)  # until all have got here
    return objects


def _objects(config: TrainConfig, trainer_class: Any, given: dict[str, Any], build: Builder) -> dict[str, Any]:
    run = config.run_config

    # 2. The model, what the algorithm itself needs, the data.
    model = build.policy
    check_vocabulary(build.tokenizer, len(model.get_input_embeddings().weight))
    own = trainer_class._from_config(config, build)
    train, *_ = build.streams

    # 3. What changes the model.
    if build.engine in ("torch", "hf"):  # the others shard it on the way there: it may be too big for one device
        model.to(build.device)
    optimizer = given["optimizer"] if "optimizer" in given else make_optimizer(config, model, build.engine)
    trainer_class._extend_optimizer(optimizer, own, build.section)
    steps = trainer_class._steps_per_epoch(train, build.section) * config.n_epochs
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": make_scheduler(config, optimizer, min(steps, run.max_steps or steps)),
        "train_loader": train,
        "val_loader": build.evaluation or None,
        "device": str(build.device),
        "max_epochs": config.n_epochs,
        "grad_accum_steps": accumulation(config, trainer_class),
        "max_grad_norm": config.optim_config.max_grad_norm,
        "log_interval": run.log_interval,
        "save_dir": run.save_dir,
        "tokenizer": build.processor or build.tokenizer,
        "eval_prompts": config.eval_prompts,
        "eval_image_tags": eval_tags(config, build.section),
        "image_format": build.images,
        **_settings(config, build.engine, [*train.dataset.ledgers, *build.further_ledgers]),
        "choices": _choices(config, given, build, optimizer),
        **own,
    }


def _choices(
    config: TrainConfig, given: dict[str, Any], build: Builder, optimizer: torch.optim.Optimizer
) -> list[Choice]:
    """What of the objects made here was left to the machine."""
    choices = []
    if config.run_config.attention == "auto" and "model" not in given and attends(build.policy.config):
        choices.append(attention_choice(*describe_attention(build.policy.config, build.device)))
    computed = describe_experts(build.policy) if config.run_config.experts == "auto" else None
    if computed is not None and "model" not in given:
        choices.append(experts_choice(*computed))
    # DeepSpeed may put an optimizer of its own in its place.
    if config.optim_config.fused == "auto" and "optimizer" not in given and build.engine != "deepspeed":
        kernel = describe_kernel(optimizer)
        if kernel is not None:
            choices.append(_kernel_choice(*kernel))
    return choices


def foreseen_kernel(name: str, device: str) -> Choice | None:
    """What `optim_config.fused: auto` will come to with the optimizer called `name` on a kind of device such as 'cuda'."""
    kernel = kernel_on(name, device)
    return None if kernel is None else _kernel_choice(*kernel)


def _kernel_choice(value: str, why: str) -> Choice:
    return Choice("optimizer", value, why, "optim_config.fused: false")


def attention_choice(value: str, why: str) -> Choice:
    """What `run_config.attention: auto` has come to, for the screen before training."""
    if value in ("sdpa", "eager"):
        return Choice("attention", value, why, "run_config.attention: eager")
    return Choice("attention", value, why, "run_config.attention: sdpa")


def experts_choice(value: str, why: str) -> Choice:
    """What `run_config.experts: auto` has come to."""
    other = "grouped_mm" if value == "eager" else "eager"
    return Choice("experts", value, why, f"run_config.experts: {other}")


def _settings(config: TrainConfig, engine: str, ledgers: list[Any]) -> dict[str, Any]:
    """The fields of `Settings`: those of shared groups by their names, then what one style alone has."""
    shared = {name: getattr(config.run_config, name) for name in fields_of(Execution)}
    stopping = {name: getattr(config.eval_config, name) for name in fields_of(EarlyStopping)}
    balancing = {name: getattr(config.loss_config, name) for name in fields_of(Balancing)}
    own = {
        "engine": engine,
        "fsdp": config.fsdp_config,
        "deepspeed": None if config.ds_config is None else config.ds_config.to_json(),
        "eval_interval": config.eval_config.eval_batch_interval,
        "best_file": False,
        "sampling": config.eval_config,
        "ledgers": ledgers,
        "description": dump_config(config),
        # Of rollouts; streams lay out their rows themselves.
        "packing": "none" if config.data_loader_config.packing == "none" else "auto",
    }
    return shared | stopping | balancing | own


def make_optimizer(config: TrainConfig, model: nn.Module, engine: str = "torch") -> torch.optim.Optimizer:
    """The optimizer of the configuration as an engine needs it; matrices decay, norms and biases do not."""
    options = config.optim_config
    name = options.optimizer
    if engine == "fsdp" and name in OPTIMIZERS:
        name = OPTIMIZERS[name].of_shards or name
    fused = None if options.fused == "auto" else options.fused
    return configure_optimizer(
        model,
        name,
        lr=options.initial_lr,
        weight_decay=options.weight_decay,
        betas=options.betas,
        eps=options.eps,
        momentum=options.momentum,
        fused=fused,
        lr_multipliers=options.lr_multipliers,
    )


def make_scheduler(config: TrainConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """The learning-rate schedule over `total_steps` optimizer steps; None keeps `initial_lr`."""
    options = config.optim_config
    if not options.enable_lr_scheduler:
        return None
    period, multiplier = options.cosine_annealing_period, options.cosine_annealing_period_mul
    name, shape = options.lr_scheduler, dict[str, Any]()
    if name == "cosine" and period is not None:
        name = "cosine_restarts"
    if name == "cosine_restarts":
        shape = {"period": period or max(1, total_steps - options.warmup_iters), "period_mul": multiplier}
    elif name == "wsd":
        shape = {"decay_steps": max(1, round(options.wsd_decay_fraction * total_steps))}
    elif name == "polynomial":
        shape = {"power": options.polynomial_power}
    elif name == "reduce_on_plateau":
        shape = {"factor": options.plateau_factor, "patience": options.plateau_patience}
    common = {"warmup_steps": options.warmup_iters, "total_steps": total_steps, "min_lr": options.min_lr}
    return create_scheduler(optimizer, name, **common, **shape)
