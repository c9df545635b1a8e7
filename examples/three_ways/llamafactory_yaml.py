"""Our YAML in LLaMA-Factory's words: its training arguments, its dataset_info.json, and what it has no words for.

Written for LLaMA-Factory 0.9.5 (`llamafactory/hparams`, `llamafactory/data/parser.py`). Nothing is dropped silently: every
key that differs from its default and is not in `TRANSLATED` is listed to the user.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llamafactory_images import arguments_of, family_of, files_shown, images_beside

from llm_trainer.config.adapters import ALL_LINEAR, LORA, RANK, AdapterConfig
from llm_trainer.config.algorithms import DPOConfig, PretrainConfig, SFTConfig
from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.options import Reading
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.encode.row_images import ImageError, RowImages
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import find_schema
from llm_trainer.data.read.errors import DataError, DroppedRow
from llm_trainer.data.read.files import files_of, read_rows
from llm_trainer.data.read.messages import Message
from llm_trainer.data.read.recognise import head_of
from llm_trainer.data.read.schemas import Schema
from llm_trainer.data.vision import ImageFormat
from llm_trainer.optim import optimizers

RENAMED = {  # ours -> theirs, the value as it is
    "n_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "data_loader_config.data_loader_num_workers": "dataloader_num_workers",
    "data_loader_config.data_loader_pin_memory": "dataloader_pin_memory",
    "loss_config.label_smoothing": "label_smoothing_factor",
    "loss_config.dft": "use_dft_loss",
    "loss_config.aux_loss_coef": "moe_aux_loss_coef",
    "optim_config.initial_lr": "learning_rate",
    "optim_config.warmup_iters": "warmup_steps",
    "optim_config.eps": "adam_epsilon",
    "optim_config.max_grad_norm": "max_grad_norm",
    "run_config.seed": "seed",
    "run_config.log_interval": "logging_steps",
    "run_config.checkpoints_to_keep": "save_total_limit",
    "run_config.writers": "report_to",
    "run_config.ddp_timeout_s": "ddp_timeout",
}
TRANSLATED = {  # besides: by the functions below, or with the model and the data
    *RENAMED,
    *("model_config", "tokenizer", "init_state_dict", "init_weights_path", "file_dataset", "eval_dataset"),
    # These stand in the folder that it begins from: the positions in its config.json, tokens in tokenizer and weights.
    *("model_overrides", "vocabulary_config.add_tokens", "vocabulary_config.add_special_tokens"),
    *("vocabulary_config.pad_to_multiple_of", "vocabulary_config.chat_template"),
    *("dataset_block_size", "data_loader_config.data_loader_shuffle", "data_loader_config.schema"),
    *("data_loader_config.packing", "data_loader_config.text_unit", "data_loader_config.cache_dir"),
    "data_loader_config.bad_rows",
    *("optim_config.weight_decay", "optim_config.betas", "optim_config.optim_type", "optim_config.enable_lr_scheduler"),
    *("optim_config.lr_scheduler", "optim_config.min_lr", "optim_config.max_lr", "optim_config.wsd_decay_fraction"),
    *("optim_config.polynomial_power", "optim_config.plateau_patience", "optim_config.plateau_factor"),
    *("eval_config.eval_batch_interval", "eval_config.eval_batch_size", "run_config.save_dir", "run_config.log_dir"),
    *(
        "run_config.max_steps",
        "run_config.compile",
        "run_config.precision",
        "run_config.attention",
        "run_config.device",
        "run_config.engine",
    ),
    *(
        "run_config.save_interval_steps",
        "run_config.resume",
        "run_config.gradient_checkpointing",
        "run_config.progress",
    ),
    *(f"{stage}_config.gradient_accumulation_steps" for stage in ("pretrain", "sft", "dpo")),
    *("sft_config.mask_prompt", "sft_config.train_on", "dpo_config.loss_type", "dpo_config.loss_beta"),
    *(
        "dpo_config.loss_ipo",
        "dpo_config.loss_label_smoothing",
        "dpo_config.loss_simpo_gamma",
        "dpo_config.nll_loss_coef",
    ),
    *("dpo_config.ref_model_checkpoint", "dpo_config.precompute_ref_log_probs", "dpo_config.share_prompts"),
    *("adapter_config", "optim_config.lr_multipliers"),
    *("freeze", "sft_config.freeze_llm_model", "sft_config.image_tags_file_dataset"),  # by llamafactory_images.py
    *("data_loader_config.image_root", "data_loader_config.max_pixels", "data_loader_config.bad_images"),
}
OPTIMIZERS = {"adam": "adamw_torch", "adamw": "adamw_torch", "sgd": "sgd", "adafactor": "adafactor"}
PREFERENCE_LOSSES = {"dpo": "sigmoid", "hinge": "hinge", "ipo": "ipo", "orpo": "orpo", "simpo": "simpo"}
ATTENTION = {"sdpa": "sdpa", "eager": "disabled", "flash_attention_2": "fa2", "flash_attention_3": "fa3"}
READ_BY_THEM = (".json", ".jsonl", ".csv", ".parquet")
OPENAI: dict[str, Any] = {
    "formatting": "openai",
    "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    | {"system_tag": "system", "observation_tag": "tool", "function_tag": "function_call"},
}
SHAREGPT: dict[str, Any] = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
SHAREGPT_ROLES = {"system", "human", "gpt"}
COLUMNS = {  # schema -> (prompt, query, response) of their `alpaca` formatting, which joins the first two by a newline
    "alpaca": ("instruction", "input", "output"),
    "dolly": ("instruction", "context", "response"),
    "question_answer": ("question", "input", "answer"),
    "prompt_response": ("prompt", "input", "response"),
    "mbpp": ("text", "input", "code"),
    "prompt_completion": ("prompt", "", "completion"),
    "text": ("text", "", ""),
    "content": ("content", "", ""),
}


@dataclass
class Translation:
    """A run in LLaMA-Factory's words.

    Attributes:
        arguments: the YAML that `llamafactory-cli train` reads.
        datasets: its dataset_info.json.
        untold: what it cannot be told, one line each.
    """

    arguments: dict[str, Any]
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    untold: list[str] = field(default_factory=list)


def leaves(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """`(dotted name, value, default)` of every key; `model_config` and sections without a translation are one key each."""
    for name, info in fields_of(type(section)).items():
        value, default = getattr(section, name), info.get_default(call_default_factory=True)
        path = f"{prefix}{name}"
        has_keys = default is not None or path in ("pretrain_config", "sft_config", "dpo_config")
        if dataclasses.is_dataclass(value) and has_keys and name != "model_config":
            yield from leaves(value, f"{path}.")
        else:
            yield path, value, default


def stage_of(config: TrainConfig) -> tuple[str, PretrainConfig | SFTConfig | DPOConfig]:
    """LLaMA-Factory's stage and the section that describes it.

    Raises:
        ConfigError: the run is none of the three that are translated.
    """
    for stage, section in (("pt", config.pretrain_config), ("sft", config.sft_config), ("dpo", config.dpo_config)):
        if section is not None:
            return stage, section
    raise ConfigError("expected a pretrain_config, an sft_config or a dpo_config: only these are translated")


def translate(
    config: TrainConfig, model: Path, *, cutoff_len: int, precision: str, on_cpu: bool, total_steps: int
) -> Translation:
    """The training arguments; the data comes from `add_data`.

    Args:
        config: the whole run.
        model: a Hugging Face folder with the initial weights and the tokenizer.
        cutoff_len: tokens of the longest row.
        precision: 'fp32', 'bf16' or 'fp16'.
        on_cpu: whether it trains without an accelerator.
        total_steps: optimizer steps of the whole run.
    """
    run, loader = config.run_config, config.data_loader_config
    optim, own = config.optim_config, optimizers.OPTIMIZERS["adamw"]
    betas = optim.betas or own.betas
    stage, section = stage_of(config)
    values = {name: value for name, value, _ in leaves(config)}
    writers: list[str] = [*run.writers]
    result = Translation(
        {"stage": stage, "do_train": True, "finetuning_type": "full", "model_name_or_path": str(model)}
    )
    result.arguments |= {theirs: values[ours] for ours, theirs in RENAMED.items()}
    result.arguments |= {
        "output_dir": str(Path(run.save_dir) / "llamafactory"),
        "max_steps": run.max_steps or -1,
        "cutoff_len": cutoff_len,
        "gradient_accumulation_steps": section.gradient_accumulation_steps,
        "weight_decay": own.weight_decay if optim.weight_decay is None else optim.weight_decay,
        "adam_beta1": betas[0],
        "adam_beta2": betas[1],
        "bf16": precision == "bf16",
        "fp16": precision == "fp16",
        "use_cpu": on_cpu,
        "torch_compile": run.compile is True,  # it has no way to wait and see
        "flash_attn": ATTENTION.get(run.attention, "auto"),
        "disable_gradient_checkpointing": not run.gradient_checkpointing,
        "disable_shuffling": not loader.data_loader_shuffle,
        "disable_tqdm": not run.progress,
        "overwrite_output_dir": run.resume != "auto",
        "save_strategy": "epoch" if run.save_interval_steps is None else "steps",
        "save_steps": run.save_interval_steps or 500,
        "include_num_input_tokens_seen": "non_padding",
        "preprocessing_batch_size": 1 << 30,  # blocks of a text are cut once, not per 1,000 rows
        "report_to": writers or ["none"],
    }
    if run.resume not in ("auto", "never"):
        result.untold.append(f"run_config.resume: a checkpoint of ours ({run.resume}) means nothing to it")
    if run.attention not in ("auto", *ATTENTION):
        result.untold.append(f"run_config.attention: {run.attention}; it chooses")
    _optimizer(config, total_steps, result)
    _packing(config, stage, result)
    _adapters(config, result)
    family = family_of(model)
    if family is not None:
        of_images, untold = arguments_of(config, section, family)
        result.arguments |= of_images
        result.untold += untold
    elif config.freeze:
        result.untold.append(f"freeze: {config.freeze}; it freezes parts of models that see")
    if isinstance(section, SFTConfig):
        result.arguments |= {"mask_history": section.train_on == "last", "train_on_prompt": section.train_on == "all"}
    if isinstance(section, DPOConfig):
        _preference(section, result)
    if config.eval_dataset is not None:
        rows = config.eval_config.eval_batch_size or config.batch_size
        every = config.eval_config.eval_batch_interval
        result.arguments |= {"eval_strategy": "steps", "eval_steps": every, "per_device_eval_batch_size": rows}
    changed = [name for name, value, default in leaves(config) if value != default and name not in TRANSLATED]
    result.untold += [name if dataclasses.is_dataclass(values[name]) else f"{name}: {values[name]}" for name in changed]
    return result


def _optimizer(config: TrainConfig, total_steps: int, result: Translation) -> None:
    """The optimizer and the schedule, by transformers' names (`transformers.optimization`)."""
    options = config.optim_config
    if options.optim_type == "muon":
        result.arguments["use_muon"] = True
    elif options.optim_type in OPTIMIZERS:
        result.arguments["optim"] = OPTIMIZERS[options.optim_type]
    else:
        result.arguments["optim"] = "adamw_torch"
        result.untold.append(f"optim_config.optim_type: {options.optim_type}; it trains with adamw instead")
    name: str = options.lr_scheduler
    shape: dict[str, Any] = {}
    if not options.enable_lr_scheduler:
        result.arguments |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
        return
    if name == "cosine" and options.min_lr:
        name, shape = "cosine_with_min_lr", {"min_lr": options.min_lr}
    elif name == "constant":
        name = "constant_with_warmup"
    elif name == "polynomial" or (name == "linear" and options.min_lr):
        power = options.polynomial_power if name == "polynomial" else 1.0
        name, shape = "polynomial", {"lr_end": options.min_lr, "power": power}
    elif name == "wsd":
        decay = max(1, round(options.wsd_decay_fraction * total_steps))
        stable = max(0, total_steps - options.warmup_iters - decay)
        shape = {"num_decay_steps": decay, "num_stable_steps": stable, "decay_type": "linear"}
        name, shape["min_lr_ratio"] = "warmup_stable_decay", options.min_lr / options.initial_lr
    elif name == "cosine_restarts":
        name = "cosine_with_restarts"
        result.untold.append("optim_config.lr_scheduler: restarts of a growing period, and min_lr; it has one period")
    elif name == "reduce_on_plateau":
        name, shape = "reduce_lr_on_plateau", {"factor": options.plateau_factor, "patience": options.plateau_patience}
    result.arguments |= {"lr_scheduler_type": name, "lr_scheduler_kwargs": shape or None}


