"""Which attention a model runs with."""

import torch


def resolve_attention(name: str, device: torch.device) -> str:
    """The transformers name of the attention called `name`; 'auto' is sdpa."""
    return "sdpa" if name == "auto" else name
