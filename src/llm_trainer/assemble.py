"""The door of the config style: a `TrainConfig` becomes the objects that a trainer takes. Below it there are no configs."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_trainer.checkpoint import CheckpointManager, load_checkpoint, load_weights
from llm_trainer.config.algorithms import DPOConfig, RewardConfig
from llm_trainer.config.errors import fields_of
from llm_trainer.config.load import dump_config
from llm_trainer.config.options import EarlyStopping, Execution
from llm_trainer.config.registry import accumulation, options_of, section_of
from llm_trainer.config.schema import ModelConfig, TrainConfig
from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.data.datasets import Joined
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import check_vocabulary, load_tokenizer
from llm_trainer.data.pairs import collate_pairs, collate_unpaired, load_answers
from llm_trainer.data.prepare import DataOptions, files_of, load_language_data
from llm_trainer.data.steps import collate_steps, holds_steps, load_steps
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.engine.choose import engine_name
from llm_trainer.engine.torch import DTYPES, TorchEngine, choose_precision, detect_device
from llm_trainer.losses.unpaired import mismatched_order
from llm_trainer.models.attention import knows_branches, resolve_attention
from llm_trainer.models.build import build_model, set_stops
from llm_trainer.models.frozen import freeze, frozen_copy
from llm_trainer.optim.optimizers import configure_optimizer
from llm_trainer.optim.schedules import create_scheduler
from llm_trainer.trainers.completions import num_shared

if TYPE_CHECKING:
    from llm_trainer.trainers.base import BaseTrainer

STAGES = {  # section of the configuration -> what its rows are
    "pretrain_config": "pretrain",
    "sft_config": "sft",
    "dpo_config": "preference",
    "reward_config": "preference",
    "kto_config": "unpaired",
}


def assemble(config: TrainConfig, trainer_class: "type[BaseTrainer]", given: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `trainer_class` from a configuration.

    Args:
        config: the whole run.
        trainer_class: the algorithm, which makes its model and its own keywords by itself, with the help of a `Builder`.
        given: keywords that the caller passes himself; they are not made here.

    Raises:
        ValueError: (or a subclass) what the configuration describes cannot be made; the message says why.
    """
    run, build = config.run_config, Builder(config, trainer_class, given)
    dist.start(build.device, run.ddp_timeout_s)
    if config.fsdp_config is not None and build.engine == "fsdp":
        dist.share_data(config.fsdp_config.tensor_parallel_size)
    if dist.is_main():
        CheckpointManager(run.save_dir)  # a folder that cannot be written shows now, not after an hour of tokenizing
    model = build.policy
    check_vocabulary(build.tokenizer, model.get_input_embeddings().num_embeddings)
    own = trainer_class._from_config(config, build)
    train, *_ = build.streams
    if build.engine in ("torch", "hf"):  # the others shard it on the way there: it may be too big for one device
        model.to(build.device)
    optimizer = given["optimizer"] if "optimizer" in given else make_optimizer(config, model)
    steps = train.num_steps() * config.n_epochs
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
        "tokenizer": build.tokenizer,
        "eval_prompts": config.eval_prompts,
        **_settings(config, build.engine, [*train.dataset.ledgers]),
        **own,
    }


