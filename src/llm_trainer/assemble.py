"""The door of the config style: a `TrainConfig` becomes the objects that a trainer takes. Below it there are no configs."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_trainer.checkpoint import load_checkpoint, load_weights
from llm_trainer.config.load import dump_config
from llm_trainer.config.schema import ModelConfig, TrainConfig
from llm_trainer.data.chat import ChatFormat
from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.data.datasets import Joined
from llm_trainer.data.prepare import DataOptions, load_language_data
from llm_trainer.data.stream import SampleStream
from llm_trainer.data.tokenizer import check_vocabulary, load_tokenizer
from llm_trainer.engine import dist
from llm_trainer.engine.torch import detect_device
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.build import build_model
from llm_trainer.optim import configure_optimizer
from llm_trainer.schedule import create_scheduler
from llm_trainer.trainers.settings import Sampling

if TYPE_CHECKING:
    from llm_trainer.trainers.base import BaseTrainer

OPTIMIZER_NAMES = {"adam": "adamw"}  # the configuration's 'adam' decouples its weight decay


def assemble(config: TrainConfig, trainer_class: "type[BaseTrainer]", given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `trainer_class` from a configuration.

    Args:
        config: the whole run.
        trainer_class: the algorithm; its own section of the configuration goes through its `_from_config`.
        given: keywords that the caller passes himself; they are not made here.

    Raises:
        ValueError: (or a subclass) what the configuration describes cannot be made; the message says why.
    """
    run = config.run_config
    device = detect_device(run.device)
    dist.start(device, run.ddp_timeout_s)
    if config.tokenizer is None:
        raise ValueError("tokenizer: none given; name a tokenizer folder, or set the environment variable TOKEN_DIR")
    tokenizer = load_tokenizer(config.tokenizer)
    model = given["model"] if "model" in given else make_model(config, tokenizer, device)
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
    train, evaluation = make_streams(config, trainer_class, tokenizer, model)
    optimizer = given["optimizer"] if "optimizer" in given else make_optimizer(config, model.to(device))
    steps = train.num_steps() * config.n_epochs
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": make_scheduler(config, optimizer, min(steps, run.max_steps or steps)),
        "train_loader": train,
        "val_loader": evaluation,
        "device": str(device),
        "max_epochs": config.n_epochs,
        "grad_accum_steps": accumulation(config, trainer_class),
        "max_grad_norm": config.optim_config.max_grad_norm,
        "log_interval": run.log_interval,
        "save_dir": run.save_dir,
        "tokenizer": tokenizer,
        "eval_prompts": config.eval_prompts,
        **_settings(config, [*train.dataset.ledgers]),  # type: ignore[attr-defined]
        **trainer_class._from_config(config),
    }


def _settings(config: TrainConfig, ledgers: list[Any]) -> dict[str, Any]:
    run, evaluation = config.run_config, config.eval_config
    return {
        "max_steps": run.max_steps,
        "seed": run.seed,
        "precision": run.precision,
        "compile": run.compile,
        "gradient_checkpointing": run.gradient_checkpointing,
        "max_bad_steps": run.max_bad_steps,
        "eval_interval": evaluation.eval_batch_interval,
        "save_interval_steps": run.save_interval_steps,
        "checkpoints_to_keep": run.checkpoints_to_keep,
        "early_stopping_patience": evaluation.early_stopping_patience,
        "early_stopping_min_delta": evaluation.early_stopping_min_delta,
        "resume": run.resume,
        "log_dir": run.log_dir,
        "writers": run.writers,
        "progress": run.progress,
        "ddp_timeout_s": run.ddp_timeout_s,
        "best_file": False,
        "sampling": Sampling(evaluation.max_seq_len, evaluation.temperature, evaluation.top_p, evaluation.top_k),
        "ledgers": ledgers,
        "description": dump_config(config),
    }


def accumulation(config: TrainConfig, trainer_class: "type[BaseTrainer]") -> int:
    """Micro-batches per optimizer step, from the algorithm's section."""
    section = getattr(config, section_of(config, trainer_class))
    return 1 if section is None else section.gradient_accumulation_steps


