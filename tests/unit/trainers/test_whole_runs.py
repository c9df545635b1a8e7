"""Whole runs of GRPO and PPO with what few use: their metrics, and where every token went."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llm_trainer import configure_optimizer
from llm_trainer.config.options import Sampling
from llm_trainer.data.rollouts import Rollout
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Completion, Request
from llm_trainer.models.rewarding import Rewarding, reward_model
from llm_trainer.train.hooks import Hook
from policies import even_share, prompts, rollouts_of, tiny, train

BOTH = pytest.mark.parametrize("name", ["grpo", "ppo"])


def check_ledgers(folder: Path) -> list[dict[str, Any]]:
    """The ledgers of a run's rollouts, each of which balances and is that of the rows that are there."""
    found = []
    for rollout in rollouts_of(folder):
        ledger = rollout.ledger
        left_out = sum(ledger["masked"].values()) + sum(ledger["dropped"].values())
        assert ledger["sampled"] == ledger["trained"] + ledger["environment"] + left_out
        learned = sum(int(rollout[int(row)]["trained"].sum()) for row in rollout.used)
        assert learned == ledger["trained"] and ledger["rows"] == len(rollout)
        found.append(ledger)
    return found


def written_of(rollout: Rollout, row: int) -> np.ndarray:
    """The ids that the policy wrote in a row."""
    return np.asarray(rollout.store["input_ids"][row])[rollout.store["trained"][row]]


# Who judges.


@BOTH
def test_a_reward_model_judges_beside_a_function(name: str, tmp_path: Path) -> None:
    judge = reward_model(tiny(seed=1))
    _, seen = train(name, tmp_path, reward_model=judge, reward_weights=[0.5])
    judged = []
    for rollout in rollouts_of(tmp_path):
        for row in range(len(rollout)):
            ids = torch.from_numpy(rollout.store["input_ids"][row].astype(np.int64))[None]
            with torch.no_grad():
                value = float(Rewarding(judge)(ids, torch.ones_like(ids)))
            judged.append(value)
            assert rollout.store["model_reward"][row].tolist() == pytest.approx([value], abs=1e-5)
    first = rollouts_of(tmp_path)[0]
    by_function, by_model = first.column("rewards")[:, 0], np.array(judged[: len(first)])
    assert seen[0]["rewards/model_reward"] == pytest.approx(by_model.mean(), abs=1e-5)
    assert seen[0]["rewards/even_share"] == pytest.approx(by_function.mean())
    assert seen[0]["reward"] == pytest.approx((0.5 * by_function + by_model).mean(), abs=1e-5)
    assert np.std(judged) > 0 and len(check_ledgers(tmp_path)) == 3


def test_no_group_is_drawn_again_for_a_reward_model(tmp_path: Path) -> None:
    """It judges when all completions are there."""
    with pytest.raises(
        ValueError, match="max_resamplings: got 2, but a reward model judges .* expected 0, or reward func"
    ):
        train("grpo", tmp_path, reward_model=reward_model(tiny(seed=1)), max_resamplings=2)


# Who draws.


class Own:
    """A service of the user's around another one, which it can have draw at another temperature than it says."""

    def __init__(self, temperature: float | None = None) -> None:
        self.inner = InProcess(tiny(), torch.float32)
        self.temperature, self.loads, self.drawn = temperature, 0, 0

    @property
    def version(self) -> int:
        return self.inner.version

    @property
    def dtype(self) -> torch.dtype | None:
        return self.inner.dtype

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.loads += 1
        self.inner.load(weights, version)

    def held(self) -> dict[str, int]:
        return self.inner.held()

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, stop: Callable[[], bool]
    ) -> list[list[Completion]]:
        from dataclasses import replace

        self.drawn += sum(request.samples for request in requests)
        if self.temperature is not None:
            decoding = replace(decoding, temperature=self.temperature)
        return self.inner.generate(requests, decoding, stop)

    def logprobs(self, ids: Sequence[Sequence[int]], decoding: Decoding) -> list[list[float]]:
        return self.inner.logprobs(ids, decoding)


