"""Causal attention in which documents of a packed batch never see each other, on every backend.

A flat batch `[1, N]` of several documents carries `position_ids` that restart at 0 in each. Every backend of
transformers recognises that (when it gets no attention mask); sdpa and eager then build a dense `[N, N]` mask, and
under `torch.compile` they build it for every batch, because positions are not known while a model is traced.
`"blocked"`, ours, makes no mask. On the CPU it runs the flash kernel on one document after the other, and a backward
of our own, in row blocks of matrix products. It is one operator to `torch.compile`, so lengths never recompile a model.
On a GPU it runs the flash kernel for documents of several lengths, which it is given (`document_bounds`).

On the CPU it also knows branches, for which others would need a mask: positions that restart at s > 0 go on from the first s
tokens of the document before them, so 0 1 2 3 4 | 2 3 4 5 are two answers behind one prompt of two tokens.

Padding on the right needs no mask under causal attention: no real token looks at what comes after it.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trainer.models.document_attention import document_attention
from llm_trainer.models.gpu_attention import FLASH_ROWS, gpu_attention
from llm_trainer.models.inside import language_config, transformers_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Plain causal attention with `position_ids` handed down to it; all others run on sdpa with the mask they ask for.
BLOCKED_ARCHITECTURES = frozenset(
    {"glm4_moe", "llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"}
)
# The same, with three positions of a token, inside of models that see images. Samplers read those through a cache.
KNOWN = BLOCKED_ARCHITECTURES | {"qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text"}
BACKENDS = ("auto", "blocked", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
GPU = "cuda"
OUR_DEVICES = ("cpu", GPU)

# What `auto` is on each kind of device, and why; tests hold each to the plain one.
BEST = {
    "cpu": ("blocked", "no mask, each document by itself"),
    GPU: ("sdpa", "torch's own kernels; flash_attn is not installed"),
}
FLASH = ("flash_attention_2", "flash_attn is installed")
ANYWHERE = ("sdpa", "torch's own kernels")


class Chosen(str):
    """An attention that nobody asked for by name: a model that has not got it gets what transformers would choose."""


def best_attention(device: str | torch.device) -> tuple[str, str]:
    """What `auto` means on a device, and why. `blocked` on CUDA has to be asked for until benchmarks/gpu.py has shown it."""
    kind = torch.device(device).type
    if kind == GPU and importlib.util.find_spec("flash_attn"):
        return FLASH
    return BEST.get(kind, ANYWHERE)


def attends(config: "PretrainedConfig") -> bool:
    """Whether a model of this configuration has attention: those of states alone, such as Mamba, have no heads."""
    return bool(getattr(language_config(config), "num_attention_heads", None))


def describe_attention(config: "PretrainedConfig", device: str | torch.device) -> tuple[str, str]:
    """What a model that was built with `auto` runs on, and why."""
    config = language_config(config)
    found = config._attn_implementation
    if found == "eager":
        return "eager", f"transformers has no other for {config.model_type}"
    if found == "blocked" and not _is_ours(config):
        return "sdpa", f"torch's own kernels and the masks that {config.model_type} makes"
    best, why = best_attention(device)
    if found != best:
        return str(found), f"{config.model_type} has no {best}"
    return best, why


def slow_attention(model: nn.Module, device: torch.device) -> str:
    """What is slow about the attention of a model that the user has made; empty: nothing.

    It stays as it is. transformers gives a model `sdpa` unless it is told otherwise.
    """
    inner = transformers_model(model)
    best, why = best_attention(device)
    if inner is None or best != "blocked":
        return ""
    config = language_config(inner.config)
    if config._attn_implementation != "sdpa" or config.model_type not in KNOWN:
        return ""
    faster = "model.set_attn_implementation(llm_trainer.models.attention.resolve_attention())"
    return f"sdpa, as the model came; {best} is faster here ({why}): {faster}"


def resolve_attention(name: str = "auto", device: str | torch.device = "cpu") -> str:
    """The attention implementation to give to transformers.

    Args:
        name: one of `BACKENDS`; `auto` is what `best_attention` says.
        device: where the model will train.

    Raises:
        ValueError: the name is not known.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention is {name!r}; expected one of {', '.join(BACKENDS)}")
    if name == "auto":
        name = Chosen(best_attention(device)[0])
    if name == "blocked":
        register()
    return name


