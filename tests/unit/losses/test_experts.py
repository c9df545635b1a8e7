"""Losses of routers: their bounds, padding, half precision, and what is shown of them."""

import pytest
import torch
from torch import Tensor

from llm_trainer.losses.experts import balance_loss, count_routes, load_spread, router_z_loss, shares_of

EVEN, COLLAPSED = 20 * torch.eye(4).repeat(3, 1), torch.tensor([[20.0, 0, 0, 0]]).repeat(12, 1)


def balance(logits: list[Tensor], top_k: int, weights: Tensor | None = None) -> float:
    routing = count_routes(logits, top_k, weights)
    return balance_loss(routing, shares_of(routing.assigned, top_k)).item()


def test_balanced_experts_reach_the_lower_bound() -> None:
    assert balance([EVEN], 4 // 4) == pytest.approx(1.0, abs=1e-6)
    assert balance([COLLAPSED], 1) == pytest.approx(4.0, abs=1e-6)
    assert balance([EVEN, COLLAPSED], 1) == pytest.approx((5 / 8) ** 2 * 4 + 3 * (1 / 8) ** 2 * 4, abs=1e-6)


def test_no_tokens_cost_nothing() -> None:
    routing = count_routes([COLLAPSED.clone().requires_grad_()], 1, torch.zeros(12))
    loss = balance_loss(routing, shares_of(routing.assigned, 1)) + router_z_loss(routing)
    loss.backward()
    assert loss.item() == 0.0


def test_tokens_are_counted_exactly_in_half_precision() -> None:
    """bf16 has 8 bits: a sum of 3,001 ones would be 3,008."""
    logits = COLLAPSED[:1].repeat(3001, 1).bfloat16()
    routing = count_routes([logits, logits], 2, torch.ones(1, 3001, dtype=torch.long))
    assert routing.tokens == 3001 and routing.assigned.sum() == 2 * 2 * 3001
    assert routing.assigned.dtype == routing.prob_sum.dtype == torch.float32


def test_what_is_shown_of_the_load() -> None:
    """Two layers of four experts: one even, one that leaves two without a token."""
    spread = load_spread(torch.tensor([[3.0, 3, 3, 3], [9, 3, 0, 0]]))
    assert spread["load_max"] == 3.0 and spread["load_min"] == 0.0 and spread["unused"] == 2
    entropy = (0.75 * torch.log(torch.tensor(4 / 3)) + 0.25 * torch.log(torch.tensor(4.0))) / torch.log(
        torch.tensor(4.0)
    )
    assert spread["entropy"].item() == pytest.approx((1 + entropy.item()) / 2)