@BOTH
def test_a_service_of_the_users_draws_what_the_own_one_would(name: str, tmp_path: Path) -> None:
    service = Own()
    _, seen = train(name, tmp_path / "own", generation_service=service)
    _, expected = train(name, tmp_path / "in process")
    assert service.loads == 3 and service.drawn == sum(len(rollout) for rollout in rollouts_of(tmp_path / "own"))
    names = ("loss", "grad_norm", "reward", "completions/mean_length")
    assert [[step[key] for key in names] for step in seen] == [[step[key] for key in names] for step in expected]
    check_ledgers(tmp_path / "own")


@BOTH
def test_a_sampler_that_disagrees_stops_the_run_before_it_learns(name: str, tmp_path: Path) -> None:
    """And a larger limit lets it pass: then it is corrected, and the difference is in the log."""
    model = tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"as they were drawn and .* expected at most 0.01.*another temperature"):
        train(name, tmp_path / "stops", model, generation_service=Own(temperature=2.0))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    options: dict[str, Any] = {"max_logp_difference": 9.0, "off_policy_correction": "truncate", "off_policy_cap": 1.5}
    _, seen = train(name, tmp_path / "goes on", generation_service=Own(temperature=2.0), **options)
    assert seen[0]["sampling/sampling_logp_difference/mean"] > 0.01
    assert 0 < seen[0]["sampling/effective_sample_size"] < 1


# What is learned from.


@BOTH
def test_completions_without_an_end_are_masked_or_shaped(name: str, tmp_path: Path) -> None:
    shaped = {"name": "overlong", "max_tokens": 8, "buffer": 4}
    own = f"{Path(__file__).parents[2] / 'policies.py'}:even_share"
    train(name, tmp_path, reward_func=None, rewards=[own, shaped], overlong="mask")
    for rollout, ledger in zip(rollouts_of(tmp_path), check_ledgers(tmp_path), strict=True):
        masked = 0
        for row in range(len(rollout)):
            ids, is_cut = written_of(rollout, row), rollout.column("finish")[row] == 1
            penalty = -min(1.0, max(0, len(ids) - 4) / 4)
            expected = [even_share([], [ids.tolist()], [])[0], penalty]
            assert rollout.column("rewards")[row].tolist() == pytest.approx(expected)
            masked += len(ids) * bool(is_cut)
        assert ledger["masked"] == {"it has no end": masked} and masked and ledger["trained"]


def test_groups_without_variance_are_drawn_again_so_often_and_no_more(tmp_path: Path) -> None:
    """And every token of every attempt is in the ledger."""
    asked: Counter[str] = Counter()
    tokens: Counter[str] = Counter()

    def level_at_first(prompts: Any, completions: Any, answers: Any) -> list[float]:
        """Of the prompts 1 and 2 all are equal, of 1 the first time only."""
        rewards = []
        for answer in dict.fromkeys(answers):
            asked[answer] += 1
        for ids, answer in zip(completions, answers, strict=True):
            tokens[answer] += len(ids)
            is_level = answer == "2" or (answer == "1" and asked["1"] == 1)
            rewards.append(0.25 if is_level else float(len(ids) % 3) + sum(ids))
        return rewards

    _, seen = train(
        "grpo",
        tmp_path,
        train_loader=prompts(count=4, size=4),
        reward_func=level_at_first,
        reward_in_process=True,
        max_resamplings=3,
    )
    (rollout,) = rollouts_of(tmp_path)
    assert asked == {"0": 1, "1": 2, "2": 4, "3": 1}
    assert [rollout.facts(row)["attempt"] for row in range(16)] == [0] * 4 + [1] * 4 + [3] * 4 + [0] * 4
    assert rollout.used.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 15]
    (ledger,) = check_ledgers(tmp_path)
    assert ledger["sampled"] == tokens.total()
    last = sum(len(written_of(rollout, row)) for row in range(8, 12))
    kept = sum(len(written_of(rollout, row)) for row in range(16))
    again = "its group was drawn again"
    assert ledger["dropped"] == {"all rewards of its group are equal": last, again: tokens.total() - kept}
    assert seen[0]["frac_groups_resampled"] == 0.5 and seen[0]["frac_reward_zero_std"] == 0.25


# What is given.


