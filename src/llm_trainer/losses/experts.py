"""Losses of the routers of a mixture of experts: pure functions of sums over tokens.

What routers do with the tokens of a micro-batch is held as sums (`Routing`), and not as a finished loss: the balance is one
of a whole optimizer step, however that is cut into micro-batches and ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm_trainer.losses.language import at_least_float32, mean_over


class Routing(NamedTuple):
    """What the routers of L layers with E experts each do with some tokens. Float32, or float64 where the logits are.

    Attributes:
        assigned: `[L, E]` how often a token was sent to each expert: whole numbers, without a gradient.
        prob_sum: `[L, E]` the sum of the routers' probabilities over the tokens; differentiable. None where routers choose by
            other numbers, which a bias balances.
        z_sum: `[]` the sum of logsumexp(logits)^2 over tokens and layers; differentiable; or None.
        tokens: `[]` how many tokens that is.
    """

    assigned: Tensor
    prob_sum: Tensor | None
    z_sum: Tensor | None
    tokens: Tensor


def count_routes(
    router_logits: Sequence[Tensor],
    top_k: int,
    token_weights: Tensor | None = None,
    chosen: Sequence[Tensor] | None = None,
) -> Routing:
    """The sums of tokens that are sent to the `top_k` experts of highest probability.

    Args:
        router_logits: one `[B * T, E]` (or `[B, T, E]`) per layer.
        top_k: experts per token.
        token_weights: `[B, T]` how often each token counts: 0 for padding; None: each once.
        chosen: one `[B * T, top_k]` of experts per layer, where tokens were sent to others.
    """
    num_experts = router_logits[0].shape[-1]
    first = at_least_float32(router_logits[0])
    if token_weights is None:
        weights = first.new_ones(first.numel() // num_experts)  # (n,)
    else:
        weights = token_weights.reshape(-1).to(first.dtype)
    assigned, prob_sums, z_sum = [], [], first.new_zeros(())
    for place, layer in enumerate(router_logits):
        logits = at_least_float32(layer).reshape(-1, num_experts)  # (n, E)
        probs = logits.softmax(-1)
        sent_to = probs.detach().topk(top_k, dim=-1).indices if chosen is None else chosen[place]  # (n, top_k)
        assigned.append(_counts(sent_to.flatten(), num_experts, weights.repeat_interleave(top_k)))
        prob_sums.append(weights @ probs)
        z_sum = z_sum + weights @ logits.logsumexp(-1).square()
    return Routing(torch.stack(assigned), torch.stack(prob_sums), z_sum, weights.sum())


def _counts(chosen: Tensor, num_experts: int, weights: Tensor) -> Tensor:
    """`[E]` how often each expert is in `chosen [n]`, by `weights [n]`: sums of whole numbers, whose order does not matter."""
    return weights.new_zeros(num_experts).scatter_add(0, chosen, weights)


def count_chosen(chosen: Sequence[Tensor], num_experts: int, token_weights: Tensor | None = None) -> Routing:
    """The assignments of routers that say whom they have chosen, and nothing else.

    Args:
        chosen: one `[B * T, K]` of experts per layer.
        num_experts: of a layer.
        token_weights: as `count_routes` takes it.
    """
    tokens, top_k = chosen[0].shape
    weights = torch.ones(tokens, device=chosen[0].device)
    if token_weights is not None:
        weights = token_weights.reshape(-1).float()
    repeated = weights.repeat_interleave(top_k)
    assigned = [_counts(layer.flatten(), num_experts, repeated) for layer in chosen]
    return Routing(torch.stack(assigned), None, None, weights.sum())


def shares_of(assigned: Tensor, top_k: int) -> Tensor:
    """How often a token is sent to each expert, all layers together: `assigned [L, E]` -> `[E]`, which sums to `top_k`."""
    pooled = assigned.sum(0)
    return top_k * mean_over(pooled, pooled.sum().expand_as(pooled))


def balance_loss(routing: Routing, shares: Tensor) -> Tensor:
    """E * sum_e f_e P_e, `top_k` and smallest when every expert is used equally; the coefficient is not included.

    f_e is the number of assignments to expert e per token, P_e the mean router probability (Switch Transformers, Fedus et al.
    2021, arXiv:2101.03961, eq. 4-6), over the tokens of all layers together, as in transformers. f has no gradient; where it
    is that of a whole step, the loss is linear in P, so that its means over micro-batches add up to that over the step.

    Args:
        routing: of a micro-batch.
        shares: `[E]` f (`shares_of`).

    Returns:
        scalar, a mean over the tokens.
    """
    assert routing.prob_sum is not None
    num_layers, num_experts = routing.prob_sum.shape
    weighted = num_experts * (shares * routing.prob_sum.sum(0)).sum()
    return mean_over(weighted, num_layers * routing.tokens)


def router_z_loss(routing: Routing) -> Tensor:
    """The mean of logsumexp(logits)^2 over tokens and layers, which keeps routers' logits small; scalar.

    ST-MoE, Zoph et al. 2022, arXiv:2202.08906, eq. 5.
    """
    assert routing.z_sum is not None
    return mean_over(routing.z_sum, len(routing.assigned) * routing.tokens)


def load_spread(assigned: Tensor) -> dict[str, Tensor]:
    """How evenly tokens are spread, of `assigned [L, E]`; each scalar.

    `load_max` and `load_min`: of the expert with the most tokens of any layer, and of that with the fewest; 1 is its even
    share. `unused`: how many experts of all layers have none. `entropy`: of the layers' assignments, their mean; 1 is even.
    """
    num_experts = assigned.shape[1]
    shares = mean_over(assigned, assigned.sum(1, keepdim=True).expand_as(assigned))  # (L, E), each layer sums to 1
    entropy = torch.special.entr(shares).sum(1).mean() / torch.log(shares.new_tensor(num_experts))
    return {
        "load_max": num_experts * shares.max(),
        "load_min": num_experts * shares.min(),
        "unused": (assigned == 0).sum(),
        "entropy": entropy,
    }
