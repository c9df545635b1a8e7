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
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from llm_trainer.kernels import Kernel
from llm_trainer.losses.chunked import add_product
from llm_trainer.models.gpu_attention import FLASH_ROWS, gpu_attention

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Plain causal attention with `position_ids` handed down to it; all others run on sdpa with the mask they ask for.
BLOCKED_ARCHITECTURES = frozenset({"llama", "mistral", "mixtral", "olmo2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe"})
BACKENDS = ("auto", "blocked", "sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3")
GPU = "cuda"
OUR_DEVICES = ("cpu", GPU)
# Rows of queries per block of the backward; the scores of one block stay in the cache. Measured: benchmarks/head.py.
BLOCK_ROWS = 128

# `(query, key, value, dropout, is_causal, *, scale) -> (output, log normaliser)`; takes fewer key than query heads.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# What `auto` is on each kind of device, and why; tests hold each to the plain one.
BEST = {
    "cpu": ("blocked", "no mask, each document by itself"),
    GPU: ("sdpa", "torch's own kernels; flash_attn is not installed"),
}
FLASH = ("flash_attention_2", "flash_attn is installed")
ANYWHERE = ("sdpa", "torch's own kernels")


def best_attention(device: str | torch.device) -> tuple[str, str]:
    """What `auto` means on a device, and why. `blocked` on CUDA has to be asked for until benchmarks/gpu.py has shown it."""
    kind = torch.device(device).type
    if kind == GPU and importlib.util.find_spec("flash_attn"):
        return FLASH
    return BEST.get(kind, ANYWHERE)


def describe_attention(config: "PretrainedConfig", device: str | torch.device) -> tuple[str, str]:
    """What a model that was built with `auto` runs on, and why."""
    found = config._attn_implementation
    if found == "blocked" and not _is_ours(config):
        return "sdpa", f"torch's own kernels and the masks that {config.model_type} makes"
    best, why = best_attention(device)
    if found != best:
        return str(found), f"{config.model_type} has no {best}"
    return best, why


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
        name, _ = best_attention(device)
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
    settings = config.to_dict()
    masked = settings.get("attention_dropout") or settings.get("sliding_window")
    return _is_ours(config) and not masked and device.type == "cpu"


def _is_ours(config: "PretrainedConfig") -> bool:
    """Whether the layers of a model of this configuration call `blocked_attention`."""
    return config._attn_implementation == "blocked" and config.model_type in BLOCKED_ARCHITECTURES


def blocked_mask(*, config: "PretrainedConfig", **asked: Any) -> Tensor | None:
    """The mask of a layer: None where `blocked_attention` needs none, else the dense mask of sdpa `[B, 1, q, kv]`.

    transformers asks with the lengths of queries and keys, the `attention_mask [B, T]` of padding, and whatever else the
    architecture wants: see `transformers.masking_utils.sdpa_mask`.
    """
    length, window = asked["q_length"], asked.get("local_size")
    is_plain = asked.get("attention_mask") is None and not asked.get("use_vmap")
    sees_all = window is None or window >= length
    without_cache = length == asked["kv_length"] and not asked.get("q_offset") and not asked.get("kv_offset")
    is_known = config.model_type in BLOCKED_ARCHITECTURES and not config.to_dict().get("attention_dropout")
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