def given(with_rewards: bool = True, padded: bool = True) -> list[dict[str, Any]]:
    """A batch of six completions of two prompts in turn; the third is shorter, and padded with a real id."""
    noise = torch.Generator().manual_seed(4)
    of_prompts = torch.randint(3, 24, (2, 4), generator=noise)
    responses = torch.randint(3, 24, (6, 5), generator=noise)
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[2, 3:] = 0
    batch = {"prompts": of_prompts.repeat(3, 1), "responses": responses}
    if padded:
        batch["response_attention_mask"] = mask
    if with_rewards:
        batch["rewards"] = torch.randn(6, generator=noise)
    return [batch]


def test_given_completions_are_judged_without_their_padding(tmp_path: Path) -> None:
    """Nothing is sampled; rows with equal prompts are a group; what has a reward is not judged."""
    service = Own()
    train("grpo", tmp_path / "judged", train_loader=given(with_rewards=False), generation_service=service)
    (rollout,) = rollouts_of(tmp_path / "judged")
    (batch,) = given(with_rewards=False)
    expected = []
    for row in (0, 2, 4, 1, 3, 5):
        expected.append(batch["responses"][row][batch["response_attention_mask"][row].bool()].tolist())
    assert [written_of(rollout, row).tolist() for row in range(6)] == expected and service.drawn == 0
    assert rollout.column("rewards")[:, 0].tolist() == even_share([], expected, [])
    assert rollout.column("group").tolist() == [0, 0, 0, 1, 1, 1]
    (ledger,) = check_ledgers(tmp_path / "judged")
    assert ledger["sampled"] == ledger["trained"] == 28

    # The same, with rewards: a rollout of them teaches what the batch does that is learned from as it is.
    _, (through_rollout,) = train("grpo", tmp_path / "a", train_loader=given())
    _, (as_it_is,) = train("grpo", tmp_path / "b", train_loader=given(), reward_func=None)
    for name in ("loss", "grad_norm", "reward", "reward_std", "frac_reward_zero_std", "ratio"):
        assert through_rollout[name] == pytest.approx(as_it_is[name], abs=1e-6), name
    assert not (tmp_path / "b" / "rollouts").exists()


@pytest.mark.parametrize("sums", [False, True])
def test_older_log_probs_that_are_given_are_used(sums: bool, tmp_path: Path) -> None:
    """Of tokens, or summed over completions; whether a rollout is made of them or not."""
    (batch,) = given()
    noise = torch.Generator().manual_seed(5)
    old = -3 - torch.rand(6, 5, generator=noise)
    if sums:
        old = (old * batch["response_attention_mask"]).sum(1)
    batch["old_logprobs"] = old
    _, (through_rollout,) = train("grpo", tmp_path / "a", train_loader=[batch])
    _, (as_it_is,) = train("grpo", tmp_path / "b", train_loader=[batch], reward_func=None)
    assert as_it_is["ratio"] != pytest.approx(1, abs=0.01)
    for name in ("loss", "grad_norm", "ratio", "clip_ratio/region_mean"):
        assert through_rollout[name] == pytest.approx(as_it_is[name], abs=1e-6), name


# Rollouts of another run.


@BOTH
def test_rollouts_of_another_run_teach_the_same_in_several_passes(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2}
    options |= {"grpo_steps": 2, "rows_per_update": 4, "kl_coef": 0.1} if name == "grpo" else {"kl_target": 0.1}
    first, seen = train(name, tmp_path / "first", **options)
    learner, again = train(
        name, tmp_path / "second", reward_func=None, rollouts=str(tmp_path / "first" / "rollouts"), **options
    )
    assert len(seen) == len(again) == 2 * 3 * 2 * (2 if name == "grpo" else 1)
    for key, value in first.base_model.state_dict().items():
        assert torch.equal(value, learner.base_model.state_dict()[key])
    assert not (tmp_path / "second" / "rollouts").exists()


def test_an_older_policy_is_corrected_for(tmp_path: Path) -> None:
    """The rollouts of a policy, learned from by another one; by hand: w of each token, truncated."""
    train("grpo", tmp_path / "old", max_steps=1)
    (rollout,) = rollouts_of(tmp_path / "old")
    model = tiny(seed=3)
    weights, ratios = [], []
    for row in range(len(rollout)):
        ids = torch.from_numpy(rollout.store["input_ids"][row].astype(np.int64))[None]
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
        wrote = np.asarray(rollout.store["trained"][row])[1:]
        w = np.exp(logprobs - rollout.store["sampled_logprobs"][row][1:])[wrote]
        weights += np.minimum(w, 1.25).tolist()
        ratios += (w > 1.25).tolist()
    options: dict[str, Any] = {"off_policy_correction": "truncate", "off_policy_cap": 1.25, "reward_func": None}
    _, (seen,) = train(
        "grpo", tmp_path / "new", model, rollouts=str(tmp_path / "old" / "rollouts"), max_steps=1, **options
    )
    assert seen["sampling/importance_weight"] == pytest.approx(np.mean(weights), rel=1e-4)
    assert seen["sampling/corrected_share"] == pytest.approx(np.mean(ratios)) and any(ratios)
    w = np.array(weights)
    assert seen["sampling/effective_sample_size"] == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-4)


