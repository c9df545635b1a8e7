"""Lesson 1: the loss of a language model.

Shapes: B rows, T positions, V entries of the vocabulary, N = B * (T - 1) predictions.
"""

import torch
from torch import Tensor

IGNORED = -100  # the label of a token that must not be learned: the prompt, padding


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The summed loss of a batch and the number of its terms, kept apart so that batches can be averaged together.

    Args:
        logits: `[B, T, V]`, unnormalised scores; those at position t predict the token at t + 1.
        labels: `[B, T]`, the token at each position, or -100 where it must not be learned.

    Returns:
        The sum of -log p(label) over all learned tokens `[]`, and how many there are `[]`.
    """
    # Shift: the first T - 1 positions predict the last T - 1 tokens. The first token is predicted by nothing.
    logits = logits[:, :-1, :].flatten(0, 1)  # [N, V]
    labels = labels[:, 1:].flatten()  # [N]

    # Low precision is fine for matrix products, but not for a sum over a whole vocabulary.
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # [N, V]

    # Softmax is p_v = exp(z_v) / sum_u exp(z_u). It does not change when a constant c is subtracted from every z,
    # and with c = max(z) no exponent is above 0, so nothing overflows.
    shifted = logits - logits.max(dim=-1, keepdim=True).values.detach()  # [N, V]

    # log p_v = z_v - log sum_u exp(z_u). One term of the sum is exp(0) = 1, so the logarithm is never of 0.
    log_normaliser = shifted.exp().sum(dim=-1)  # [N]
    log_normaliser = log_normaliser.log()  # [N]

    # Only log p of the label is needed. An ignored label is no index, so 0 stands in for it and is masked out below.
    learned = labels != IGNORED  # [N] bool
    index = torch.where(learned, labels, 0).unsqueeze(-1)  # [N, 1]
    log_p = shifted.gather(-1, index).squeeze(-1) - log_normaliser  # [N]

    # loss = - sum over learned tokens of log p(label)
    loss_sum = -torch.where(learned, log_p, 0.0).sum()  # []
    return loss_sum, learned.sum()