def _packing(config: TrainConfig, stage: str, result: Translation) -> None:
    packing = config.data_loader_config.packing
    if packing == "auto":  # there too: wrapped in pretraining; rows laid flat are the gradient of padded ones
        packing = "wrapped" if stage == "pt" else "none"
    result.arguments["packing"] = packing == "wrapped"
    if packing in ("bfd", "bfd_split") and stage == "sft":
        result.arguments |= {"neat_packing": True, "cutoff_len": result.arguments["cutoff_len"] + 1}  # it takes one off
    elif packing in ("bfd", "bfd_split"):
        result.untold.append(f"data_loader_config.packing: {packing}; rows are padded instead")
    elif packing == "flat":
        result.untold.append("data_loader_config.packing: flat; rows are padded instead, which is the same gradient")


def _adapters(config: TrainConfig, result: Translation) -> None:
    """LoRA (`llamafactory/hparams/finetuning_args.py`), and of the learning rates what LoRA+ is.

    Raises:
        ConfigError: it has no such adapters.
    """
    adapters, multiples = config.adapter_config, config.optim_config.lr_multipliers
    if adapters is None:
        if multiples:
            result.untold.append(f"optim_config.lr_multipliers: {multiples}")
        return
    if adapters.kind != LORA:
        raise ConfigError(f"adapter_config.kind: got {adapters.kind}, and LLaMA-Factory has {LORA}")
    rank = adapters.rank or RANK
    result.arguments |= {
        "finetuning_type": "lora",
        "lora_rank": rank,
        "lora_alpha": adapters.alpha or 2 * rank,
        "lora_dropout": adapters.dropout,
        "lora_target": "all",
        "additional_target": ",".join(adapters.modules_to_save) or None,
        "use_rslora": adapters.rslora,
        "use_dora": adapters.dora,
        "pissa_init": adapters.init.startswith("pissa"),
        "adapter_name_or_path": adapters.path,
    }
    if adapters.init.startswith("pissa_niter_"):
        result.arguments["pissa_iter"] = int(adapters.init.removeprefix("pissa_niter_"))
    if list(multiples) == ["lora_B"]:
        result.arguments["loraplus_lr_ratio"] = multiples["lora_B"]
    elif multiples:
        result.untold.append(f"optim_config.lr_multipliers: {multiples}; it has one for lora_B alone")
    if adapters.path is None:
        result.untold.append("adapter_config: the first weights of the adapters, which it draws itself")
    if not isinstance(adapters.target, str):
        result.arguments["lora_target"] = ",".join(adapters.target)
    elif adapters.target != ALL_LINEAR:
        result.untold.append(f"adapter_config.target: {adapters.target}; it has no regular expressions, and takes all")
    for name in ("parts", "experts", "options"):
        value = getattr(adapters, name)
        if value != fields_of(AdapterConfig)[name].get_default(call_default_factory=True):
            result.untold.append(f"adapter_config.{name}: {value}")
    if adapters.init != "default" and not adapters.init.startswith("pissa"):
        result.untold.append(f"adapter_config.init: {adapters.init}")


