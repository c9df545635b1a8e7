"""What PPO needs where the reference cases do not go: empty rows, equal values, state that is saved."""

import math

import pytest
import torch

from llm_trainer.losses.sequences import Sequences
from llm_trainer.losses.value import (
    REWARD_NORMS,
    BatchStd,
    FixedKL,
    RunningMeanStd,
    explained_variance,
    gae,
    token_rewards,
    value_loss,
    whiten,
)

NAN = math.nan


def test_advantages_from_hand() -> None:
    sequences = Sequences(torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0]]).bool())
    values = torch.tensor([[9.0, 0.5, 9.0, 0.4, 0.2], [NAN] * 5])
    rewards = token_rewards(torch.tensor([1.0, NAN]), sequences)
    assert rewards.tolist() == [[0, 0, 0, 0, 1.0], [0] * 5]
    advantages, returns = gae(rewards, values, sequences, gamma=0.9, lam=0.5)
    last = 1.0 - 0.2
    middle = 0.9 * 0.2 - 0.4 + 0.45 * last
    first = 0.9 * 0.4 - 0.5 + 0.45 * middle
    torch.testing.assert_close(advantages, torch.tensor([[0, first, 0, middle, last], [0] * 5]))
    torch.testing.assert_close(returns, torch.tensor([[0, first + 0.5, 0, middle + 0.4, last + 0.2], [0] * 5]))


def test_with_lambda_1_and_no_values_returns_are_the_rewards_to_go() -> None:
    sequences = Sequences(torch.ones(1, 3, dtype=torch.bool))
    advantages, _ = gae(torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 3), sequences, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[7.0, 6.0, 4.0]]


def test_nothing_counts() -> None:
    sequences = Sequences(torch.zeros(2, 3, dtype=torch.bool))
    values = torch.full((2, 3), NAN)
    rewards = token_rewards(torch.zeros(2), sequences, kl=values, kl_coef=0.1)
    for result in (rewards, *gae(rewards, values, sequences), whiten(values, sequences.mask)):
        assert result.tolist() == [[0.0] * 3] * 2
    own = values.requires_grad_()
    losses, metrics = value_loss(own, values.detach(), sequences.mask, values.detach(), 0.2)
    losses.sum().backward()
    assert not losses.any() and own.grad is not None and not own.grad.any()
    assert all(total == 0 and count == 0 for total, count in metrics.values())


def test_values_that_are_all_equal_are_whitened_to_zero() -> None:
    for values in ([0.25], [0.25, 0.25, 0.25]):
        tensor = torch.tensor(values)
        assert whiten(tensor, torch.ones_like(tensor)).tolist() == [0.0] * len(values)
        assert whiten(tensor, torch.ones_like(tensor), shift_mean=False).tolist() == values


def test_explained_variance() -> None:
    returns, mask = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([1, 1, 1, 0])
    assert explained_variance(returns, returns, mask) == 1
    assert explained_variance(torch.full((4,), 7.0), returns, mask) == 0
    assert math.isnan(explained_variance(returns, torch.ones(4), mask))
    assert math.isnan(explained_variance(returns, returns, torch.zeros(4)))


def test_running_statistics_are_those_of_all_rewards() -> None:
    torch.manual_seed(0)
    rewards = torch.randn(30, dtype=torch.float64) * 3 + 5
    norm = RunningMeanStd()
    for part in rewards.split([7, 1, 22]):
        found = norm(part)
    expected = (rewards - rewards.mean()) / rewards.std()
    torch.testing.assert_close(found, expected[-22:])
    resumed = RunningMeanStd()
    resumed.load_state_dict(norm.state_dict())
    assert torch.equal(resumed(rewards), norm(rewards))


@pytest.mark.parametrize("name", REWARD_NORMS)
def test_missing_rewards_stay_missing_and_do_not_count(name: str) -> None:
    rewards = torch.tensor([1.0, NAN, 3.0], dtype=torch.float64)
    found = REWARD_NORMS[name]()(rewards)
    expected = REWARD_NORMS[name]()(rewards[[0, 2]])
    assert found.isnan().tolist() == [False, True, False]
    assert found[[0, 2]].tolist() == expected.tolist() == pytest.approx([-1 / 2**0.5, 1 / 2**0.5], abs=1e-6)
    norm = REWARD_NORMS[name]()
    assert norm(torch.tensor([NAN])).isnan().all() and norm(torch.tensor([2.0])).tolist() == [0.0]


def test_what_does_not_change_saves_nothing() -> None:
    kl = FixedKL(0.2)
    kl.update(100.0, 64)
    assert kl.coef == 0.2 and kl.state_dict() == {} and BatchStd().state_dict() == {}
