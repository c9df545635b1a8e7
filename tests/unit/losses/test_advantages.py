"""Advantages where the reference cases do not go: level groups in float32, groups of one, missing rewards, ReMax."""

import pytest
import torch

from llm_trainer.losses.advantages import ADVANTAGES, Advantages, level_share

NAN = float("nan")


def advantages(kind: str, rewards: list[float], groups: list[int], dtype: torch.dtype = torch.float64) -> list[float]:
    column = torch.tensor(rewards, dtype=dtype)[:, None]
    greedy = torch.full((len(rewards),), 0.5) if kind == "remax" else None
    return Advantages(kind, greedy_rewards=greedy)(column, torch.tensor(groups))[0].tolist()


@pytest.mark.parametrize("kind", [kind for kind in ADVANTAGES if kind != "remax"])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_equal_rewards_give_exactly_zero_in_float32(kind: str, eps: float) -> None:
    rewards = torch.full((6, 1), 0.3)  # whose mean, in float32, is not 0.3
    found, is_missing = Advantages(kind, eps=eps)(rewards, torch.tensor([0, 0, 0, 0, 0, 0]))
    assert found.tolist() == [0.0] * 6 and not is_missing.any()


def test_the_share_of_level_groups_counts_groups() -> None:
    rewards = torch.tensor([0.3] * 6 + [0.0, 1.0] + [NAN, NAN] + [0.5, NAN])
    groups = torch.tensor([7] * 6 + [3, 3] + [1, 1] + [2, 2])
    level, total = level_share(rewards, groups)
    assert (round(level, 5), round(total, 5)) == (2, 3)  # of the group without a reward nothing is known


@pytest.mark.parametrize("kind", ["group", "dr_grpo", "batch", "rloo", "reinforce++_baseline", "gdpo"])
def test_a_group_of_one_is_compared_with_nothing(kind: str) -> None:
    found = advantages(kind, [5.0, 0.0, 1.0], [0, 1, 1])
    assert found[0] == 0.0 and found[2] > 0


def test_rewards_of_one_prompt_each_are_compared_with_all() -> None:
    assert advantages("reinforce++", [0.0, 1.0, 2.0], [0, 1, 2]) == pytest.approx([-1.0, 0.0, 1.0], abs=1e-3)


def test_rloo_leaves_itself_out() -> None:
    assert advantages("rloo", [1.0, 2.0, 6.0], [0, 0, 0]) == pytest.approx([-3.0, -1.5, 4.5])


def test_remax_compares_with_the_greedy_completion() -> None:
    assert advantages("remax", [1.0, 0.0], [0, 0]) == [0.5, -0.5]
    greedy = torch.tensor([0.5, NAN])
    found, is_missing = Advantages("remax", greedy_rewards=greedy)(torch.tensor([[1.0], [0.0]]), torch.tensor([0, 1]))
    assert found.tolist() == [0.5, 0.0] and is_missing.tolist() == [False, True]


@pytest.mark.parametrize("kind", [kind for kind in ADVANTAGES if kind != "remax"])
@pytest.mark.parametrize("missing", [NAN, float("inf")])
def test_a_missing_reward_changes_nothing_for_the_others(kind: str, missing: float) -> None:
    some = advantages(kind, [0.0, 1.0, 3.0], [0, 0, 0])
    rewards = torch.tensor([[0.0], [missing], [1.0], [3.0], [missing]])
    found, is_missing = Advantages(kind)(rewards, torch.tensor([0, 0, 0, 0, 1]))
    assert is_missing.tolist() == [False, True, False, False, True]
    assert found[is_missing].tolist() == [0.0, 0.0]
    assert found[~is_missing].tolist() == pytest.approx(some)


def test_a_function_that_does_not_apply_is_no_zero_in_gdpo() -> None:
    rewards = torch.tensor([[1.0, NAN], [0.0, NAN], [1.0, 5.0], [0.0, 5.0]])
    found, is_missing = Advantages("gdpo")(rewards, torch.tensor([0, 0, 1, 1]))
    assert found.tolist() == pytest.approx([0.866, -0.866, 0.866, -0.866], abs=1e-3) and not is_missing.any()


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="known: group, dr_grpo"):
        Advantages("mean")
    with pytest.raises(ValueError, match="greedy"):
        Advantages("remax")(torch.ones(2, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="2 weights for 1 reward functions"):
        Advantages(weights=torch.ones(2))(torch.zeros(3, 1), torch.zeros(3).long())


def test_no_completions_at_all() -> None:
    for kind in ADVANTAGES:
        assert advantages(kind, [], []) == []
