"""Reward-model losses: what centering and margins do, steps without a label."""

import math

import pytest
import torch

from llm_trainer.losses.reward import bradley_terry, process_reward


def test_equal_rewards_cost_log_two_and_are_not_accurate() -> None:
    losses, metrics = bradley_terry(torch.ones(3), torch.ones(3))
    torch.testing.assert_close(losses, torch.full((3,), math.log(2)))
    assert metrics["accuracy"].sum() == 0


def test_a_common_shift_of_rewards_is_only_seen_by_the_centering_term() -> None:
    chosen, rejected = torch.tensor([1.0, 0.5]), torch.tensor([-1.0, 0.25])
    plain, _ = bradley_terry(chosen, rejected)
    shifted, _ = bradley_terry(chosen + 3, rejected + 3)
    torch.testing.assert_close(plain, shifted)
    centered, _ = bradley_terry(chosen + 3, rejected + 3, center_coef=0.1)
    torch.testing.assert_close(centered - plain, 0.1 * torch.tensor([36.0, 6.75**2]))


def test_a_margin_asks_for_more_without_touching_accuracy() -> None:
    chosen, rejected = torch.tensor([1.0]), torch.tensor([0.0])
    plain, metrics = bradley_terry(chosen, rejected)
    wide, wide_metrics = bradley_terry(chosen, rejected, margin=torch.tensor([2.0]))
    assert wide > plain and metrics["accuracy"] == wide_metrics["accuracy"] == 1


def test_step_losses_equal_two_class_cross_entropy_and_ignore_other_tokens() -> None:
    scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.tensor([[1.0, 0, 1, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]])
    scores = scores.masked_fill(mask == 0, float("nan")).requires_grad_()
    losses, metrics = process_reward(scores, labels, mask)
    losses.sum().backward()
    two_class = torch.stack([torch.zeros_like(scores), scores], dim=-1)[mask.bool()]
    expected = torch.nn.functional.cross_entropy(two_class, labels[mask.bool()].long(), reduction="none")
    torch.testing.assert_close(losses[mask.bool()], expected)
    assert (losses[mask == 0] == 0).all() and (scores.grad[mask == 0] == 0).all()
    hits = (scores[mask.bool()] > 0) == (labels[mask.bool()] == 1)
    assert metrics["accuracy"].sum() == hits.sum()


def test_soft_step_labels_are_met_at_their_own_probability() -> None:
    label = torch.tensor([[0.3]])
    best = torch.logit(label).requires_grad_()
    process_reward(best, label, torch.ones(1, 1))[0].sum().backward()
    assert best.grad.abs().max() == pytest.approx(0, abs=1e-7)