def test_another_policy_learns_from_stored_rollouts(tmp_path: Path) -> None:
    """In several passes only if they say what their policy made of them; their numbers are not this one's mistake."""
    train("grpo", tmp_path / "once", max_steps=1)
    train("grpo", tmp_path / "twice", max_steps=1, grpo_steps=2, kl_coef=0.1)
    options: dict[str, Any] = {"reward_func": None, "grpo_steps": 2, "max_steps": 2, "kl_coef": 0.1}
    stored = tmp_path / "twice" / "rollouts"
    _, seen = train("grpo", tmp_path / "new", tiny(seed=3), rollouts=str(stored), **options)
    assert abs(seen[0]["ratio"] - 1) > 0.005
    with pytest.raises(ValueError, match=r"00000000 has no old_logprobs; .*grpo_steps, rows_per_update"):
        train("grpo", tmp_path / "a", rollouts=str(tmp_path / "once" / "rollouts"), **options)
    with pytest.raises(ValueError, match="has no returns and no values; expected .* the same algorithm"):
        train("ppo", tmp_path / "b", rollouts=str(stored), reward_func=None)
    with pytest.raises(ValueError, match=r"has the id \d+, and the model knows 12 ids; .* the same tokenizer"):
        train("grpo", tmp_path / "c", tiny(vocab_size=12), rollouts=str(stored), **options)
    once: dict[str, Any] = {"rollouts": str(tmp_path / "once" / "rollouts"), "reward_func": None, "max_steps": 1}
    with pytest.raises(ValueError, match="nothing judges .* of the validation data; .* or no such data"):
        train("grpo", tmp_path / "e", val_loader=prompts(), **once)
    _, seen = train("grpo", tmp_path / "d", tiny(seed=3), **once)
    assert seen[0]["sampling/sampling_logp_difference/mean"] > 0.1
    with pytest.raises(ValueError, match="as they were drawn .* expected at most 0.05"):
        train("grpo", tmp_path / "e", tiny(seed=3), max_logp_difference=0.05, **once)


# What one sees.


