"""Parameter groups: what decays and what does not."""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]


def get_parameter_groups(
    model: nn.Module, weight_decay: float = 0.01, no_decay: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Two groups: what decays and what does not. Matrices decay; biases and norm weights (1-D) do not.

    Embeddings and the LM head are matrices and decay, as in transformers. Frozen parameters are left out, tied ones
    come once, and a group without parameters is left out.

    Args:
        model: the model whose trainable parameters are grouped.
        weight_decay: of the first group; the second has 0.
        no_decay: pieces of parameter names that must not decay either, such as `("embed",)`.
    """
    decaying: list[Tensor] = []
    plain: list[Tensor] = []
    for name, param in model.named_parameters():  # yields a tied parameter once
        if param.requires_grad:
            is_exempt = param.ndim < 2 or any(piece in name for piece in no_decay)
            (plain if is_exempt else decaying).append(param)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def as_groups(params: Params) -> list[dict[str, Any]]:
    """Parameters, or groups of them, as a list of groups whose `params` are lists."""
    entries = list(params)
    groups = [entry for entry in entries if isinstance(entry, dict)]
    if not groups:
        return [{"params": entries}]
    listed = []
    for group in groups:
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        listed.append({**group, "params": members})
    return listed