def section_of(config: TrainConfig, trainer_class: "type[BaseTrainer]") -> str:
    """The section of the configuration that steers `trainer_class`: its own, or the only one that is there."""
    own = trainer_class.config_section
    if own == "sft_config" and config.sft_config is None and config.pretrain_config is not None:
        return "pretrain_config"  # PretrainTrainer is SFTTrainer: the configuration tells which of them is meant
    return own


def make_model(config: TrainConfig, tokenizer: Any, device: torch.device) -> Any:
    """Build or load the model with the weights that the run starts from; the same on every rank."""
    torch.manual_seed(config.run_config.seed)
    attention = resolve_attention(config.run_config.attention, device)
    wanted = config.model_config
    if isinstance(wanted, ModelConfig) and wanted.vocab_size is None:
        wanted = replace(wanted, vocab_size=len(tokenizer))
    model = build_model(wanted, attention=attention)
    if config.init_state_dict is not None:
        load_weights(model, config.init_state_dict, "init_state_dict")
    if config.init_weights_path is not None:
        load_checkpoint(config.init_weights_path, model=model)
    return model


def make_streams(
    config: TrainConfig, trainer_class: "type[BaseTrainer]", tokenizer: Any, model: Any
) -> tuple[SampleStream, SampleStream | None]:
    """Training and validation data as streams of micro-batches for this rank."""
    loader, sft = config.data_loader_config, config.sft_config
    stage = "pretrain" if section_of(config, trainer_class) == "pretrain_config" else "sft"
    packing = loader.packing or ("wrapped" if stage == "pretrain" else "none")
    context = model.config.max_position_embeddings
    block_size = config.dataset_block_size or context
    if block_size > context:
        raise ValueError(f"dataset_block_size: got {block_size}, but the model's longest sequence is {context}")
    options = DataOptions(
        stage=stage,
        schema=loader.schema,
        block_size=block_size,
        packing=packing,
        truncation=loader.truncation,
        bad_rows=loader.bad_rows,
        text_unit=loader.text_unit,
        workers=loader.data_loader_num_workers,
    )
    chat = ChatFormat(tokenizer) if sft is None else ChatFormat(tokenizer, train_on=sft.train_on, thinking=sft.thinking)
    cache = Path(loader.cache_dir or Path(config.run_config.save_dir) / "data")
    flat = packing in ("flat", "bfd", "bfd_split")
    collate = collate_flat if flat else partial(collate_padded, pad_id=tokenizer.pad_token_id)
    world = dist.world_size()

    def stream(paths: Any, batch_size: int, rows_per_step: int, shuffle: bool) -> SampleStream:
        with dist.main_process_first():
            dataset: Joined = load_language_data([str(paths[i]) for i in range(len(paths))], chat, options, cache)
        return SampleStream(
            dataset,
            collate,
            rows_per_step=rows_per_step,
            batch_size=batch_size,
            rank=dist.rank(),
            world_size=world,
            micro_batch_tokens=loader.micro_batch_tokens,
            flat=flat,
            shuffle=shuffle,
            seed=config.run_config.seed,
            num_workers=loader.data_loader_num_workers,
            pin_memory=loader.data_loader_pin_memory,
        )

    rows = config.batch_size * accumulation(config, trainer_class) * world
    train = stream(config.file_dataset, config.batch_size, rows, loader.data_loader_shuffle)
    if config.eval_dataset is None:
        return train, None
    eval_rows = config.eval_config.eval_batch_size or config.batch_size
    return train, stream(config.eval_dataset, eval_rows, eval_rows * world, False)


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the configuration; matrices decay, norms and biases do not."""
    options = config.optim_config
    name = OPTIMIZER_NAMES.get(options.optim_type, options.optim_type)
    return configure_optimizer(
        model,
        name,
        lr=options.initial_lr,
        weight_decay=options.weight_decay,
        betas=options.betas,
        eps=options.eps,
        momentum=options.momentum,
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