def test_metrics_are_what_their_names_say(tmp_path: Path) -> None:
    """Of the second of two passes, by hand: the policy has moved, what is compared with has not."""
    weights: list[dict[str, Tensor]] = []

    def keep(run: Any) -> None:
        weights.append({name: value.clone() for name, value in run.trainer.base_model.state_dict().items()})

    options: dict[str, Any] = {"grpo_steps": 2, "kl_coef": 0.1, "clip_eps": 0.02, "max_steps": 2}
    options |= {"hooks": [Hook("keep", keep, every_steps=1)]}
    model = tiny()
    options["optimizer"] = configure_optimizer(model=model, lr=2e-2)
    _, (first, second) = train("grpo", tmp_path, model, **options)
    (rollout,) = rollouts_of(tmp_path)
    rewards, groups = rollout.column("rewards")[:, 0], rollout.column("group")
    lengths = np.array([len(written_of(rollout, row)) for row in range(8)])
    level = [len(set(rewards[groups == group])) == 1 for group in (0, 1)]
    expected = {
        "reward": rewards.mean(),
        "reward_std": rewards.std(ddof=1),
        "frac_reward_zero_std": np.mean(level),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/clipped_ratio": (rollout.column("finish") == 1).mean(),
        "rewards/failed": 0,
        "ratio": 1,
        "kl": 0,
        "clip_ratio/region_mean": 0,
    }
    for name, value in expected.items():
        assert first[name] == pytest.approx(value, abs=1e-6), name

    moved = tiny()
    moved.load_state_dict(weights[0])
    now, before, entropies, advantages = [], [], [], []
    for row in range(8):
        ids = torch.from_numpy(rollout.store["input_ids"][row].astype(np.int64))[None]
        wrote = torch.from_numpy(np.array(rollout.store["trained"][row]))[1:]
        with torch.no_grad():
            at_all = [policy(ids).logits[0, :-1].log_softmax(-1) for policy in (moved, tiny())]
        of_ids = [scores.gather(1, ids[0, 1:, None])[:, 0][wrote] for scores in at_all]
        now.append(of_ids[0])
        before.append(of_ids[1])
        entropies.append(-(at_all[0].exp() * at_all[0]).sum(-1)[wrote])
        group = rewards[groups == groups[row]]
        advantage = (rewards[row] - group.mean()) / (group.std(ddof=1) + 1e-4)
        advantages.append(torch.full((int(wrote.sum()),), advantage))
    difference = torch.cat(now) - torch.cat(before)
    ratio, advantage = difference.exp(), torch.cat(advantages)
    low, high = (ratio < 0.98) & (advantage < 0), (ratio > 1.02) & (advantage > 0)
    moved_by = (
        (-difference).exp() + difference - 1
    ).mean()  # k3 of who wrote the tokens from another; both began equal
    assert low.any() and high.any()
    expected = {
        "ratio": ratio.mean(),
        "clip_ratio/low_mean": low.float().mean(),
        "clip_ratio/high_mean": high.float().mean(),
        "clip_ratio/region_mean": (low | high).float().mean(),
        "kl": moved_by,
        "entropy": torch.cat(entropies).mean(),
    }
    for name, value in expected.items():
        assert second[name] == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    for phase in ("sync", "generate", "reward", "score", "learn"):
        assert first[f"seconds/{phase}"] > 0, phase
        if phase != "sync":
            rate = lengths.sum() / first[f"seconds/{phase}"]
            counted = first[f"tokens_per_second/{phase}"]
            assert counted == pytest.approx(rate, rel=1e-3) if phase != "learn" else counted > 0, phase


def test_held_out_prompts_are_evaluated_by_pass_at_k(tmp_path: Path) -> None:
    """And the evaluation counts neither for nor against what is said of the training's rollouts."""
    counted: list[tuple[int, int]] = []

    def ends_in_even(prompts: Any, completions: Any, answers: Any) -> list[float]:
        passed = [float(ids[-1] % 2 == 0) for ids in completions]
        if len(completions) == 10:
            counted.append((int(sum(passed[:5])), int(sum(passed[5:]))))
        return passed

    _, seen = train(
        "grpo",
        tmp_path,
        reward_func=ends_in_even,
        reward_in_process=True,
        val_loader=prompts(count=2),
        eval_interval=1,
        max_steps=1,
        eval_samples=5,
    )
    values = seen[-1]
    ((first, second),) = counted
    for k in (1, 2, 4, 5):
        by_hand = 0.0
        for passed in (first, second):
            all_fail = 1.0
            for draw in range(k):
                all_fail *= max(0, 5 - passed - draw) / (5 - draw)
            by_hand += (1 - all_fail) / 2
        assert values[f"eval_pass@{k}"] == pytest.approx(by_hand), k
    assert values["eval_reward"] == pytest.approx(values["eval_pass@1"]) and "pass@1" not in values
    with pytest.raises(ValueError, match="eval_samples: got 5, but with temperature 0 .* expected 1, or a temperature"):
        train("grpo", tmp_path, eval_samples=5, sampling=Sampling(temperature=0.0))


def test_some_completions_are_printed_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train("grpo", tmp_path, shown_completions=3, max_steps=2)
    said = capsys.readouterr().out.splitlines()
    first = said.index("rollout 00000000: 3 of 8 completions, from the best to the worst")
    (rollout, _) = rollouts_of(tmp_path)
    rewards = rollout.column("rewards")[:, 0]
    best, worst = f"{rewards.max():.4g}", f"{rewards.min():.4g}"
    assert said[first + 1].startswith(f"  reward {best}: '[") and said[first + 3].startswith(f"  reward {worst}: '[")
    row = int(np.argmax(rewards))
    assert said[first + 1].endswith(f"-> '{written_of(rollout, row).tolist()}'")
    assert "rollout 00000001: 3 of 8" in "\n".join(said)
