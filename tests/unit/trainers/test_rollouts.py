"""Rollouts of a real policy: drawn by the sampler, judged by functions, learned from; what a rollout depends on."""

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_trainer.models.rewarding import process_reward_model, reward_model
from llm_trainer.rewards.functions import RewardError
from llm_trainer.train.signals import TrainingInterrupted
from policies import STOP, make, prompts, rollouts_of, tiny
from policies import train as run

train = partial(run, "grpo")


def test_it_draws_judges_and_learns(tmp_path: Path) -> None:
    _, seen = train(tmp_path)
    assert len(seen) == 3  # a step for each batch of prompts
    first = rollouts_of(tmp_path)[0]
    assert len(first) == 8 and first.column("group").tolist() == [0] * 4 + [1] * 4
    for row in range(8):
        ids, start = first.store["input_ids"][row], 3 if row < 4 else 4
        written = ids[start:]
        assert first.store["trained"][row].tolist() == [False] * start + [True] * len(written)
        assert first.column("rewards")[row, 0] == sum(token % 2 == 0 for token in written) / len(written)
        assert len(written) <= 8 and (first.column("finish")[row] == 0) == (written[-1] == STOP)
        assert first.facts(row)["answer"] == str(row // 4)
    assert seen[0]["reward"] == pytest.approx(first.column("rewards").mean())
    assert seen[0]["ratio"] == 1 and seen[0]["sampling/sampling_logp_difference/max"] < 1e-4
    assert seen[0]["completions/max_length"] == max(trained.sum() for trained in first.column("trained"))
    assert all(name in seen[0] for name in ("seconds/generate", "seconds/reward", "seconds/sync", "entropy"))


def test_one_update_asks_the_model_for_no_old_log_probs(tmp_path: Path) -> None:
    train(tmp_path / "one")
    train(tmp_path / "two", grpo_steps=2)
    assert "old_logprobs" not in rollouts_of(tmp_path / "one")[0].store.columns
    assert "ref_logprobs" not in rollouts_of(tmp_path / "two")[0].store.columns
    old = rollouts_of(tmp_path / "two")[0]
    for row in range(8):
        np.testing.assert_allclose(old.store["old_logprobs"][row], old.store["sampled_logprobs"][row], atol=1e-5)


def test_reward_functions_by_name_within_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "import os, time\n"
        "def sometimes(prompts, completions, answers):\n"
        "    if '2' in answers:\n"
        "        time.sleep(60)\n"
        "    print('judged', len(completions))\n"
        "    return [float(len(ids)) for ids in completions]\n"
    )
    entries = [{"name": f"{own}:sometimes", "weight": 0.5, "label": "long"}]
    _, seen = train(tmp_path / "run", reward_func=None, rewards=entries, reward_seconds=1.5, max_failed_rewards=1.0)
    assert len(seen) == 2  # nothing is left of the second rollout to learn from, and the run goes on
    made = rollouts_of(tmp_path / "run")
    assert made[1].facts(0)["errors"] == {"long": "reward function 'long' did not return within 1.5 s and was ended"}
    assert len(made[1].used) == 0 and len(made[2].used) == len(made[2])
    assert "reward function 'long' printed: judged " in capsys.readouterr().out


def test_failures_by_cause_are_shares_of_all_completions(tmp_path: Path) -> None:
    """Also where another part of the rollout has none of them."""

    def sometimes(prompts: Any, completions: Any, answers: Any) -> Any:
        return ["good", *[float(number) for number in range(1, len(answers))]]

    def fails(prompts: Any, completions: Any, answers: Any) -> Any:
        if "0" in answers:
            raise KeyError("level")
        return [None] * len(answers)

    functions = {"sometimes": sometimes, "fails": fails}
    options = {"max_failed_rewards": 1.0, "reward_in_process": True, "prompts_per_part": 1, "max_steps": 1}
    _, (seen,) = train(tmp_path, reward_func=functions, **options)
    shares = {name: value for name, value in seen.items() if name.startswith("rewards/failed")}
    assert shares == {"rewards/failed": 5 / 8, "rewards/failed/type": 2 / 8, "rewards/failed/raised": 4 / 8}


def test_too_many_failures_stop_the_run_with_their_cause(tmp_path: Path) -> None:
    def fails(prompts: Any, completions: Any, answers: Any) -> Any:
        raise KeyError("level")

    with pytest.raises(RewardError, match=r"rewards of 'fails' are missing.* KeyError: 'level'"):
        train(tmp_path, reward_func=fails)


def test_sigterm_while_completions_are_judged(tmp_path: Path) -> None:
    trainer = os.getpid()

    def terminates(prompts: Any, completions: Any, answers: Any) -> Any:
        os.kill(trainer, signal.SIGTERM)
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(TrainingInterrupted):
        train(tmp_path, reward_func=terminates)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("options", [{"gen_k": 5}, {"gen_p": 0.8, "gen_suppress_tokens": [4, 9], "loss_type": "gspo"}])
