"""The model that a policy is compared with: a frozen copy, or the policy itself with its adapters off."""

import hashlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` as it is now, without gradients and in evaluation mode."""
    return freeze(deepcopy(model))


def freeze(model: nn.Module) -> nn.Module:
    """`model` itself, without gradients and in evaluation mode."""
    return model.requires_grad_(False).eval()


class AdaptersOff:
    """The policy as it was before its adapters learned anything, called like a reference model; it takes no memory.

    Args:
        model: the `PeftModel`.
        policy: the module around it that is called, as the engine has wrapped it.
        knows_branches: that of the policy's `ScoredModel`.
    """

    def __init__(self, model: nn.Module, policy: nn.Module, knows_branches: Callable[[torch.device], bool]) -> None:
        self.model = model
        self.policy = policy
        self.knows_branches = knows_branches

    def __call__(self, **inputs: Any) -> Any:
        """What the policy returns without its adapters and without dropout."""
        was_training = self.policy.training
        self.policy.eval()
        try:
            with self.model.disable_adapter():  # type: ignore[operator]
                return self.policy(**inputs)
        finally:
            self.policy.train(was_training)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have parameters of the same names and values."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    if ours.keys() != theirs.keys():
        return False
    return all(_equal(ours[name], theirs[name]) for name in ours)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.device), b)


def fingerprint(model: nn.Module) -> str:
    """A short key of a model's weights: of names, shapes, sums and sums of squares of its parameters."""
    key = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().float()
        sums = torch.stack([values.sum(), values.square().sum()]).tolist()
        key.update(f"{name} {tuple(parameter.shape)} {sums}\n".encode())
    return key.hexdigest()[:16]
