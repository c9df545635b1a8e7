"""Rewards of tokens: what a function's list becomes in a rollout, in the advantages of groups, and in GAE."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer.losses.advantages import Advantages, token_advantages
from llm_trainer.rewards.returned import read_returned
from policies import rollouts_of, train

nan = float("nan")


def even(prompts: list[Any], completions: list[list[int]], answers: list[str]) -> list[list[float | None]]:
    """1 for an even token, nothing for an odd one: it is not judged."""
    return [[1.0 if token % 2 == 0 else None for token in ids] for ids in completions]


def place(prompts: list[Any], completions: list[list[int]], answers: list[str]) -> list[list[float]]:
    return [[0.1 * n for n in range(len(ids))] for ids in completions]


def short(prompts: list[Any], completions: list[list[int]], answers: list[str]) -> list[float]:
    return [-len(ids) / 10 for ids in completions]


def test_a_list_is_read_with_what_is_not_judged() -> None:
    found = read_returned("f", [[1.0, None, 2.5], [None, None], [1.0], [1.0, nan]], 4, [3, 2, 2, 2])
    np.testing.assert_array_equal(found.tokens[0], [1.0, nan, 2.5])
    np.testing.assert_array_equal(found.values, [3.5, nan, nan, nan])
    assert sorted(found.tokens) == [0, 1] and {row: cause for row, (cause, _) in found.errors.items()} == {
        2: "count",
        3: "not_finite",
    }
    assert "returned 1 numbers for a completion of 2 tokens, expected one for each" in found.errors[2][1]


def test_tokens_earn_what_is_still_to_come() -> None:
    """By hand: five rewards of a group, 1 2 3 4 6, have mean 3.2 and deviation 1.9235 (ddof 1)."""
    rewards = [torch.tensor([nan, 1.0, nan, 3.0, nan]), torch.tensor([2.0, 4.0, 6.0]), torch.tensor([5.0, nan])]
    groups = torch.tensor([4, 4, 9])
    first, second, third = token_advantages([row.double() for row in rewards], groups, Advantages("dr_grpo"))
    np.testing.assert_allclose(first, [-2.4, -2.4, -0.2, -0.2, 0.0], atol=1e-12)
    np.testing.assert_allclose(second, [2.4, 3.6, 2.8], atol=1e-12)
    assert third.tolist() == [0.0, 0.0]  # alone in its group
    scaled, *_ = token_advantages([row.double() for row in rewards], groups, Advantages("group"))
    np.testing.assert_allclose(scaled[0], -2.4 / (3.7**0.5 + 1e-4), atol=1e-12)


def test_they_are_columns_and_advantages_of_a_rollout(tmp_path: Path) -> None:
    weights = {"even": 2.0, "short": 0.5}
    functions = {"even": even, "short": short}
    _, seen = train("grpo", tmp_path, reward_func=functions, reward_weights=weights, num_samples_per_prompt=3)
    rollout = rollouts_of(tmp_path)[0]
    groups, lengths = rollout.column("group"), rollout.column("rewards")[:, 1] * -10
    found = rollout.token_rewards()
    assert found is not None and found[1].tolist() == [[True, False]] * 6

    # 1. as they came, times the weight of their function
    own = []
    for row in range(6):
        ids, trained = rollout.store["input_ids"][row], rollout.store["trained"][row]
        expected = np.where(trained & (ids % 2 == 0), 2.0, np.nan)
        np.testing.assert_array_equal(found[0][row], expected)
        own.append(torch.from_numpy(expected))
        assert rollout.column("rewards")[row, 0] == (trained & (ids % 2 == 0)).sum() or np.isnan(
            rollout.column("rewards")[row, 0]
        )

    # 2. the advantage of a completion by what is of the whole, and that of its tokens
    whole, _ = Advantages("group")(torch.from_numpy(-lengths[:, None] / 20), torch.from_numpy(groups.copy()))
    of_tokens = token_advantages(own, torch.from_numpy(groups.copy()), Advantages("group"))
    for row in range(6):
        trained = rollout.store["trained"][row]
        expected = (float(whole[row]) + of_tokens[row].numpy()) * trained
        np.testing.assert_allclose(rollout.store["advantages"][row], expected, atol=1e-5)
    assert seen[0]["reward"] == pytest.approx(np.nansum(rollout.column("rewards") * [2.0, 0.5], 1).mean())


def test_equal_sums_at_other_places_are_no_level_group(tmp_path: Path) -> None:
    def one(prompts: list[Any], completions: list[list[int]], answers: list[str]) -> list[list[float]]:
        """The likelier half at the first token, the rest at the last: the same sum."""
        found = []
        for number, ids in enumerate(completions):
            rewards = [0.0] * len(ids)
            rewards[0 if number % 2 else -1] = 1.0
            found.append(rewards)
        return found

    train("grpo", tmp_path, reward_func=one, num_samples_per_prompt=4, max_resamplings=1)
    rollout = rollouts_of(tmp_path)[0]
    assert len(rollout.used) == 8 and all(rollout.facts(row)["attempt"] == 0 for row in range(8))
    assert any(np.abs(rollout.store["advantages"][row]).max() > 0.1 for row in range(8))


def test_of_kinds_that_compare_whole_completions_the_sum_counts(tmp_path: Path) -> None:
    train("rloo", tmp_path / "list", reward_func=place, num_samples_per_prompt=4)
    sums = lambda p, completions, a: [sum(0.1 * n for n in range(len(ids))) for ids in completions]  # noqa: E731
    train("rloo", tmp_path / "sum", reward_func=sums, num_samples_per_prompt=4)
    for one, other in zip(rollouts_of(tmp_path / "list"), rollouts_of(tmp_path / "sum"), strict=True):
        np.testing.assert_allclose(one.store["advantages"].values, other.store["advantages"].values, atol=1e-5)
    assert rollouts_of(tmp_path / "sum")[0].token_rewards() is None


def test_gae_takes_each_where_it_is(tmp_path: Path) -> None:
    """With gamma 1 and lambda 1 the return of a token is what comes from it on."""
    options: dict[str, Any] = {"gamma": 1.0, "lam": 1.0, "kl_beta": 0.0, "whiten_advantages": False}
    functions = {"place": place, "short": short}
    train("ppo", tmp_path, reward_func=functions, **options)
    rollout = rollouts_of(tmp_path)[0]
    for row in range(len(rollout)):
        trained = rollout.store["trained"][row]
        count = int(trained.sum())
        rewards = 0.1 * np.arange(count)
        rewards[-1] -= count / 10
        np.testing.assert_allclose(rollout.store["returns"][row][trained], rewards[::-1].cumsum()[::-1], atol=1e-5)


def test_normalised_rewards_of_completions_are_refused_with_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="normalize_rewards: .* whiten_rewards"):
        train("ppo", tmp_path, reward_func=place, normalize_rewards=True)


def test_a_completion_that_a_function_could_not_judge_teaches_nothing(tmp_path: Path) -> None:
    def fails(prompts: list[Any], completions: list[list[int]], answers: list[str]) -> list[Any]:
        return [nan if number == 1 else 1.0 + number for number in range(len(completions))]

    train("grpo", tmp_path, reward_func={"fails": fails, "place": place}, num_samples_per_prompt=4, max_steps=1)
    rollout = rollouts_of(tmp_path)[0]
    assert 1 not in rollout.used and len(rollout.used) == 7
    advantages = rollout.store["advantages"]
    assert not advantages[1].any() and all(np.isfinite(advantages[row]).all() for row in range(8))
