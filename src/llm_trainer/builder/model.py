"""The model that a run begins with: its shape, its first weights, and what of it is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llm_trainer.checkpoint import load_weights
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import ModelConfig, VLMConfig
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.engine import dist
from llm_trainer.engine.device import DTYPES
from llm_trainer.models import float8, qat
from llm_trainer.models.adapter_folder import load_start
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.build import build_model, set_stops
from llm_trainer.models.freezing import freeze_parts, parts_to_freeze
from llm_trainer.models.inside import model_context, sees_images, transformers_model
from llm_trainer.models.pretrained import Kind as Found
from llm_trainer.models.pretrained import find_pretrained
from llm_trainer.models.quantized_loading import loading_options
from llm_trainer.models.vision import unreached_if_known
from llm_trainer.models.vocabulary import Pieces, check_rows, extend_rows, num_ids

TRIED = {"qat": ("torch", "fsdp", "deepspeed"), "float8": ("torch", "fsdp")}  # engines, by what is in few bits


def make_model(
    config: TrainConfig,
    tokenizer: Any,
    device: torch.device,
    empty: bool = False,
    pieces: Pieces | None = None,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """Build or load the model with the weights that the run starts from, the same on every rank; or `empty`, without any.

    Args:
        config: the whole run.
        tokenizer: of the run, with the tokens that were added.
        device: where it will train.
        empty: without weights, on the meta device.
        pieces: the ids of the tokens that were added, and what they were before; None: there are none.
        options: further keywords of `from_pretrained`.
    """
    # 1. the model as it was, with its first weights
    torch.manual_seed(config.run_config.seed)
    attention = resolve_attention(config.run_config.attention, device)
    wanted, pieces = config.model_config, pieces or {}
    has_its_own = isinstance(wanted, VLMConfig) and wanted.language_path is not None  # vocabulary
    if isinstance(wanted, ModelConfig) and wanted.vocab_size is None and not has_its_own:
        wanted = replace(wanted, vocab_size=min(pieces, default=len(tokenizer)))
    if isinstance(wanted, VLMConfig) and wanted.image_token_id is None:
        wanted = replace(wanted, image_token_id=tokenizer.convert_tokens_to_ids(wanted.image_token))
    how: dict[str, Any] = {"attention": attention, "experts": config.run_config.experts, "options": options}
    model = build_model(wanted, empty=empty, overrides=config.model_overrides, **how)
    if config.init_state_dict is not None and not empty:
        load_weights(model, config.init_state_dict, "init_state_dict")
    if config.init_weights_path is not None and not empty:
        load_start(model, config.init_weights_path)

    # 2. what the run gives it
    multiple = config.vocabulary_config.pad_to_multiple_of
    if pieces or multiple is not None:
        check_rows(model, tokenizer, pieces)
        extend_rows(model, pieces, num_ids(tokenizer), multiple)
    context = model_context(model)
    if (
        config.model_overrides and context is not None
    ):  # whoever opens the folder is else warned of rows that can be read
        tokenizer.model_max_length = max(tokenizer.model_max_length, context)
    set_stops(model, ChatFormat(tokenizer).stop_token_ids(), tokenizer.pad_token_id)
    return model


def refuse_changes(config: TrainConfig) -> None:
    """
    Raises:
        ValueError: the configuration changes a model that is not made from it.
    """
    vocabulary = config.vocabulary_config
    for name, instead, is_changed in (
        ("model_overrides", "build_model(..., overrides=...)", bool(config.model_overrides)),
        ("adapter_config", "llm_trainer.adapt(model, AdapterConfig(...))", config.adapter_config is not None),
        ("freeze", "models.freezing.freeze_parts(model, ...)", bool(config.freeze)),
        (
            "quantization_config",
            "from_pretrained(..., quantization_config=BitsAndBytesConfig(...)), models.qat.prepare or models.float8.prepare",
            config.quantization_config is not None,
        ),
        (
            "vocabulary_config",
            "models.vocabulary.extend_vocabulary(model, tokenizer, ...)",
            bool(vocabulary.add_tokens or vocabulary.add_special_tokens or vocabulary.pad_to_multiple_of),
        ),
    ):
        if is_changed:
            raise ValueError(
                f"{name}: the model is given as an object, which is taken as it is; expected it from {instead}"
            )


def bits_to_read(config: TrainConfig, engine: str, device: torch.device, precision: str) -> dict[str, Any]:
    """How the weights of the model to train are read, beside plainly: keywords of `from_pretrained`.

    Raises:
        ValueError: the engine cannot shard such weights, or they are those of adapters.
    """
    wanted, source = config.quantization_config, config.model_config
    if wanted is None or wanted.of_whole_weights or not isinstance(source, str):
        return {}
    if wanted.bits == 8 and engine == "fsdp":
        raise ValueError(
            "quantization_config.bits: got 8, and FSDP shards numbers that are floats; expected bits: 4, or ZeRO (engine: "
            "deepspeed)"
        )
    found = find_pretrained(source, (Found.LANGUAGE_MODEL,), key="model_config")
    if found.base is not None:
        raise ConfigError(
            f"model_config: {source} holds adapters on {found.base}, which cannot be merged into weights in few bits "
            f"(quantization_config); expected a model: that one, with adapter_config.path: {source} to go on from them, or "
            f"what `llm-trainer export {source} --to merged` writes"
        )
    return loading_options(wanted, found.source, device, DTYPES[precision])


def prepare_bits(model: Any, config: TrainConfig, engine: str) -> None:
    """Have a model whose whole weights are trained compute in few bits, if the configuration wants to.

    Raises:
        ConfigError: this was not tried out with the engine, or there is no such hardware.
    """
    wanted = config.quantization_config
    name = "" if wanted is None else wanted.of_whole_weights
    if wanted is None or wanted.qat is None:
        qat.forget(model)
    if wanted is None or not name:
        return
    if engine not in TRIED[name]:
        raise ConfigError(
            f"quantization_config.{name}: got engine {engine}, and it was tried out with {', '.join(TRIED[name])} (torch: one "
            f"process and DDP); expected one of them"
        )
    if engine == "fsdp" and config.fsdp_config is not None and config.fsdp_config.tensor_parallel_size > 1:
        raise ConfigError(
            f"fsdp_config.tensor_parallel_size: got {config.fsdp_config.tensor_parallel_size}, which splits layers, beside "
            f"quantization_config.{name}, which was tried out on whole ones; expected 1"
        )
    if wanted.qat is not None:
        qat.prepare(model, wanted.qat)
    if wanted.float8 is not None:
        float8.prepare(model, wanted.float8)


def leave_out(model: nn.Module, frozen: Sequence[str], section: Any) -> None:
    """Freeze what the configuration says, and what no loss reaches of a tower.

    Args:
        model: that is trained.
        frozen: names of parts, or patterns of parameters.
        section: the options of the algorithm, which may train the projector alone.
    """
    wanted = parts_to_freeze(frozen, section)
    if wanted:
        freeze_parts(model, wanted)
    inner = transformers_model(model)
    if inner is None or not sees_images(inner.config):
        return
    lost = list[str]()
    if dist.is_main():  # other processes may have no weights to try it out on
        lost = unreached_if_known(model)
    for name in dist.broadcast_object(lost):
        model.get_parameter(name).requires_grad_(False)
