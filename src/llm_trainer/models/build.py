"""A description or a folder becomes a transformers model; a model becomes a Hugging Face folder."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llm_trainer.config.model import VLMConfig
from llm_trainer.models.adapter_folder import load_pretrained
from llm_trainer.models.attention import KNOWN, Chosen, resolve_attention
from llm_trainer.models.experts import expert_shape, fused_experts, set_experts
from llm_trainer.models.inside import auto_class, beside_language, language_config, sees_images
from llm_trainer.models.overrides import check_rope, overridden, with_rope_type
from llm_trainer.models.pretrained import Kind, find_pretrained
from llm_trainer.models.quantize import num_values, stored_numbers
from llm_trainer.models.vision_build import language_part, put_parts, vision_language_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from llm_trainer.config.model import ModelConfig, MoeConfig

ARCHITECTURES = {  # name -> transformers configuration class
    "qwen3": "Qwen3Config",
    "llama": "LlamaConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "glm4_moe": "Glm4MoeConfig",
}


def build_config(model_config: "ModelConfig") -> "PretrainedConfig":
    """The transformers configuration that `model_config` describes."""
    if isinstance(model_config, VLMConfig):
        from_folder = model_config.language_path is not None
        text = language_part(model_config) if from_folder else _text_config(model_config)
        return vision_language_config(model_config, text)
    return _text_config(model_config)


def _text_config(c: "ModelConfig") -> "PretrainedConfig":
    import transformers

    rope = {"rope_type": "default", "rope_theta": c.rope_theta, **with_rope_type(c.rope_scaling or {})}
    check_rope(rope, "model_config.rope_scaling")
    values: dict[str, Any] = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rope_parameters": rope,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_word_embeddings,
        "attention_dropout": c.attention_dropout,
        "initializer_range": c.initializer_range,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if c.moe is not None:
        values |= _values_of_experts(c.moe, c.architecture)
    return getattr(transformers, ARCHITECTURES[c.architecture])(**values)


def _values_of_experts(moe: "MoeConfig", architecture: str) -> dict[str, Any]:
    """What `moe` is in the configuration of a family of transformers."""
    values: dict[str, Any] = {
        "num_experts_per_tok": moe.num_experts_per_tok,
        "moe_intermediate_size": moe.moe_intermediate_size,
        "norm_topk_prob": moe.norm_topk_prob,
    }
    if architecture == "qwen3_moe":
        dense = list(range(moe.num_dense_layers))
        return values | {"num_experts": moe.num_experts, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    return values | {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts or 1,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "first_k_dense_replace": moe.num_dense_layers,
        "use_qk_norm": True,  # as in its larger models
        "num_mtp_layers": 0,  # no layer that predicts further tokens
    }


def build_model(
    source: "ModelConfig | str | Path",
    attention: str = "auto",
    dtype: torch.dtype | str = torch.float32,
    empty: bool = False,
    key: str = "model_config",
    overrides: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    experts: str = "auto",
) -> "PreTrainedModel":
    """A model with random weights from a `ModelConfig`, or the language model that `find_pretrained` finds.

    Args:
        source: what to build or load; nothing is downloaded for a `ModelConfig`.
        attention: attention implementation (see `models.attention`); `auto` is the CPU's, as models are built there.
        dtype: of the parameters.
        empty: build it on the meta device, without weights: an engine that shards takes them from another process.
        key: what the configuration calls `source`, for messages.
        overrides: what is changed in the configuration of a model that is loaded (`models.overrides`).
        options: further keywords of `from_pretrained`, for a model that is loaded.
        experts: how those of a mixture are computed (`models.experts.set_experts`).

    Raises:
        ValueError: there is no language model at `source`, its weights are not finite, or an override cannot be meant.
    """
    attention = resolve_attention(attention)
    if isinstance(source, str | Path):
        model = _load_model(source, attention, dtype, empty, key, overrides or {}, options or {})
        set_experts(model, experts)
        return model
    refuse_overrides(overrides or {})
    model = model_of_config(build_config(source), attention, dtype, empty)
    if isinstance(source, VLMConfig) and not empty:
        put_parts(model, source)
    set_experts(model, experts)
    return model


def refuse_overrides(overrides: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: there are overrides of a model that is not loaded.
    """
    if overrides:
        raise ValueError(
            f"model_overrides: got {', '.join(overrides)}, which are for a model that is loaded, and model_config is a shape; "
            f"expected them there: rope_scaling, max_position_embeddings, attention_dropout"
        )


def model_of_config(
    config: "PretrainedConfig",
    attention: str = Chosen("sdpa"),
    dtype: torch.dtype | str = torch.float32,
    empty: bool = False,
) -> "PreTrainedModel":
    """A language model with random weights, or `empty` ones on the meta device; arguments of `build_model`."""
    attends = attention_of(attention, config)
    with torch.device("meta") if empty else nullcontext():
        return auto_class(config).from_config(config, attn_implementation=attends, dtype=dtype)


