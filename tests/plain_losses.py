"""Language-modelling losses over whole logits, as a plain loop computes them, from the terms of `losses.language`."""

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_trainer.losses.language import IGNORE, LanguageLoss, flat_losses, mean_over, num_supervised


def token_losses(logits: Tensor, labels: Tensor, loss: LanguageLoss | None = None) -> Tensor:
    """The loss of every token, 0 where there is none: `logits [B, T, V]`, un-shifted `labels [B, T]` -> `[B, T]`."""
    labels = labels[:, 1:]
    supervised = labels != IGNORE
    values, _ = flat_losses(logits[:, :-1][supervised], labels[supervised], loss or LanguageLoss())
    return F.pad(values.new_zeros(labels.shape).masked_scatter(supervised, values), (1, 0))


def cross_entropy(
    logits: Tensor, labels: Tensor, loss: LanguageLoss | None = None, num_tokens: int | None = None
) -> Tensor:
    """Mean token loss `[]` over `num_tokens`, by default over the supervised tokens of this batch."""
    count = num_supervised(labels) if num_tokens is None else torch.as_tensor(num_tokens)
    return mean_over(token_losses(logits, labels, loss).sum(), count)
