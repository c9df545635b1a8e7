"""Attention of `models.attention` on a GPU, where the model makes no mask."""

from typing import Any

import torch
from torch import Tensor, nn

FLASH_ROWS = 128  # rows of queries per block of the flash kernel


def gpu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    position_ids: Tensor | None,
    bounds: Tensor | None,
    given: dict[str, Any],
) -> tuple[Tensor, None]:
    """Attention without a mask from the model, on a GPU: `query [B, H, T, D]`, `key`, `value [B, K, T, D]` -> `[B, T, H, D]`.

    Args:
        module: the attention layer.
        position_ids: `[B, T]` or `[1, T]`.
        bounds: as in `document_bounds`; None: the model was called by somebody who did not say, and positions tell.
        given: everything else that the layer was called with.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    is_flat = bounds is not None and query.shape[0] == 1
    if is_flat and _flash_takes(query):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return packed_flash(query, key, value, bounds, given["max_length_q"], scale), None
    # Rows that hold one document each need no mask: causal attention is all.
    mask = packed_mask(position_ids) if is_flat or bounds is None else None
    return sdpa_attention_forward(module, query, key, value, mask, 0.0, scaling)


def _flash_takes(query: Tensor) -> bool:
    """Whether the flash kernel of this GPU knows the dtype and the width of the heads."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return is_half and query.shape[-1] <= 256 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def packed_flash(query: Tensor, key: Tensor, value: Tensor, bounds: Any, longest: int, scale: float) -> Tensor:
    """Causal attention inside each document of one flat row, by the flash kernel for documents of several lengths.

    Args:
        query: `[1, H, N, D]`; `key` and `value` `[1, K, N, D]`, all in half precision.
        bounds: `[documents + 1]` int32, where documents begin and end.
        longest: no document is longer.
        scale: of the scores.

    Returns:
        `[1, N, H, D]`.
    """
    flat = [tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value)]  # [N, H, D]
    # Arguments by position: bounds and longest twice (queries, keys), dropout, causal, return debug mask.
    output, *_ = torch.ops.aten._flash_attention_forward(
        *flat, bounds, bounds, longest, longest, 0.0, True, False, scale=scale
    )
    return output[None]


def packed_mask(position_ids: Tensor | None) -> Tensor | None:
    """`position_ids [B, T]` -> True where a query sees a key, `[B, 1, T, T]`; None where plain causal attention is it."""
    if position_ids is None:
        return None
    restarts = position_ids.diff(dim=-1) != 1
    # While a model is traced there are no values to look at. Else the host waits for the device.
    if not torch.compiler.is_compiling() and not restarts.any():
        return None
    document = nn.functional.pad(restarts.cumsum(-1), (1, 0))  # [B, T]
    length = document.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=document.device).tril()
    return ((document[:, :, None] == document[:, None, :]) & causal)[:, None]
