"""Losses on single answers: refusals, no gradient through the KL, and mismatched pairs whatever the order of rows."""

import pytest
import torch

from llm_trainer.losses.unpaired import UnpairedLoss, kto_kl, mismatched_order


def test_kto_refuses_unknown_losses_and_has_no_gradient_through_its_kl() -> None:
    with pytest.raises(ValueError, match="apo_zero_unpaired"):
        UnpairedLoss("dpo")
    log_ratios = torch.tensor([0.5, -2.0, 7.0], requires_grad=True)
    assert not kto_kl(log_ratios).requires_grad
    assert kto_kl(log_ratios[:0]) == 0 and kto_kl(-log_ratios.abs()) == 0
    losses, metrics = UnpairedLoss()(log_ratios * 1e4, torch.tensor([True, True, False]), kto_kl(log_ratios))
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([0.0, 1.0, 1.0]))
    assert log_ratios.grad.isfinite().all() and metrics["rewards/rejected"].shape == (1,)


@pytest.mark.parametrize("prompts", [[0, 1], [3, 3, 1, 1], [0, 0, 1, 2, 2, 1], [5, 1, 5, 2, 5, 3, 4], list(range(9))])
def test_mismatched_completions_belong_to_other_prompts(prompts: list[int]) -> None:
    ids = torch.tensor(prompts)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):  # whatever order the sampler gives
        ids = ids[torch.randperm(len(ids), generator=generator)]
        order = mismatched_order(ids)
        assert sorted(order.tolist()) == list(range(len(ids)))
        assert (ids[order] != ids).all()
        assert torch.equal(mismatched_order(torch.stack([torch.full_like(ids, 7), ids], dim=1)), order)


def test_mismatched_completions_of_a_dominant_prompt_are_at_least_other_rows() -> None:
    for prompts in ([1, 1], [1, 1, 1, 2], [4] * 5):
        order = mismatched_order(torch.tensor(prompts))
        assert all(row != i for i, row in enumerate(order.tolist()))
    with pytest.raises(ValueError, match="at least 2"):
        mismatched_order(torch.tensor([1]))