def test_prompts_once_change_nothing_also_where_the_distribution_was_cut(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    how = {"rows_per_update": 4, **options}
    trainer, shared = train(tmp_path / "shared", **how)
    assert trainer.shares_prompts and trainer.run.source.shares_prompts()
    _, repeated = train(tmp_path / "repeated", share_prompts=False, **how)
    assert len(shared) == len(repeated) == 6 and shared[0]["ratio"] == pytest.approx(1, abs=1e-5)
    for a, b in zip(shared, repeated, strict=True):
        for name in ("loss", "grad_norm", "ratio", "entropy", "reward"):
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(("name", "samples"), [("rloo", 4), ("reinforce", 1)])
def test_baselines_of_reinforce(name: str, samples: int, tmp_path: Path) -> None:
    run(name, tmp_path, train_loader=prompts(size=3), kl_coef=0.1)
    first = rollouts_of(tmp_path)[0]
    rewards, groups = first.column("rewards")[:, 0], first.column("group")  # the KL is 0 in the first rollout
    assert len(first) == 3 * samples
    for row in range(len(first)):
        others = (groups == groups[row]) & (np.arange(len(first)) != row)
        expected = rewards[row] - rewards[others].mean() if name == "rloo" else None
        if name == "reinforce":
            expected = (rewards[row] - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        assert first.store["advantages"][row][-1] == pytest.approx(expected, abs=1e-3)


def test_parts_are_as_large_as_was_said(tmp_path: Path) -> None:
    trainer, _ = train(tmp_path, prompts_per_part=3, max_steps=1)
    assert trainer.run.source.supply._parts(7) == [(0, 3), (3, 6), (6, 7)]


def test_a_model_that_judges_steps_is_no_judge_of_completions(tmp_path: Path) -> None:
    judge = process_reward_model(tiny(), 0)
    with pytest.raises(
        ValueError,
        match=r"ForTokenClassification judges the steps of an answer.* reward_model_steps.* sequence classification",
    ):
        train(tmp_path, reward_func=None, reward_model=judge)


# What tells a rollout from another one.


def judge(seed: int) -> Any:
    torch.manual_seed(7)  # of the head
    return reward_model(tiny(seed=seed))


def test_a_rollout_that_another_reward_model_judged_is_made_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was made after the last checkpoint, by the same weights and of the same prompts."""
    options: dict[str, Any] = {"reward_func": None, "save_interval_steps": 1, "resume": "auto", "max_steps": 2}
    train(tmp_path, reward_model=judge(1), **options)
    judged = rollouts_of(tmp_path)[1].column("model_reward")
    shutil.rmtree(tmp_path / "checkpoint-00000002")
    train(tmp_path, reward_model=judge(1), **options)
    assert "it was moved to" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "checkpoint-00000002")
    train(tmp_path, reward_model=judge(2), **options)
    assert "00000001 was made with other settings (reward_model); it was moved to" in capsys.readouterr().out
    assert np.abs(rollouts_of(tmp_path)[1].column("model_reward") - judged).min() > 1e-4


class Twice(nn.Module):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return ids.float().sum(1) * 2


class Thrice(nn.Module):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return ids.float().sum(1) * 3


def test_what_the_columns_of_a_rollout_depend_on_is_in_its_settings(tmp_path: Path) -> None:
    def settings(name: str, **options: Any) -> Any:
        return make(name, tmp_path, **options)._rollout_maker().settings(True)

    plain = {"reward_model": judge(1), "kl_coef": 0.1}
    same = settings("grpo", **plain)
    assert json.loads(json.dumps(settings("grpo", **plain))) == json.loads(json.dumps(same))
    others: list[Any] = []
    regression = judge(1)
    regression.config.problem_type = "regression"
    for name, changed in {
        "another judge": {"reward_model": judge(2)},
        "no judge": {"reward_model": None},
        "a judge of another kind": {"reward_model": regression},
        "a module": {"reward_model": Twice()},
        "another module": {"reward_model": Thrice()},
        "what is compared": {"advantage": "rloo"},
        "what is masked": {"overlong": "mask"},
        "another reference": {"ref_model": tiny(seed=5)},
        "no reference": {"kl_coef": 0.0},
        "the KL in the reward": {"kl_in": "reward"},
        "more of it": {"kl_in": "reward", "kl_coef": 0.2},
        "log-probs of before the updates": {"grpo_steps": 2},
    }.items():
        found = settings("grpo", **(plain | changed))
        assert found not in (same, *others), name
        others.append(found)
    assert settings("ppo", ref_model=tiny(seed=5)) != settings("ppo") != settings("ppo", overlong="mask")


def test_a_reward_that_fails_in_an_evaluation_loses_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was learned is saved, and a run that goes on when the judge is back ends in the same bits."""
    broken = tmp_path / "broken"

    def judge(prompts: list[list[int]], completions: list[list[int]], answers: list[str]) -> list[float]:
        if broken.exists() and len(completions) > 4:
            raise ConnectionError("the judge is away")
        return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completions]

    options: dict[str, Any] = {
        "reward_func": judge,
        "train_loader": prompts(3, size=1),
        "val_loader": prompts(4, size=4),
        "eval_samples": 4,
        "eval_interval": 2,
        "resume": "auto",
    }
    whole, _ = train(tmp_path / "whole", **options)
    broken.touch()
    with pytest.raises(RewardError, match="the judge is away"):
        train(tmp_path / "cut", **options)
    saved = tmp_path / "cut" / "checkpoint-00000002"
    assert (
        f"step 2, hook evaluate, failed with RewardError; all before it is saved in {saved}" in capsys.readouterr().out
    )
    broken.unlink()
    cut, seen = train(tmp_path / "cut", **options)
    assert cut.run.progress.step == 3 and "eval_reward" in seen[0]
    for one, other in zip(whole.base_model.parameters(), cut.base_model.parameters(), strict=True):
        assert torch.equal(one, other)