def register() -> None:
    """Make `attn_implementation="blocked"` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register("blocked", blocked_attention)
    AttentionMaskInterface.register("blocked", blocked_mask)


def knows_branches(config: "PretrainedConfig", device: torch.device) -> bool:
    """Whether a model of this configuration reads branches on `device`: only `"blocked"` does, and never with a mask."""
    config = language_config(config)
    settings = config.to_dict()
    masked = settings.get("attention_dropout") or settings.get("sliding_window")
    return _is_ours(config) and not masked and device.type == "cpu"


def _is_ours(config: "PretrainedConfig") -> bool:
    """Whether the layers of a model of this configuration call `blocked_attention`."""
    config = language_config(config)
    return config._attn_implementation == "blocked" and config.model_type in KNOWN


def blocked_mask(*, config: "PretrainedConfig", **asked: Any) -> Tensor | None:
    """The mask of a layer: None where `blocked_attention` needs none, else the dense mask of sdpa `[B, 1, q, kv]`.

    transformers asks with the lengths of queries and keys, the `attention_mask [B, T]` of padding, and whatever else the
    architecture wants: see `transformers.masking_utils.sdpa_mask`.
    """
    length, window = asked["q_length"], asked.get("local_size")
    is_plain = asked.get("attention_mask") is None and not asked.get("use_vmap")
    sees_all = window is None or window >= length
    without_cache = length == asked["kv_length"] and not asked.get("q_offset") and not asked.get("kv_offset")
    is_known = config.model_type in KNOWN and not config.to_dict().get("attention_dropout")
    runs_here = torch.device(asked.get("device", "cpu")).type in OUR_DEVICES
    if is_plain and sees_all and without_cache and is_known and runs_here:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(**asked)


def blocked_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: `query [B, H, T, D]`, `key` and `value [B, K, T, D]` -> `[B, T, H, D]`."""
    without_cache = query.shape[2] == key.shape[2]
    is_ours = attention_mask is None and without_cache and dropout == 0.0
    if is_ours and query.device.type == GPU:
        return gpu_attention(module, query, key, value, scaling, position_ids, kwargs.get("cu_seq_lens_q"), kwargs)
    if not is_ours or query.device.type != "cpu":
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, position_ids=position_ids, **kwargs
        )
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if position_ids is None:
        position_ids = torch.arange(query.shape[2])[None]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output, _ = document_attention(query, key, value, position_ids, scale)
    return output.transpose(1, 2), None


def document_bounds(
    config: "PretrainedConfig", input_ids: Tensor, position_ids: Tensor | None, document_lengths: Tensor | None
) -> dict[str, Any]:
    """What ours needs to know of a batch on a GPU, under the names that transformers hands down to attention.

    Args:
        config: of the model.
        input_ids: `[B, T]`, or `[1, N]` of documents laid flat.
        position_ids: like `input_ids`, or None.
        document_lengths: `[K]` of a flat batch; None: every row is one document.

    Returns:
        Where documents begin and end, `[K + 1]`, and a length that none exceeds; nothing for other models, and nothing
        where only the positions tell documents apart.
    """
    only_positions_tell = document_lengths is None and position_ids is not None
    if not _is_ours(config) or input_ids.device.type != GPU or only_positions_tell:
        return {}
    rows, length = input_ids.shape
    lengths = torch.full((rows,), length) if document_lengths is None else document_lengths
    # The host waits for the device where the lengths are there. Rounded up, so that few values meet the compiler.
    longest = -(-int(lengths.max()) // FLASH_ROWS) * FLASH_ROWS
    bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(input_ids.device, torch.int32)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