def _preference(section: DPOConfig, result: Translation) -> None:
    name = "ipo" if section.loss_ipo else section.loss_type
    loss = PREFERENCE_LOSSES.get(name) if isinstance(name, str) else None
    if loss is None:
        raise ConfigError(f"dpo_config.loss_type: got {name!r}, and LLaMA-Factory has {', '.join(PREFERENCE_LOSSES)}")
    result.arguments |= {
        "pref_loss": loss,
        "pref_beta": section.loss_beta,
        "pref_ftx": section.nll_loss_coef or 0.0,
        "dpo_label_smoothing": section.loss_label_smoothing,
        "simpo_gamma": section.loss_simpo_gamma,
        "ref_model": section.ref_model_checkpoint,
    }


def add_data(config: TrainConfig, folder: Path, result: Translation, images: ImageFormat | None = None) -> None:
    """Name every data file in `datasets`; files that LLaMA-Factory cannot read are written anew into `folder`.

    Args:
        config: the whole run.
        folder: that LLaMA-Factory reads.
        result: that the names are added to.
        images: what an image is to the model; None: it reads text. Rows that show some are all written anew.
    """
    stage, _ = stage_of(config)
    wanted = get_kind({"pt": "text", "sft": "conversations", "dpo": "pairs"}[stage])
    options = DataOptions(**{name: getattr(config.data_loader_config, name) for name in fields_of(Reading)})
    names: dict[str, list[str]] = {"train": [], "eval": []}
    kinds: dict[str, str] = {}
    for use, given in (("train", config.file_dataset), ("eval", config.eval_dataset)):
        paths = [given[i] for i in range(len(given))] if given is not None else []
        for path in (file for one in paths for file in files_of(Path(one))):
            name = f"{use}_{len(names[use])}_{path.stem}".replace(",", "_")
            shows = None if images is None else images_beside(config, path, images)
            accepts = wanted.accepts if shows is None else (*wanted.accepts, "vision")
            schema = find_schema(path, wanted, options, accepts, takes_images=shows is not None)
            result.datasets[name] = _entry(schema, path, options, folder / f"{name}.jsonl", result, shows)
            names[use].append(name)
            kinds[path.name] = schema.kind
    result.arguments |= {"dataset": ",".join(names["train"]), "dataset_dir": str(folder)}
    if names["eval"]:
        result.arguments["eval_dataset"] = ",".join(names["eval"])
    if set(kinds.values()) == {"completion"}:
        result.arguments["template"] = "empty"  # prompt and completion are joined as they are
    else:
        plain = [name for name, kind in kinds.items() if kind == "completion"]
        result.untold += [f"{name}: plain strings get the chat template, as the other files do" for name in plain]


