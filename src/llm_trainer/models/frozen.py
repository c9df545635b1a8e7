"""The model that a policy is compared with: a frozen copy, or its log-probabilities computed once and kept on disk."""

import hashlib
from copy import deepcopy

import torch
from torch import Tensor, nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` as it is now, without gradients and in evaluation mode."""
    return freeze(deepcopy(model))


def freeze(model: nn.Module) -> nn.Module:
    """`model` itself, without gradients and in evaluation mode."""
    return model.requires_grad_(False).eval()


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models have parameters of the same names and values."""
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    return ours.keys() == theirs.keys() and all(_equal(ours[name], theirs[name]) for name in ours)


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
