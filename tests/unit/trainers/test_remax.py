"""ReMax: the greedy completion of a prompt is drawn, judged, compared with, and not learned from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer.losses.advantages import greedy_rewards
from llm_trainer.train.hooks import Hook
from llm_trainer.train.signals import TrainingInterrupted
from llm_trainer.train_configs import ConfigError, ReMaxConfig
from policies import STOP, rollouts_of, tiny, train


def test_the_reward_of_the_greedy_completion_is_that_of_the_group() -> None:
    rewards, groups = torch.tensor([1.0, 5.0, 2.0, 3.0, 4.0, 6.0]), torch.tensor([7, 3, 7, 9, 3, 9])
    is_greedy = torch.tensor([False, True, True, False, False, False])
    found = greedy_rewards(rewards, groups, is_greedy)
    np.testing.assert_array_equal(found.numpy(), [2.0, 5.0, 2.0, np.nan, 5.0, np.nan])


@pytest.mark.parametrize("options", [{}, {"num_samples_per_prompt": 3, "kl_coef": 0.1, "gen_k": 4}])
def test_a_completion_is_compared_with_the_greedy_one(tmp_path: Path, options: dict[str, Any]) -> None:
    samples = options.get("num_samples_per_prompt", 1)
    _, seen = train("remax", tmp_path, **({"num_samples_per_prompt": 1} | options))
    rollout = rollouts_of(tmp_path)[0]
    per_group = samples + 1
    assert rollout.column("group").tolist() == [0] * per_group + [1] * per_group
    assert rollout.is_greedy.tolist() == ([False] * samples + [True]) * 2

    # 1. it is what transformers' own greedy decoding gives
    model = tiny()
    for row in np.flatnonzero(rollout.is_greedy).tolist():
        ids, trained = rollout.store["input_ids"][row], rollout.store["trained"][row]
        prompt = torch.from_numpy(ids[~trained].astype(np.int64))[None]
        greedy = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=STOP, pad_token_id=0)
        assert ids[trained].tolist() == greedy[0, prompt.shape[1] :].tolist()

    # 2. advantages are differences of rewards; the KL is of the drawn completion alone
    rewards = rollout.column("rewards")[:, 0]
    for row in np.flatnonzero(~rollout.is_greedy).tolist():
        first = int(rollout.store["trained"][row].argmax())
        expected = rewards[row] - rewards[row // per_group * per_group + samples]
        if "kl_coef" in options:  # k1, in the reward; at the start the policy is its reference
            assert "ref_logprobs" in rollout.store.columns
        assert rollout.store["advantages"][row][first] == pytest.approx(expected, abs=1e-5)

    # 3. it is in the ledger, not in the loss, and not among the metrics of what was drawn
    tokens = sum(int(rollout.store["trained"][row].sum()) for row in np.flatnonzero(rollout.is_greedy))
    assert rollout.ledger["dropped"] == {"it is the greedy one, which others are compared with": tokens}
    assert rollout.used.tolist() == np.flatnonzero(~rollout.is_greedy).tolist()
    assert seen[0]["reward"] == pytest.approx(rewards[~rollout.is_greedy].mean())
    assert seen[0]["reward_greedy"] == pytest.approx(rewards[rollout.is_greedy].mean())


def test_a_reward_model_judges_it_too(tmp_path: Path) -> None:
    def judge(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return (input_ids * attention_mask).sum(1) / 10.0

    class Sums(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return judge(input_ids, attention_mask)

    train("remax", tmp_path, num_samples_per_prompt=1, reward_func=None, reward_model=Sums(), max_steps=1)
    rollout = rollouts_of(tmp_path)[0]
    worth = [float(rollout.store["input_ids"][row].sum()) / 10 for row in range(4)]
    for row in (0, 2):
        advantage = rollout.store["advantages"][row][-1]
        assert advantage == pytest.approx(worth[row] - worth[row + 1], abs=1e-4)


def test_a_prompt_whose_greedy_completion_has_no_reward_teaches_nothing(tmp_path: Path) -> None:
    def unsure(prompts: list[Any], completions: list[Any], answers: list[str]) -> list[float | None]:
        """Of the greedy completions, which are judged last, the second is not."""
        return [1.0 + n if n < len(completions) - 1 else None for n in range(len(completions))]

    train("remax", tmp_path, num_samples_per_prompt=1, reward_func=unsure, max_steps=1)
    rollout = rollouts_of(tmp_path)[0]
    assert rollout.used.tolist() == [0]  # of two prompts
    assert rollout.ledger["dropped"]["no reward"] == int(rollout.store["trained"][2].sum())


def test_a_rollout_with_it_is_found_again(tmp_path: Path) -> None:
    _, whole = train("remax", tmp_path / "whole", num_samples_per_prompt=2, grpo_steps=2)

    def ask(run: Any) -> None:
        run.signals.received = 15

    options: dict[str, Any] = {"num_samples_per_prompt": 2, "grpo_steps": 2, "resume": "auto"}
    for _ in range(7):
        try:
            _, seen = train("remax", tmp_path / "cut", hooks=[Hook("ask", ask, every_steps=1)], **options)
            break
        except TrainingInterrupted:
            continue
    assert seen[-1]["loss"] == whole[-1]["loss"] and seen[-1]["grad_norm"] == whole[-1]["grad_norm"]


def test_what_cannot_be_had_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rollouts: another run's are learned from, and advantage remax"):
        ReMaxConfig(rollouts="runs/rl/rollouts")
    with pytest.raises(ConfigError, match="remax compares with the greedy completion of a prompt, and an environment"):
        ReMaxConfig(tools=["mine.py:search"])
    ids = torch.full((2, 3), 5)
    given = {"prompts": ids, "responses": ids, "rewards": torch.tensor([0.0, 1.0])}
    with pytest.raises(ValueError, match="'remax' compare with the reward of the greedy completion"):
        train("remax", tmp_path, train_loader=[given], reward_func=None)