def ignore(error: DataError) -> None:
    """Pass over a row that cannot be read."""


def _entry(
    schema: Schema, path: Path, options: DataOptions, copy: Path, result: Translation, shows: RowImages | None
) -> dict[str, Any]:
    first = [row for _, row in head_of(path, options)]
    entry = None
    if path.suffix in READ_BY_THEM and schema.renaming is None and shows is None:
        entry = direct_entry(schema.name, first)
    if entry is not None:
        return {"file_name": str(path.resolve())} | entry
    why = "with the paths of its images"
    if shows is None:
        why = f"as it has no name for rows of schema {schema.name!r}"
    result.untold.append(f"{path.name}: written anew as {copy.name}, {why}")
    strict = options.bad_rows == "error"
    dropped = weighted = beside_calls = 0
    with copy.open("w", encoding="utf-8") as file:
        for location, row in read_rows(path, options.text_unit, on_error=None if strict else ignore):
            location = replace(location, takes_images=shows is not None)
            try:
                samples = schema.samples(row, location)
                if shows is not None:
                    samples = [shows.counted(sample, row, location) for sample in samples]
            except ImageError:
                if shows is None or shows.bad == "error":
                    raise
                samples, dropped = [], dropped + 1
            except DataError as error:
                if strict and not isinstance(error, DroppedRow):
                    raise
                samples, dropped = [], dropped + 1
            for sample in samples:
                turns = sample.get("messages", ())
                weighted += any("loss_weight" in turn for turn in turns)
                beside_calls += any(turn.get("tool_calls") and turn.get("content") for turn in turns)
                written = dict(_as_openai(schema.kind, sample))
                if shows is not None:
                    written["images"] = files_shown(sample, copy.parent)
                file.write(json.dumps(written, ensure_ascii=False) + "\n")
    losses = {
        "that teach nothing are left out": dropped,
        "have a loss_weight, which it ignores": weighted,
        "say something beside a tool call, which is left out": beside_calls,
    }
    for what, number in losses.items():
        if number:
            result.untold.append(f"{path.name}: {number} rows {what}")
    entry = _written(schema.kind)
    if shows is not None:
        entry = entry | {"columns": entry["columns"] | {"images": "images"}}
    return {"file_name": copy.name} | entry


