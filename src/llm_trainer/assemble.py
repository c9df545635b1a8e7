"""The door of the config style: a `TrainConfig` becomes the objects that a trainer takes. Below it there are no configs."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llm_trainer.checkpoint import CheckpointManager, load_checkpoint, load_weights
from llm_trainer.config.algorithms import DPOConfig, PretrainConfig, RewardConfig, SFTConfig
from llm_trainer.config.load import dump_config
from llm_trainer.config.options import Fsdp, Sampling
from llm_trainer.config.schema import ModelConfig, TrainConfig
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import check_vocabulary, load_tokenizer
from llm_trainer.data.kinds import DataOptions, Kind
from llm_trainer.data.kinds.pairs import PairRows
from llm_trainer.data.load import choose_kind, load, open_stream
from llm_trainer.data.read.files import files_of
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.engine.choose import check_precision, engine_name
from llm_trainer.engine.device import DTYPES, choose_precision, detect_device
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.losses.preference import PreferenceLoss, resolve_loss_type
from llm_trainer.models.attention import knows_branches, resolve_attention
from llm_trainer.models.build import build_model, set_stops
from llm_trainer.models.frozen import fingerprint, freeze, frozen_copy
from llm_trainer.models.rewarding import (
    ANSWERS,
    STEPS,
    judged_in,
    load_reward_model,
    process_reward_model,
    reward_model,
)
from llm_trainer.models.scored import scored
from llm_trainer.optim.optimizers import configure_optimizer
from llm_trainer.optim.schedules import create_scheduler
from llm_trainer.trainers.completions import as_rows, placed, score, share_prompts
from llm_trainer.trainers.distill import Distillation, check_same_tokenizer

if TYPE_CHECKING:
    from llm_trainer.trainers.base import BaseTrainer

SECTIONS = ("pretrain_config", "sft_config", "dpo_config", "reward_config", "kto_config")  # one per algorithm
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
    deepspeed = None if config.ds_config is None else config.ds_config.to_json()
    check_precision(_engine(config), run.precision, deepspeed, device, given.get("use_amp", True))
    dist.start(device, run.ddp_timeout_s)
    if config.fsdp_config is not None and _engine(config) == "fsdp":
        dist.share_data(config.fsdp_config.tensor_parallel_size)
    if dist.is_main():
        CheckpointManager(run.save_dir)  # a folder that cannot be written shows now, not after an hour of tokenizing
    if config.tokenizer is None:
        raise ValueError("tokenizer: none given; name a tokenizer folder, or set the environment variable TOKEN_DIR")
    tokenizer = load_tokenizer(config.tokenizer)
    if "model" in given:
        model = given["model"]
    elif trainer_class.config_section == "reward_config":
        model = make_reward_model(config, trainer_class, tokenizer, device)
    else:
        empty = shares_weights(config, trainer_class) and not dist.is_main()
        model = make_model(config, tokenizer, device, empty)
    check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings)
    distillation = make_distillation(config, trainer_class, tokenizer, given)
    train, evaluation = make_streams(config, trainer_class, tokenizer, model)
    if _engine(config) in ("torch", "hf"):  # the others shard it on the way there: it may be too big for one device
        model.to(device)
    optimizer = given["optimizer"] if "optimizer" in given else make_optimizer(config, model)
    steps = train.num_steps() * config.n_epochs
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": make_scheduler(config, optimizer, min(steps, run.max_steps or steps)),
        "train_loader": train,
        "val_loader": evaluation or None,
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
        **distillation,
        **({} if "ref_model" in given else make_reference(config, trainer_class, model, (train, *evaluation.values()))),
    }


def _engine(config: TrainConfig) -> str:
    given = {"fsdp": config.fsdp_config is not None, "deepspeed": config.ds_config is not None}
    return engine_name(config.run_config.engine, **given)


def _settings(config: TrainConfig, ledgers: list[Any]) -> dict[str, Any]:
    run, evaluation = config.run_config, config.eval_config
    return {
        "max_steps": run.max_steps,
        "seed": run.seed,
        "precision": run.precision,
        "engine": _engine(config),
        "fsdp": None if config.fsdp_config is None else Fsdp(**vars(config.fsdp_config)),
        "deepspeed": None if config.ds_config is None else config.ds_config.to_json(),
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
    if not own:
        raise ValueError(
            f"{trainer_class.__name__} has no section in a configuration: set its class attribute config_section (to "
            f"'sft_config', say) and write _from_config, or give it model, optimizer and train_loader"
        )
    if own == "sft_config" and config.sft_config is None and config.pretrain_config is not None:
        return "pretrain_config"  # PretrainTrainer is SFTTrainer: the configuration tells which of them is meant
    return own


def shares_weights(config: TrainConfig, trainer_class: "type[BaseTrainer]") -> bool:
    """Whether only the main process needs the first weights whole: nothing else is made of them before they are sharded."""
    language = section_of(config, trainer_class) in ("pretrain_config", "sft_config")
    return language and _engine(config) == "fsdp" and dist.num_processes() > 1


def make_model(config: TrainConfig, tokenizer: Any, device: torch.device, empty: bool = False) -> Any:
    """Build or load the model with the weights that the run starts from, the same on every rank; or `empty`, without any."""
    torch.manual_seed(config.run_config.seed)
    attention = resolve_attention(config.run_config.attention, device)
    wanted = config.model_config
    if isinstance(wanted, ModelConfig) and wanted.vocab_size is None:
        wanted = replace(wanted, vocab_size=len(tokenizer))
    model = build_model(wanted, attention=attention, empty=empty)
    set_stops(model, ChatFormat(tokenizer).stop_token_ids(), tokenizer.pad_token_id)
    if empty:
        return model
    if config.init_state_dict is not None:
        load_weights(model, config.init_state_dict, "init_state_dict")
    if config.init_weights_path is not None:
        load_checkpoint(config.init_weights_path, model=model)
    return model


def make_reward_model(
    config: TrainConfig, trainer_class: "type[BaseTrainer]", tokenizer: Any, device: torch.device
) -> Any:
    """The reward model of a folder, to train on, or a new head on a language model: of answers or, as the data is, steps.

    Raises:
        ValueError: the model of the folder judges the other of the two.
    """
    steps, folder = kind_of(config, trainer_class).name == "process", config.model_config
    judged = judged_in(folder) if isinstance(folder, str) else None
    if judged is None or not isinstance(folder, str):
        make = process_reward_model if steps else reward_model
        return make(make_model(config, tokenizer, device), tokenizer.pad_token_id)
    wanted = STEPS if steps else ANSWERS
    if judged != wanted:
        raise ValueError(
            f"model_config: {folder} holds a ...{judged} model, but the rows of file_dataset are "
            f"{'answers judged step by step' if steps else 'pairs of answers'}; expected ...{wanted}, or a language model"
        )
    return load_reward_model(folder, resolve_attention(config.run_config.attention, device))


def kind_of(config: TrainConfig, trainer_class: "type[BaseTrainer]") -> Kind:
    """What a row of the data is: the kind of rows of the trainer, of several the one that the first file holds."""
    names = trainer_class.rows
    if section_of(config, trainer_class) == "pretrain_config":
        names = ("text",)  # PretrainTrainer is SFTTrainer: the configuration tells which of them is meant
    loader = config.data_loader_config
    options = DataOptions(schema=loader.schema, text_unit=loader.text_unit)
    return choose_kind(names, _paths(config.file_dataset), options)


def make_streams(
    config: TrainConfig, trainer_class: "type[BaseTrainer]", tokenizer: Any, model: Any
) -> tuple[SampleStream, dict[str, SampleStream]]:
    """Training and validation data as streams of micro-batches for this rank; of several validation files, by name."""
    loader, sft = config.data_loader_config, config.sft_config
    section, kind = getattr(config, section_of(config, trainer_class)), kind_of(config, trainer_class)
    context = model.config.max_position_embeddings
    block_size = config.dataset_block_size or context
    if block_size > context:
        raise ValueError(f"dataset_block_size: got {block_size}, but the model's longest sequence is {context}")
    may_share = kind.may_share and isinstance(section, DPOConfig | RewardConfig) and section.share_prompts
    options = DataOptions(
        schema=loader.schema,
        block_size=block_size,
        packing=loader.packing or kind.packings[0],
        truncation=loader.truncation,
        bad_rows=loader.bad_rows,
        text_unit=loader.text_unit,
        workers=loader.data_loader_num_workers,
        share_prompts=may_share and knows_branches(model.config, detect_device(config.run_config.device)),
    )
    chat = ChatFormat(tokenizer) if sft is None else ChatFormat(tokenizer, train_on=sft.train_on, thinking=sft.thinking)
    cache = Path(loader.cache_dir or Path(config.run_config.save_dir) / "data")
    world = dist.world_size()

    def stream(paths: list[str], batch_size: int, rows_per_step: int, **how: Any) -> SampleStream:
        with dist.main_process_first():
            dataset = load(paths, kind, chat, options, cache)
        return open_stream(
            dataset,
            kind,
            options,
            tokenizer.pad_token_id,
            rows_per_step=rows_per_step,
            batch_size=batch_size,
            rank=dist.rank(),
            world_size=world,
            micro_batch_tokens=loader.micro_batch_tokens,
            seed=config.run_config.seed,
            num_workers=loader.data_loader_num_workers,
            pin_memory=loader.data_loader_pin_memory,
            **how,
        )

    rows = config.batch_size * accumulation(config, trainer_class) * world
    files, weights = _paths(config.file_dataset), _file_weights(config)
    shuffle = loader.data_loader_shuffle
    train = stream(files, config.batch_size, rows, shuffle=shuffle, file_weights=weights)
    eval_rows = config.eval_config.eval_batch_size or config.batch_size
    evaluation = _named(_paths(config.eval_dataset)) if config.eval_dataset is not None else {}
    return train, {
        name: stream([path], eval_rows, eval_rows * world, shuffle=False) for name, path in evaluation.items()
    }


def _paths(files: Any) -> list[str]:
    return [str(files[i]) for i in range(len(files))]


def _named(paths: list[str]) -> dict[str, str]:
    """Files by the names of their metrics: their stems, numbered where they repeat; a single file needs none."""
    if len(paths) == 1:
        return {"": paths[0]}
    named: dict[str, str] = {}
    for path in paths:
        stem = Path(path).stem
        named[next(n for n in (stem, *(f"{stem}_{i}" for i in range(2, len(paths) + 1))) if n not in named)] = path
    return named


def _file_weights(config: TrainConfig) -> list[float] | None:
    """The weight of every file, where a path of `file_dataset` may be a folder of several.

    Raises:
        ValueError: there is not one weight above 0 per path.
    """
    weights, paths = config.data_loader_config.file_weights, _paths(config.file_dataset)
    if weights is None:
        return None
    if len(weights) != len(paths) or min(weights) <= 0:
        raise ValueError(
            f"data_loader_config.file_weights: got {weights}, expected {len(paths)} numbers above 0, one for each path of "
            f"file_dataset"
        )
    return [weight for weight, path in zip(weights, paths, strict=True) for _ in files_of(Path(path))]


def make_distillation(
    config: TrainConfig, trainer_class: "type[BaseTrainer]", tokenizer: Any, given: dict[str, Any]
) -> dict[str, Any]:
    """The `kd` of a language trainer, its teacher loaded and its tokenizer compared; nothing without a `kd_config`."""
    section = getattr(config, section_of(config, trainer_class))
    if not isinstance(section, PretrainConfig | SFTConfig) or section.kd_config is None or "kd" in given:
        return {}
    kd, run, teacher = section.kd_config, config.run_config, None
    if kd.teacher_model is not None and "teacher_model" not in given:
        theirs = load_tokenizer(kd.teacher_model)
        check_same_tokenizer(tokenizer.get_vocab(), theirs.get_vocab(), kd.teacher_model)
        device = detect_device(run.device)
        dtype = DTYPES[choose_precision(run.precision, device)]  # it is only read: no need for more
        teacher = build_model(kd.teacher_model, attention=resolve_attention(run.attention, device), dtype=dtype)
    stops = tuple(ChatFormat(tokenizer).stop_token_ids())
    return {"kd": Distillation(**vars(kd) | {"teacher_model": teacher, "stop_token_ids": stops})}


def make_reference(
    config: TrainConfig, trainer_class: "type[BaseTrainer]", model: Any, streams: Iterable[SampleStream]
) -> dict[str, Any]:
    """What the policy is compared with, as keywords of the trainer; none: the trainer makes a copy, or needs none."""
    own = trainer_class.config_section
    section = config.dpo_config if own == "dpo_config" else config.kto_config if own == "kto_config" else None
    source = None if section is None else section.ref_model_checkpoint
    reference = None if source is None else freeze(load_reference(config, source, model))
    if isinstance(section, DPOConfig) and section.precompute_ref_log_probs:
        if not PreferenceLoss(resolve_loss_type(section.loss_type, section.loss_ipo)).needs_reference:
            return {}
        for stream in streams:
            precompute_reference(config, stream, model if reference is None else reference)
        return {"ref_log_probs_given": True, "starts_at_reference": reference is None}
    return {} if reference is None else {"ref_model": reference}


def load_reference(config: TrainConfig, source: Any, model: Any) -> nn.Module:
    """The model of a Hugging Face folder, or one like `model` with the weights of a checkpoint or state dict."""
    if isinstance(source, str) and (Path(source) / "config.json").exists():
        device = detect_device(config.run_config.device)
        return build_model(source, attention=resolve_attention(config.run_config.attention, device))
    reference = frozen_copy(model)
    if isinstance(source, str):
        load_checkpoint(source, model=reference)
    else:
        load_weights(reference, source, "ref_model_checkpoint")
    return reference


@torch.no_grad()
def precompute_reference(config: TrainConfig, stream: SampleStream, reference: nn.Module) -> None:
    """Give every pair the reference's summed log-probs, from a file beside the pairs' tokens or computed now.

    All ranks score their share, the main process writes the file.
    """
    device = detect_device(config.run_config.device)
    precision = TorchEngine(device, choose_precision(config.run_config.precision, device)).precision
    model, was_training, key = scored(reference).to(device), reference.training, fingerprint(reference)
    assert config.dpo_config is not None
    shares_prompts = config.dpo_config.share_prompts and model.knows_branches(device)
    model.eval()
    for rows in stream.dataset.parts:  # type: ignore[attr-defined]
        assert isinstance(rows, PairRows)
        path = rows.store.folder / f"ref_logps-{key}-{rows.how.block_size}-{rows.how.truncation}.npy"
        if not dist.broadcast_object(path.exists()):
            table = torch.zeros(len(rows.lengths), 2, device=device)
            mine = np.argsort(-rows.lengths)[dist.rank() :: dist.world_size()]  # of similar lengths together
            for first in range(0, len(mine), stream.batch_size):
                group = mine[first : first + stream.batch_size].tolist()
                batch = stream.collate([rows[i] for i in group])
                batch = placed(share_prompts(batch) if shares_prompts else batch, device)
                with precision():
                    sums = as_rows(score(model, batch).logprobs, batch).sum(1)  # [2B], chosen first
                table[group] = sums.view(2, -1).T
            table = dist.all_reduce(table)
            if dist.is_main():
                partial_path = path.with_suffix(".tmp.npy")
                np.save(partial_path, table.cpu().numpy())
                partial_path.rename(path)
            dist.broadcast_object(None)  # nobody reads before it is written
        rows.ref_logps = np.load(path)
    model.train(was_training)


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