@torch.library.custom_op("llm_trainer::document_attention", mutates_args=(), device_types="cpu")
def document_attention(
    query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal attention inside each document.

    Args:
        query: `[B, H, T, D]`.
        key: `[B, K, T, D]`; H is a multiple of K.
        value: `[B, K, T, D]`.
        position_ids: `[B, T]` or `[1, T]`; a document ends where they do not go up by one, and a branch begins where
            they then start above 0.
        scale: of the scores.

    Returns:
        Output `[B, H, T, D]` and the log normaliser of each row of scores `[B, H, T]`.
    """
    parts = _documents(position_ids, *query.shape[::2])
    if len(parts) == 1:
        output, log_normaliser = flash(query, key, value, 0.0, True, scale=scale)
        return _heads_inside(output), log_normaliser.contiguous()
    output, log_normaliser = _empty_outputs(query)
    for own, before in parts:
        found = flash(query[own], key[own], value[own], 0.0, True, scale=scale)
        if before is not None:
            found = _merged(found, flash(query[own], key[before], value[before], 0.0, False, scale=scale))
        output[own], log_normaliser[own] = found
    return output, log_normaliser


@document_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, position_ids: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_outputs(query)


def _empty_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised output `[B, H, T, D]` and log normaliser `[B, H, T]`."""
    precise = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _empty(query), query.new_empty(query.shape[:3], dtype=precise)


def _empty(like: Tensor) -> Tensor:
    """Uninitialised `[B, H, T, D]`, in memory `[B, T, H, D]` as the projections around attention have it."""
    rows, heads, length, width = like.shape
    return like.new_empty(rows, length, heads, width).transpose(1, 2)


def _heads_inside(tensor: Tensor) -> Tensor:
    """`[B, H, T, D]` in the memory order of `_empty`, which the compiler is promised; a copy only where it differs."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _merged(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys from that over each: outputs `[B, H, T, D]` and log normalisers `[B, H, T]`.

    The outputs are averaged by their sums of weights, as in FlashAttention (Dao et al. 2022, section 3.1).
    """
    total = torch.logaddexp(first[1], second[1])
    shares = [(part[1] - total).exp()[..., None] for part in (first, second)]
    return shares[0] * first[0] + shares[1] * second[0], total


Place = tuple[slice, slice, slice]  # an index of `[B, H, T, ...]`


class Part(NamedTuple):
    """Where a document lies, or a branch and the `prefix` of a document that it goes on from."""

    own: Place
    prefix: Place | None


def _documents(position_ids: Tensor, num_rows: int, length: int) -> list[Part]:
    """All documents and branches, in their order; one part for all rows when no row holds several."""
    every = slice(None)
    restarts = position_ids.diff(dim=-1) != 1  # (B or 1, T - 1)
    if not restarts.any():
        return [Part((every, every, every), None)]
    parts = []
    for row in range(num_rows):
        positions = position_ids[row % len(position_ids)]
        inner = restarts[row % len(restarts)].nonzero().flatten() + 1
        bounds = [0, *inner.tolist(), length]
        document = slice(0, 0)  # the last one that began at position 0
        one = slice(row, row + 1)
        for (a, b), first in zip(pairwise(bounds), positions[bounds[:-1]].tolist(), strict=True):
            prefix = None
            if first == 0:
                document = slice(a, b)
            elif 0 < first <= document.stop - document.start:
                prefix = (one, every, slice(document.start, document.start + first))
            parts.append(Part((one, every, slice(a, b)), prefix))
    return parts


def _probabilities(
    scores: Tensor, on_probs: Tensor, log_normaliser: Tensor, mean: Tensor, mask: Tensor, scale: float
) -> None:
    """Overwrites `scores` with the attention weights, `on_probs` (the gradient of the weights) with that of the scores.

    `[G, q, kv]` the two, `[G, q, 1]` log normaliser and mean of `on_probs` under the weights, `[q, kv]` the mask of 0
    and 1. d s = p * (d p - sum(p * d p)): the softmax of a row, as in FlashAttention (Dao et al. 2022, appendix B.2).
    """
    probs = (scores.float() * scale).sub_(log_normaliser).clamp_(max=0.0).exp_().mul_(mask)
    on_scores = (on_probs.float() - mean).mul_(probs).mul_(scale)
    scores.copy_(probs)
    on_probs.copy_(on_scores)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Scalar product of the last dimension in float32. `[..., D]` twice -> `[...]`."""
    return (left.float() * right.float()).sum(-1)


probabilities = Kernel(_probabilities, per_row=4)
row_products = Kernel(_row_products, per_row=2)


def _backward(ctx: Any, on_output: Tensor, on_log_normaliser: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value, document by document."""
    tensors = document_attention_backward(on_output, *ctx.saved_tensors, ctx.scale)
    return *tensors, None, None


@torch.library.custom_op("llm_trainer::document_attention_backward", mutates_args=(), device_types="cpu")
def document_attention_backward(
    on_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    output: Tensor,
    log_normaliser: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query `[B, H, T, D]`, key and value `[B, K, T, D]`; `on_output [B, H, T, D]`, the rest as above."""
    # Saved tensors still carry their graph, which the compiler of the kernels would ask about.
    on_output, query, key, value = on_output.detach(), query.detach(), key.detach(), value.detach()
    output, log_normaliser = output.detach(), log_normaliser.detach()

    def of_part(own: Place, keys: Tensor, values: Tensor) -> Gradients:
        inputs = (on_output[own], query[own], keys, values, output[own], log_normaliser[own])
        # The kernel of torch is good in float32 and on short rows; in bfloat16 products are several times faster.
        if query.dtype == torch.bfloat16 and inputs[0].shape[2] > BLOCK_ROWS:
            return _blocked_backward(*inputs, scale)
        return _flash_backward(*inputs, scale)

    parts = _documents(position_ids, *query.shape[::2])
    if len(parts) == 1:
        on_query, on_key, on_value = of_part(parts[0].own, key, value)
        return _heads_inside(on_query), _heads_inside(on_key), _heads_inside(on_value)
    on_query, on_key, on_value = _empty(query), _empty(key), _empty(value)
    for own, before in parts:
        if before is None:
            on_query[own], on_key[own], on_value[own] = of_part(own, key[own], value[own])
            continue
        keys, values = (torch.cat([x[before], x[own]], 2) for x in (key, value))
        on_query[own], *on_both = of_part(own, keys, values)
        for gradient, result in zip((on_key, on_value), on_both, strict=True):
            gradient[before] += result[:, :, : -query[own].shape[2]]  # a document's own comes before its branches'
            gradient[own] = result[:, :, -query[own].shape[2] :]
    return on_query, on_key, on_value


@document_attention_backward.register_fake
def _(on_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(query), _empty(key), _empty(value)


Gradients = tuple[Tensor, Tensor, Tensor]


def _flash_backward(
    on_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_normaliser: Tensor, scale: float
) -> Gradients:
    """The kernel of torch, which wants as many key heads as query heads.

    Shapes as in `document_attention`, except that key and value may have more rows than query: a prefix comes first.
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    prefix = key.shape[2] - query.shape[2]

    def of_piece(piece: slice, causal: bool) -> Gradients:
        # Output and log normaliser are those over all keys, so each piece gets its share of the weight.
        at = (slice(None), slice(None), piece)
        return flash_backward(on_output, query, keys[at], values[at], output, log_normaliser, 0.0, causal, scale=scale)

    on_query, on_key, on_value = of_piece(slice(prefix, None), causal=True)
    if prefix:
        before = of_piece(slice(prefix), causal=False)
        on_query = on_query + before[0]
        on_key = torch.cat([before[1], on_key], 2)
        on_value = torch.cat([before[2], on_value], 2)
    return on_query, on_key.unflatten(1, (-1, groups)).sum(2), on_value.unflatten(1, (-1, groups)).sum(2)


def _blocked_backward(
    on_output: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_normaliser: Tensor, scale: float
) -> Gradients:
    """Row blocks of queries against all keys before them; the query heads of a key head are further rows of the block.

    Shapes as in `_flash_backward`.
    """
    rows, heads, length, width = query.shape
    key_heads, key_length = key.shape[1:3]
    prefix = key_length - length
    mean = row_products(on_output, output)  # (B, H, T): sum of p * d p over the keys
    keys, values = key.reshape(-1, key_length, width), value.reshape(-1, key_length, width)  # (B * K, T, D)
    on_query = _empty(query)
    on_key, on_value = keys.new_zeros(keys.shape, dtype=torch.float32), keys.new_zeros(keys.shape, dtype=torch.float32)

    def folded(tensor: Tensor, rows_of: slice) -> Tensor:
        """`[B, H, T, ...]` -> `[B * K, H / K * rows, ...]`."""
        return tensor[:, :, rows_of].reshape(rows * key_heads, -1, *tensor.shape[3:])

    for start in range(0, length, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, length)
        seen = prefix + stop
        block = slice(start, stop)
        queries, on_outputs = folded(query, block), folded(on_output, block)
        scores = queries @ keys[:, :seen].transpose(1, 2)  # (B * K, H / K * rows, seen)
        on_probs = on_outputs @ values[:, :seen].transpose(1, 2)
        mask = torch.ones(stop - start, seen).tril(prefix + start).repeat(heads // key_heads, 1)
        statistics = folded(log_normaliser, block)[..., None], folded(mean, block)[..., None]
        probabilities(scores, on_probs, *statistics, mask, scale)
        on_query[:, :, block] = (on_probs @ keys[:, :seen]).view(rows, heads, -1, width)
        add_product(on_key[:, :seen], on_probs.transpose(1, 2) @ queries)
        add_product(on_value[:, :seen], scores.transpose(1, 2) @ on_outputs)
    return on_query, on_key.to(key.dtype).view(key.shape), on_value.to(value.dtype).view(value.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


document_attention.register_autograd(_backward, setup_context=_save_for_backward)
