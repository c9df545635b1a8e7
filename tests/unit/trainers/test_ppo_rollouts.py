"""PPO from prompts to updates: rollouts are drawn, judged and scored; the run goes on bit for bit wherever it stops."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_trainer.data.rollouts import Rollout
from llm_trainer.models.rewarding import load_reward_model, reward_model
from llm_trainer.trainers.ppo import PPOTrainer
from policies import even_share, prompts, rollouts_of, tiny, train
from policies import make as run_of


def even_share_or_none(prompts: Any, completions: Any, answers: Any) -> list[float | None]:
    """The share of even tokens; a prompt that begins with an odd number of the first five has none."""
    shares: list[float | None] = []
    for prompt, share in zip(prompts, even_share(prompts, completions, answers), strict=True):
        shares.append(None if prompt[0] in (3, 5) else share)
    return shares


OPTIONS: dict[str, Any] = {
    "train_loader": prompts(count=12, size=4),
    "reward_func": even_share_or_none,
    "normalize_rewards": True,
    "kl_target": 0.1,
    "kl_horizon": 100.0,
    "missing_eos_penalty": 0.5,
}


def make(folder: Path, model: Any = None, **options: Any) -> PPOTrainer:
    trainer: PPOTrainer = run_of("ppo", folder, model, **(OPTIONS | options))
    return trainer


def state_of(trainer: PPOTrainer) -> dict[str, Any]:
    """Everything that goes on: weights of both, moments, statistics."""
    engine = trainer.run.engine
    moments = engine.optimizer_state()["state"]
    return {"weights": engine.weights(), "moments": moments, "followed": trainer.shaping.state_dict()}


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            assert_equal(found[name], expected[name])
    else:
        assert found == expected


def test_it_draws_judges_scores_and_learns(tmp_path: Path) -> None:
    trainer, seen = train("ppo", tmp_path, **OPTIONS)
    rollouts = rollouts_of(tmp_path)
    assert len(rollouts) == 3 and all(len(rollout) == 8 for rollout in rollouts)
    updates = sum(2 * -(-len(rollout.used) // 4) for rollout in rollouts)
    assert trainer.run.progress.step == updates == len(seen)
    first = seen[0]
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["policy/approxkl_avg"] == pytest.approx(0, abs=1e-6)
    assert first["objective/rlhf_reward"] == pytest.approx(first["reward"] + first["objective/non_score_reward"])
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)  # policy and reference begin equal
    assert {
        "reward",
        "val/explained_variance",
        "objective/kl_coef",
        "loss/value_avg",
        "policy/clipfrac_avg",
        "policy/entropy_avg",
        "val/clipfrac_avg",
        "completions/mean_length",
    } <= first.keys()

    # What each column is about: the critic and both policies as they were when the first rollout was made.
    fresh = make(tmp_path / "fresh")
    row = rollouts[0][int(rollouts[0].used[0])]
    ids, wrote = torch.from_numpy(row["input_ids"].astype(np.int64))[None], np.array(row["trained"])
    with torch.no_grad():
        logprobs = fresh.base_model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        critic: Any = fresh.critic
        before = critic.score(critic.base_model(ids).last_hidden_state)[0, :-1, 0]
    np.testing.assert_allclose(row["old_logprobs"][1:][wrote[1:]], logprobs[wrote[1:]], atol=1e-5)
    np.testing.assert_allclose(row["values"][1:][wrote[1:]], before[wrote[1:]], atol=1e-5)
    assert not row["values"][~wrote].any() and not row["advantages"][~wrote].any()


@pytest.mark.parametrize("stop", [3, 4])
def test_a_run_that_stops_between_two_updates_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """In the middle of a rollout and at its end; the critic, the moments of both and the statistics too."""
    whole = make(tmp_path / "whole")
    whole.train()
    make(tmp_path / "cut", max_steps=stop, save_interval_steps=1, max_epochs=1).train()
    # A rollout that was made after the checkpoint is found again.
    made = sorted((tmp_path / "cut" / "rollouts").glob("[0-9]" * 8))
    rest = make(tmp_path / "cut", resume="auto")
    rest.train()
    assert_equal(state_of(rest), state_of(whole))
    timed = ("seconds", "_per_s", "per_sec", "mfu", "time", "memory", "eta")
    for name, value in whole.run.values.items():
        if not any(word in name for word in timed):
            assert rest.run.values[name] == value, name
    assert [path for path in made if path.exists()] == made


def test_a_rollout_made_with_other_options_is_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that was made after the last checkpoint, whose advantages are those of another gamma."""
    make(tmp_path, max_steps=1).train()
    updates = 2 * -(-len(Rollout(tmp_path / "rollouts" / "00000000").used) // 4)
    saves: dict[str, Any] = {"save_interval_steps": 1, "checkpoints_to_keep": 20, "resume": "auto"}
    make(tmp_path, max_steps=updates + 1, **saves).train()
    shutil.rmtree(tmp_path / f"checkpoint-{updates + 1:08d}")
    make(tmp_path, max_steps=updates + 1, gamma=0.5, **saves).train()
    assert "00000001 was made with other settings (shaping)" in capsys.readouterr().out


def test_a_reward_model_judges_and_is_the_critic(tmp_path: Path) -> None:
    judge, critic = reward_model(tiny(seed=1)), reward_model(tiny(seed=1))
    trainer = make(tmp_path, reward_func=None, reward_model=judge, value_model=critic, max_steps=2)
    before = critic.score.weight.detach().clone()
    values = trainer.train()
    assert "rewards/model_reward" in values
    assert not torch.equal(before, critic.score.weight) and not any(p.requires_grad for p in judge.parameters())


def test_adapters_are_their_own_reference_and_critic(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import warnings

    def adapted() -> Any:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, about transformers
            return peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

    model = adapted()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = make(tmp_path, model, max_steps=8)
    values = trainer.train()
    now = dict(model.named_parameters())
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())
    assert trainer._acting.shares_body and values["objective/kl"] > 0

    # A checkpoint holds of the critic what it has alone, and goes on in other objects.
    folder = tmp_path / "checkpoint-00000008" / "critic"
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "shared.json"]
    assert (folder / "model.safetensors").stat().st_size < 1000
    rest = make(tmp_path, adapted(), max_steps=8, resume="auto")
    rest.train()
    assert_equal(state_of(rest), state_of(trainer))
    make(tmp_path, adapted(), max_steps=9, resume="auto").train()
    with pytest.raises(ValueError, match=r"critic: no model in it \(found model.safetensors, shared.json\)"):
        load_reward_model(folder)


def test_nothing_judges(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing judges completions: expected a reward_func"):
        make(tmp_path, reward_func=None)
