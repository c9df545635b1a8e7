"""Causal attention inside each document of a batch, on the CPU: one operator to `torch.compile`, forward and backward.

Documents are found by their positions. `models.attention` says when it is used, and what branches are.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llm_trainer.kernels import Kernel
from llm_trainer.losses.chunked import add_product

# Rows of queries per block of the backward; the scores of one block stay in the cache. Measured: benchmarks/head.py.
BLOCK_ROWS = 128
# In bfloat16 documents are padded to a multiple of this and computed together up to so many tokens: oneDNN makes a kernel
# for every shape of a product, in a millisecond and half a megabyte that it keeps, and short products are mostly overhead.
LENGTH_STEP, GROUP_TOKENS = 32, 512

# `(query, key, value, dropout, is_causal, *, scale) -> (output, log normaliser)`; takes fewer key than query heads.
flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    output, log_normaliser = outputs = _empty_outputs(query)
    for group in _groups(parts, query.dtype):
        queries, keys, values = (group.stack(tensor) for tensor in (query, key, value))
        group.unstack(flash(queries, keys, values, 0.0, True, scale=scale), outputs)
    for own, before in _branches(parts):
        found = flash(query[own], key[own], value[own], 0.0, True, scale=scale)
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


class Group(NamedTuple):
    """Documents that are computed together, as rows of a batch.

    Attributes:
        places: of each.
        length: that they are padded to, on the right, where no real token looks.
    """

    places: list[Place]
    length: int

    def stack(self, tensor: Tensor) -> Tensor:
        """`[B, H, T, ...]` -> `[G, H, length, ...]`, 0 on padding; no copy of one document without padding."""
        first = tensor[self.places[0]]
        if len(self.places) == 1 and first.shape[2] == self.length:
            return first
        # In the memory order of `_empty`.
        stacked = tensor.new_zeros(len(self.places), self.length, first.shape[1], *first.shape[3:]).transpose(1, 2)
        for row, place in zip(stacked, self.places, strict=True):
            document = tensor[place][0]
            row[:, : document.shape[1]] = document
        return stacked

    def unstack(self, stacked: tuple[Tensor, ...], into: tuple[Tensor, ...]) -> None:
        """Write `[G, H, length, ...]` to the places of the documents in `[B, H, T, ...]`, of each pair of tensors."""
        for source, target in zip(stacked, into, strict=True):
            for row, place in zip(source, self.places, strict=True):
                document = target[place][0]
                document.copy_(row[:, : document.shape[1]])


def _groups(parts: list[Part], dtype: torch.dtype) -> list[Group]:
    """All documents, without branches: in bfloat16 short ones of similar length together, else each by itself."""
    together = dtype == torch.bfloat16
    step = LENGTH_STEP if together else 1
    groups: list[Group] = []
    growing: dict[int, Group] = {}  # by length
    for own, prefix in parts:
        if prefix is not None:
            continue
        length = -(-(own[2].stop - own[2].start) // step) * step
        group = growing.get(length)
        if group is None or not together or (len(group.places) + 1) * length > GROUP_TOKENS:
            group = growing[length] = Group([], length)
            groups.append(group)
        group.places.append(own)
    return groups


def _branches(parts: list[Part]) -> Iterator[tuple[Place, Place]]:
    """Of each branch its place and that of what it goes on from."""
    for own, prefix in parts:
        if prefix is not None:
            yield own, prefix


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

    # The kernel of torch is good in float32; in bfloat16 products are several times faster.
    backward: Callable[..., Gradients] = _blocked_backward if query.dtype == torch.bfloat16 else _flash_backward
    parts = _documents(position_ids, *query.shape[::2])
    if len(parts) == 1:
        on_query, on_key, on_value = backward(on_output, query, key, value, output, log_normaliser, scale)
        return _heads_inside(on_query), _heads_inside(on_key), _heads_inside(on_value)
    on_query, on_key, on_value = gradients = _empty(query), _empty(key), _empty(value)
    for group in _groups(parts, query.dtype):
        inputs = [group.stack(x) for x in (on_output, query, key, value, output, log_normaliser)]
        group.unstack(backward(*inputs, scale), gradients)
    for own, before in _branches(parts):
        keys, values = (torch.cat([x[before], x[own]], 2) for x in (key, value))
        result = backward(on_output[own], query[own], keys, values, output[own], log_normaliser[own], scale)
        on_query[own] = result[0]
        for gradient, on_both in zip((on_key, on_value), result[1:], strict=True):
            gradient[before] += on_both[:, :, : -query[own].shape[2]]  # what the document itself gave is there already
            gradient[own] = on_both[:, :, -query[own].shape[2] :]
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