def attention_of(attention: str, config: "PretrainedConfig") -> str | dict[str, str] | None:
    """`attention`, as `resolve_attention` gives it; of models that have not got it None, which is transformers' choice.

    That is sdpa, or eager where a model has no other (Gemma 2), as for towers of images.
    """
    if attention != "blocked":
        return None if isinstance(attention, Chosen) and not _offers(config, attention) else attention
    if language_config(config).model_type not in KNOWN:
        return None
    if sees_images(config):
        return {"": "sdpa", "text_config": attention, "vision_config": "sdpa"}
    return attention


def _offers(config: "PretrainedConfig", attention: str) -> bool:
    """Whether the class that a configuration names, or that is made of it, says that it has an attention."""
    import transformers

    (name, *_) = config.architectures or [""]
    models = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if sees_images(config):
        models = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    made = getattr(transformers, name, None) or models.get(type(config), None)
    says = "_supports_flash_attn" if "flash" in attention else "_supports_sdpa"
    return getattr(made, says, False)


def _load_model(
    source: str | Path,
    attention: str,
    dtype: torch.dtype | str,
    empty: bool,
    key: str,
    overrides: Mapping[str, Any],
    options: Mapping[str, Any],
) -> "PreTrainedModel":
    from transformers import AutoConfig

    found = find_pretrained(source, (Kind.LANGUAGE_MODEL,), key)
    config = AutoConfig.from_pretrained(found.model_source)
    if overrides:
        config = overridden(config, overrides)
    if empty:
        return model_of_config(config, attention, dtype, empty)
    attends = attention_of(attention, config)
    model = load_pretrained(auto_class(config), found, attends, dtype, config=config, **options)
    check_finite(model, str(source))
    return model


def check_finite(model: nn.Module, source: str) -> None:
    """Raise ValueError naming the tensors of `model` that hold NaN or infinity."""
    broken = [name for name, tensor in model.named_parameters() if not torch.isfinite(stored_numbers(tensor)).all()]
    if broken:
        names = ", ".join(broken[:3])
        if len(broken) > 3:
            names += f" and {len(broken) - 3} more"
        raise ValueError(
            f"{source}: weights that are not finite (NaN or infinity) in {names}; expected finite numbers. Load an "
            f"earlier checkpoint: training cannot repair these"
        )


def set_stops(model: "PreTrainedModel", stop_token_ids: Sequence[int], pad_token_id: int | None) -> None:
    """Let the model's generation config say where an answer ends: every tool that opens its folder then stops there."""
    model.generation_config.eos_token_id = list(stop_token_ids)
    model.generation_config.pad_token_id = pad_token_id


def num_parameters(model: nn.Module) -> int:
    """Parameters of `model`, tied ones once."""
    return sum(num_values(parameter) for parameter in model.parameters())


def flops_per_token(model: "PreTrainedModel", seq_len: int) -> float:
    """Training FLOPs of one token: 6 N + 12 L H Q T (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, appendix B).

    N counts the parameters that take part in matrix products for a token: the input embedding is left out (it is
    counted as the head where the two are tied), and of a mixture of experts only the chosen ones count. Of parameters that
    are frozen, as beside adapters, 4 N: their gradients, one product of three, are not computed. A tower, which reads images
    and no tokens, is left out (`vision.flops_per_image`).
    """
    c = language_config(model.config)
    # 1. the parameters of matrix products
    of_images = set(map(id, beside_language(model)))
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in of_images]
    count = _in_products(model, sum(map(num_values, parameters)), is_frozen=False)
    frozen = sum(num_values(parameter) for parameter in parameters if not parameter.requires_grad)
    if frozen:
        frozen = _in_products(model, frozen, is_frozen=True)

    # 2. attention, where there is any: every token with every other one, as the paper counts it
    heads, width = getattr(c, "num_attention_heads", None), 0
    if heads:
        width = heads * (getattr(c, "head_dim", None) or c.hidden_size // heads)
    return 6.0 * count - 2.0 * frozen + 12.0 * c.num_hidden_layers * width * seq_len


def _in_products(model: "PreTrainedModel", count: int, is_frozen: bool) -> int:
    """Of `count` parameters, all or the frozen ones, those that a token is multiplied by."""
    c, table = language_config(model.config), cast(Tensor, model.get_input_embeddings().weight)
    if not c.tie_word_embeddings and not (is_frozen and table.requires_grad):
        count -= num_values(table)
    shape = expert_shape(model)
    if shape is not None:
        experts = [model.get_parameter(name) for name in fused_experts(model)]
        held = sum(num_values(parameter) for parameter in experts if not (is_frozen and parameter.requires_grad))
        count -= held * (shape.number - shape.per_token) // shape.number
    return count
