"""From rewards to advantages over a whole rollout: the reference's numbers, what is missing, and what a run follows."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer.config.ppo import PPOConfig
from llm_trainer.losses.sequences import Sequences
from llm_trainer.trainers.shaping import Scored, Shaping
from reference_cases import load_case

REFERENCE = Path(__file__).parents[2] / "reference" / "ppo"


def scored(rewards: list[float], lengths: list[int], values: float = 0.0, kl: float = 0.0) -> Scored:
    """Rows whose first token is a prompt, all tokens alike."""
    total = sum(lengths)
    mask, start = torch.ones(1, total, dtype=torch.bool), 0
    for length in lengths:
        mask[0, start] = False
        start += length
    return Scored(
        Sequences(mask, torch.tensor(lengths)),
        torch.tensor(rewards, dtype=torch.float64),
        torch.ones(len(lengths), dtype=torch.bool),
        torch.full((1, total), values, dtype=torch.float64),
        torch.full((1, total), kl - 1, dtype=torch.float64),
        torch.full((1, total), -1.0, dtype=torch.float64),
    )


@pytest.mark.parametrize("name", sorted(path.stem for path in REFERENCE.glob("pipeline_*.json")))
def test_the_numbers_of_the_reference(name: str) -> None:
    """Padded `[B, T]`, as the cases have it."""
    case = load_case(REFERENCE / name)
    hyper, inputs = case.hyper, case.inputs
    config = {key: hyper[key] for key in ("kl_estimator", "missing_eos_penalty", "gamma", "lam", "whiten_rewards")}
    shaping = Shaping(PPOConfig(kl_beta=hyper["kl_coef"], **config))
    rollout = Scored(
        Sequences(inputs["mask"].bool()),
        inputs["scores"].double(),
        inputs["has_eos"].bool(),
        inputs["values"].double(),
        inputs["logps_old"].double(),
        inputs["logps_ref"].double(),
    )
    shaped = shaping(rollout)
    case.assert_close(shaped.advantages, case.outputs["advantages_whitened"], what="advantages")
    case.assert_close(shaped.returns, case.outputs["returns"], what="returns")
    for metric in ("objective/kl", "objective/non_score_reward", "objective/entropy"):
        total, count = shaped.metrics[metric]
        case.assert_close(total / count, case.expected[metric.replace("/", "_")], what=metric)


def test_what_has_no_reward_leaves_everything() -> None:
    options: dict[str, Any] = {"normalize_rewards": True, "normalize_method": "BatchStd", "whiten_rewards": True}
    with_it, without = Shaping(PPOConfig(**options)), Shaping(PPOConfig(**options))
    found = with_it(scored([1.0, math.nan, 3.0, 5.0], [3, 5, 2, 4], 0.5, 0.1))
    expected = without(scored([1.0, 3.0, 5.0], [3, 2, 4], 0.5, 0.1))
    assert found.is_missing.tolist() == [False, True, False, False]
    assert not found.advantages[0, 3:8].any() and not found.returns[0, 3:8].any()
    kept = torch.cat([found.advantages[:, :3], found.advantages[:, 8:]], 1)
    torch.testing.assert_close(kept, expected.advantages)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, metric in found.metrics.items():
        assert metric == pytest.approx(expected.metrics[name]), name


def test_what_a_run_follows_is_in_its_state_and_evaluation_changes_none_of_it() -> None:
    how = PPOConfig(normalize_rewards=True, kl_target=0.5, kl_horizon=10.0, whiten_advantages=False)
    whole, first = Shaping(how), Shaping(how)
    rollouts = [scored([1.0, 2.0, 6.0], [3, 4, 5], kl=0.4), scored([0.0, 3.0], [2, 6], kl=0.3)]
    shaped = [whole(rollout) for rollout in rollouts]
    # By hand: the mean and spread of all rewards so far; 3 sequences of (2 + 3 + 4) / 3 * 0.4 nats, and a bounded error.
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.0, 3.0], dtype=torch.float64)
    assert whole.state_dict()["rewards"]["mean"] == pytest.approx(float(rewards.mean()))
    assert whole.kl.coef == pytest.approx(0.02 * (1 + 0.2 * 3 / 10) * (1 + 0.2 * 2 / 10))
    last = shaped[1].returns[0, 1] + 0.02 * (1 + 0.2 * 3 / 10) * 0.3
    assert float(last) == pytest.approx(float((0.0 - rewards.mean()) / rewards.std()), rel=1e-6)

    first(rollouts[0])
    before = json.dumps(first.state_dict())
    seen = first(rollouts[1], follows=False)
    assert json.dumps(first.state_dict()) == before
    torch.testing.assert_close(seen.advantages, shaped[1].advantages, rtol=0, atol=0)
    resumed = Shaping(how)
    resumed.load_state_dict(json.loads(before))
    torch.testing.assert_close(resumed(rollouts[1]).advantages, shaped[1].advantages, rtol=0, atol=0)
    assert resumed.state_dict() == whole.state_dict()


def test_a_critic_that_knows_all_explains_all() -> None:
    how = PPOConfig(kl_beta=0.0, lam=1.0)
    rollout = scored([1.0, 0.0, 4.0], [4, 4, 4])
    returns = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64).repeat_interleave(4)[None]
    for values, expected in ((returns, 1.0), (torch.ones_like(returns), 0.0)):
        explained, _ = Shaping(how)(rollout._replace(values=values, ref_logprobs=None)).metrics[
            "val/explained_variance"
        ]
        assert explained == pytest.approx(expected)
    level = Shaping(how)(scored([1.0, 1.0], [2, 2])._replace(ref_logprobs=None))
    assert "val/explained_variance" not in level.metrics and not level.advantages.any()
