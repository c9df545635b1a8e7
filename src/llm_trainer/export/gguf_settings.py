"""What a transformers configuration is in the words of GGUF, and which models llama.cpp would compute otherwise."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llm_trainer.export.gguf_tokenizer import GgufError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_INSTEAD = "use --to hf or --to merged, and the converter of llama.cpp on that folder"


@dataclass(frozen=True)
class Family:
    """What of a transformers family differs in GGUF."""

    architecture: str  # llama.cpp's name
    rotates_neighbours: bool = False  # positions rotate numbers 2i and 2i + 1 of a head, not i and i + D/2
    takes_biases: bool = False
    takes_frequencies: bool = False  # a table of its own for RoPE, as Llama 3.1 needs it


FAMILIES = {
    "llama": Family("llama", rotates_neighbours=True, takes_biases=True, takes_frequencies=True),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe"),
}


def family_of(config: "PretrainedConfig") -> Family:
    """
    Raises:
        GgufError: llama.cpp would compute something else than this model, or our writer does not know it.
    """
    c: Any = config
    family = FAMILIES.get(c.model_type)
    if family is None:
        raise refusal(f"model_type {c.model_type}", ", ".join(FAMILIES))
    if c.hidden_act != "silu":
        raise refusal(f"hidden_act {c.hidden_act}", "silu")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(c, name, False) and not family.takes_biases:
            raise refusal(f"{name} in a model of {c.model_type}", "no biases")
    if "sliding_attention" in (getattr(c, "layer_types", None) or []):
        raise refusal("layers that look at a sliding window", "full attention in every layer")
    if c.model_type == "qwen3_moe":
        _check_experts(c)
    return family


def _check_experts(c: Any) -> None:
    if not c.norm_topk_prob:
        raise refusal("norm_topk_prob false", "true: llama.cpp makes the weights of the chosen experts sum to 1")
    if c.decoder_sparse_step != 1 or c.mlp_only_layers:
        raise refusal("layers without experts among others", "experts in every layer")


def refusal(found: str, expected: str) -> GgufError:
    return GgufError(f"GGUF: the model has {found}; expected {expected}; {_INSTEAD}")


def settings_of(config: "PretrainedConfig") -> dict[str, int | float | str]:
    """What a file says of the model, by its keys without the architecture; floats are rounded to the file's 32 bits."""
    c: Any = config
    found: dict[str, int | float | str] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "vocab_size": c.vocab_size,
    }
    if c.model_type == "qwen3_moe":
        found["expert_count"] = c.num_experts
        found["expert_used_count"] = c.num_experts_per_tok
        found["expert_feed_forward_length"] = c.moe_intermediate_size
    found |= _rope_settings(c)
    return {key: _in_32_bits(value) for key, value in found.items()}


def _rope_settings(c: Any) -> dict[str, int | float | str]:
    """Rotary positions; the frequencies of Llama 3.1 are a tensor (`_frequencies`), not numbers."""
    rope = c.rope_parameters
    kind = rope["rope_type"]
    known = ["default", "linear", "yarn"]
    if FAMILIES[c.model_type].takes_frequencies:
        known.append("llama3")
    if kind not in known:
        raise refusal(f"rope_type {kind}", f"one of {', '.join(known)}")
    for name in ("partial_rotary_factor", "attention_factor", "mscale", "mscale_all_dim"):
        if rope.get(name) not in (None, 1.0):
            raise refusal(f"{name} {rope[name]} in rope_parameters", f"no {name}")
    found: dict[str, int | float | str] = {
        "rope.dimension_count": c.head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if kind in ("linear", "yarn"):
        found["rope.scaling.type"] = kind
        found["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32)
        found["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1)
    return found


def _in_32_bits(value: int | float | str) -> int | float | str:
    return torch.tensor(value).item() if isinstance(value, float) else value