def direct_entry(schema: str, rows: Iterable[Any]) -> dict[str, Any] | None:
    """The entry for a file that LLaMA-Factory reads as it is; None for any other. `rows` are its first ones."""
    keys = {key for row in rows if isinstance(row, Mapping) for key in row}
    if schema in COLUMNS:
        columns = dict(zip(("prompt", "query", "response"), COLUMNS[schema], strict=True))
        columns |= {"system": "system", "history": "history"}
        return {"formatting": "alpaca", "columns": {name: key for name, key in columns.items() if key in keys}}
    if schema not in ("messages", "sharegpt") or keys & {"tools", "images"}:
        return None
    role, column, known = ("role", "messages", {"system", "user", "assistant"})
    if schema == "sharegpt":
        role, column, known = "from", "conversations", SHAREGPT_ROLES
    turns = [turn for row in rows for turn in row[column]]
    if not all(isinstance(turn, Mapping) and turn.get(role) in known and len(turn) == 2 for turn in turns):
        return None  # other names of the roles, tools, reasoning, weights
    entry = SHAREGPT if schema == "sharegpt" else OPENAI
    return entry | ({"columns": {"messages": column, "system": "system"}} if "system" in keys else {})


def _written(kind: str) -> dict[str, Any]:
    """The entry of a file that `_as_openai` made."""
    if kind == "text":
        return {"formatting": "alpaca", "columns": {"prompt": "text"}}
    if kind == "completion":
        return {"formatting": "alpaca", "columns": {"prompt": "prompt", "response": "completion"}}
    if kind == "preference":
        columns = {"messages": "messages", "chosen": "chosen", "rejected": "rejected"}
        return OPENAI | {"columns": columns, "ranking": True}
    return OPENAI | {"columns": {"messages": "messages", "tools": "tools"}}


def _as_openai(kind: str, sample: Mapping[str, Any]) -> Mapping[str, Any]:
    """A canonical sample of ours as a row that `_written` describes."""
    if kind in ("text", "completion"):
        return sample
    if kind == "preference":
        pair = {side: _turns(sample[side])[-1] for side in ("chosen", "rejected")}
        return {"messages": _turns([*sample["prompt"], *sample["chosen"][:-1]]), **pair}
    tools = json.dumps(sample["tools"], ensure_ascii=False) if sample.get("tools") else ""
    return {"messages": _turns(sample["messages"]), "tools": tools}


def _turns(messages: Iterable[Message]) -> list[dict[str, str]]:
    """Turns of two strings each: reasoning inside the content as ChatML prints it, calls as JSON."""
    turns = []
    for message in messages:
        role, content = message["role"], message.get("content") or ""
        if thought := message.get("reasoning_content"):
            content = f"<think>\n{thought}\n</think>\n\n{content}"
        if calls := message.get("tool_calls"):
            role, content = "function_call", json.dumps([call["function"] for call in calls], ensure_ascii=False)
        turns.append({"role": role, "content": content})
    return turns