class Builder:
    """The objects of one run, each made when it is first asked for (`trainers.building.Build` says what they are)."""

    def __init__(
        self, config: TrainConfig, trainer_class: "type[BaseTrainer]", given: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.trainer_class, self.given = config, trainer_class, given or {}
        self.section = options_of(config, trainer_class)

    @cached_property
    def device(self) -> torch.device:
        return detect_device(self.config.run_config.device)

    @cached_property
    def engine(self) -> str:
        """The name of what executes the steps."""
        config = self.config
        named = {"fsdp": config.fsdp_config is not None, "deepspeed": config.ds_config is not None}
        return engine_name(config.run_config.engine, **named)

    @cached_property
    def _half(self) -> str:
        return choose_precision(self.config.run_config.precision, self.device)

    @property
    def precision(self) -> Callable[[], AbstractContextManager[None]]:
        return TorchEngine(self.device, self._half).precision

    @cached_property
    def stage(self) -> str:
        return stage_of(self.config, self.trainer_class)

    @cached_property
    def tokenizer(self) -> Any:
        if self.config.tokenizer is None:
            raise ValueError(
                "tokenizer: none given; name a tokenizer folder, or set the environment variable TOKEN_DIR"
            )
        return load_tokenizer(self.config.tokenizer)

    def tokenizer_of(self, source: str) -> Any:
        return load_tokenizer(source)

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        return tuple(ChatFormat(self.tokenizer).stop_token_ids())

    @cached_property
    def policy(self) -> Any:
        return (
            self.given["model"] if "model" in self.given else self.trainer_class._model_from_config(self.config, self)
        )

    @cached_property
    def _data(self) -> tuple[SampleStream, dict[str, SampleStream]]:
        return make_streams(self.config, self.trainer_class, self.tokenizer, self.policy)

    @property
    def evaluation(self) -> dict[str, SampleStream]:
        """Validation data by name."""
        return self._data[1]

    @property
    def streams(self) -> tuple[Any, ...]:
        train, evaluation = self._data
        return train, *evaluation.values()

    def model(self, source: str | None = None, in_half: bool = False) -> Any:
        if source is None:
            sharded = self.engine == "fsdp" and dist.num_processes() > 1
            empty = sharded and self.trainer_class.shards_first_weights and not dist.is_main()
            return make_model(self.config, self.tokenizer, self.device, empty)
        attention = resolve_attention(self.config.run_config.attention, self.device)
        return build_model(source, attention=attention, dtype=DTYPES[self._half if in_half else "fp32"])

    def frozen(self, source: Any) -> nn.Module:
        if isinstance(source, str) and (Path(source) / "config.json").exists():
            return freeze(self.model(source))
        reference = frozen_copy(self.policy)
        if isinstance(source, str):
            load_checkpoint(source, model=reference)
        else:
            load_weights(reference, source, "ref_model_checkpoint")
        return reference


def _settings(config: TrainConfig, engine: str, ledgers: list[Any]) -> dict[str, Any]:
    """The fields of `Settings`: those of shared groups by their names, then what one style alone has."""
    shared = {name: getattr(config.run_config, name) for name in fields_of(Execution)}
    stopping = {name: getattr(config.eval_config, name) for name in fields_of(EarlyStopping)}
    own = {
        "engine": engine,
        "fsdp": config.fsdp_config,
        "deepspeed": None if config.ds_config is None else config.ds_config.to_json(),
        "eval_interval": config.eval_config.eval_batch_interval,
        "best_file": False,
        "sampling": config.eval_config,
        "ledgers": ledgers,
        "description": dump_config(config),
    }
    return shared | stopping | own


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


def stage_of(config: TrainConfig, trainer_class: "type[BaseTrainer]") -> str:
    """What the rows are used for; a reward model learns from pairs or, where the first file holds such, from steps."""
    section, loader = section_of(config, trainer_class), config.data_loader_config
    if section == "reward_config":
        options = DataOptions(stage="steps", schema=loader.schema, text_unit=loader.text_unit)
        first = next((file for path in _paths(config.file_dataset) for file in files_of(Path(path))), None)
        if first is not None and holds_steps(first, options):
            return "steps"
    return STAGES.get(section, "sft")


def make_streams(
    config: TrainConfig, trainer_class: "type[BaseTrainer]", tokenizer: Any, model: Any
) -> tuple[SampleStream, dict[str, SampleStream]]:
    """Training and validation data as streams of micro-batches for this rank; of several validation files, by name."""
    loader, sft = config.data_loader_config, config.sft_config
    section, stage = getattr(config, section_of(config, trainer_class)), stage_of(config, trainer_class)
    packing = loader.packing or ("wrapped" if stage == "pretrain" else "none")
    context = model.config.max_position_embeddings
    block_size = config.dataset_block_size or context
    if block_size > context:
        raise ValueError(f"dataset_block_size: got {block_size}, but the model's longest sequence is {context}")
    may_share = stage == "preference" and isinstance(section, DPOConfig | RewardConfig) and section.share_prompts
    shares_prompts = may_share and knows_branches(model.config, detect_device(config.run_config.device))
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
    collate: Any = collate_flat if flat else partial(collate_padded, pad_id=tokenizer.pad_token_id)
    load: Any = load_language_data
    if stage == "steps":
        collate, load = partial(collate_steps, collate=collate), load_steps
    elif stage in ("preference", "unpaired"):
        collate = partial(collate_pairs if stage == "preference" else collate_unpaired, collate=collate)
        load = partial(load_answers, pair_up=mismatched_order, num_shared=num_shared if shares_prompts else None)
    world = dist.world_size()

    def stream(paths: list[str], batch_size: int, rows_per_step: int, **how: Any) -> SampleStream:
        with dist.main_process_first():
            dataset: Joined = load(paths, chat, options, cache)
        return SampleStream(
            dataset,
            collate,
            rows_per_step=rows_per_step,
            batch_size=batch_size,
            rank=dist.rank(),
            world_size=world,
            micro_batch_tokens=loader.micro_batch_tokens,
            flat=flat or shares_prompts,
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


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the configuration; matrices decay, norms and biases do not."""
    options = config.optim_config
    return configure_optimizer(
        model,
        options.optimizer,
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
