"""A placed model whose weights move towards those of the run's model, such as a reference that follows its policy."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llm_trainer.checkpoint.weights import tensors_by_name


def follow(module: nn.Module, model: nn.Module, move: Callable[[Tensor, Tensor], None]) -> None:
    """Call `move` with each tensor of `module` and that of `model` of its name, which has the same shape; tied ones once."""
    targets, moved = tensors_by_name(module), set[int]()
    with torch.no_grad():
        for name, source in tensors_by_name(model).items():
            target = targets[name]
            if id(target) not in moved:
                moved.add(id(target))
                move(target, source)


def mix(target: Tensor, source: Tensor, weight: float) -> None:
    """target <- weight * source + (1 - weight) * target; what is no floating-point number becomes the source's.

    At a weight of 1 these are the source's own numbers.
    """
    source = source.to(target.device, target.dtype)
    if target.is_floating_point():
        target.lerp_(source, weight)
    else:
        target.copy_(source)
