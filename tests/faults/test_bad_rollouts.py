"""Mistakes in reinforcement learning: each is answered with what was found, where, what was expected and the fix."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from llm_trainer.disk import DiskError
from llm_trainer.models.rewarding import reward_model
from llm_trainer.rewards.functions import RewardFunctions
from llm_trainer.trainers.on_policy import OnPolicyTrainer
from policies import even_share, make, prompts, rollouts_of, tiny, train
from small_disk import SmallDisk, fill

Options = dict[str, Any]
GIVEN = {"prompts": torch.full((2, 4), 5), "responses": torch.full((2, 3), 7)}
MASKED = {
    "prompts": torch.full((4, 4), 5),
    "responses": torch.full((4, 3), 7),
    "response_attention_mask": torch.zeros(4, 3),
}


def ids(length: int, largest: int = 23) -> list[dict[str, torch.Tensor]]:
    """Two prompts."""
    return [{"prompts": torch.randint(3, largest + 1, (2, length), generator=torch.Generator().manual_seed(0))}]


def equal(prompts: Any, completions: Any, answers: Any) -> list[float]:
    return [1.0] * len(completions)


def _level_of_the_last(prompts: Any, completions: Any, answers: Any) -> list[float]:
    """Of the last two prompts all rewards are equal."""
    if answers[0] in ("4", "5"):
        return [1.0] * len(completions)
    return even_share(prompts, completions, answers)


def where_answered(prompts: Any, completions: Any, answers: Any) -> list[float | None]:
    shares = even_share(prompts, completions, answers)
    return [None if answer is None else share for answer, share in zip(answers, shares, strict=True)]


def fails(prompts: Any, completions: Any, answers: Any) -> list[float]:
    raise KeyError("level")


def nothing(prompts: Any, completions: Any, answers: Any) -> list[None]:
    return [None] * len(completions)


class Mistake(NamedTuple):
    """A mistake, and what the message says, in this order."""

    name: str
    says: tuple[str, ...]
    options: Callable[[], Options]
    trainers: tuple[str, ...] = ("grpo", "ppo")


STOPS = [
    Mistake(
        "prompt longer than the context",
        ("prompt 0 of a rollout has 40 tokens", "context is 32", "leave such rows out, set dataset_block_size to 24"),
        lambda: {"train_loader": ids(40)},
    ),
    Mistake(
        "limit longer than the context",
        (
            "has 40 tokens",
            "context is 32",
            "up to 64 (gen_max_seq_len)",
            "set gen_max_seq_len to less than the context",
        ),
        lambda: {"train_loader": ids(40), "gen_max_seq_len": 64},
    ),
    Mistake(
        "empty prompt",
        ("prompt 0 of a rollout has no token", "expected at least one", "leave such rows out", "prompt_attention_mask"),
        lambda: {"train_loader": [{"prompts": torch.ones(2, 4).long(), "prompt_attention_mask": torch.zeros(2, 4)}]},
    ),
    Mistake(
        "ids that the model does not know",
        ("prompt 0 of a rollout has the id", "the model knows 24 ids", "its own tokenizer"),
        lambda: {"train_loader": ids(4, largest=90)},
    ),
    Mistake(
        "an id below 0",
        ("prompt 0 of a rollout has the id -1", "the model knows 24 ids"),
        lambda: {"train_loader": [{"prompts": torch.tensor([[4, -1], [4, 5]])}]},
    ),
    Mistake(
        "prompts that are not padded",
        ("prompts: found no table of ids", "expected integers [B, L]", "prompt_attention_mask"),
        lambda: {"train_loader": [{"prompts": [[4, 5, 6], [7, 8]]}]},
    ),
    Mistake(
        "prompts that are no ids",
        ("prompts: found torch.float32 of the shape (2, 4)", "expected integers [B, L]"),
        lambda: {"train_loader": [{"prompts": torch.rand(2, 4)}]},
    ),
    Mistake(
        "a prompt that is no row",
        ("prompts: found torch.int64 of the shape (4,)", "a row of ids for each prompt"),
        lambda: {"train_loader": [{"prompts": torch.tensor([4, 5, 6, 7])}]},
    ),
    Mistake(
        "nothing judges",
        ("nothing judges completions", "expected a reward_func (or reward_model), or rollouts"),
        lambda: {"reward_func": None},
    ),
    Mistake(
        "a weight that is no number",
        ("reward weights: got [nan] for even_share, expected finite numbers",),
        lambda: {"reward_weights": [float("nan")]},
    ),
    Mistake(
        "weights beside functions that have some",
        ("reward_weights: got [2.0]", "expected RewardFunctions(..., weights=[2.0])"),
        lambda: {"reward_weights": [2.0], "reward_func": RewardFunctions(even_share, in_process=True)},
    ),
    Mistake(
        "limits beside functions that have some",
        ("reward_seconds: got 9.0", "expected RewardFunctions(..., seconds=9.0)"),
        lambda: {"reward_seconds": 9.0, "reward_func": RewardFunctions(even_share, in_process=True)},
    ),
    Mistake(
        "weights beside functions by name",
        ("reward_weights: got [2.0]", "expected rewards: [{name: ..., weight: 0.5}"),
        lambda: {"reward_weights": [2.0], "reward_func": None, "rewards": ["exact_match"]},
    ),
    Mistake(
        "weights of a reward model alone",
        ("reward_weights: got [2.0]", "no reward function that they could be of"),
        lambda: {"reward_weights": [2.0], "reward_func": None, "reward_model": reward_model(tiny(seed=1))},
    ),
    Mistake(
        "suppressed ids that the model does not know",
        ("gen_suppress_tokens: found the id 99", "0 to 23", "tokenizer"),
        lambda: {"gen_suppress_tokens": [3, 99]},
    ),
    Mistake(
        "everything is suppressed",
        ("gen_suppress_tokens: found all 24 ids", "expected some"),
        lambda: {"gen_suppress_tokens": [*range(24)]},
    ),
    Mistake(
        "an end that the model does not know",
        ("stop_token_ids: found the id 99", "0 to 23"),
        lambda: {"stop_token_ids": [99]},
    ),
    Mistake(
        "a judge of another tokenizer",
        ("reward_model knows 20 tokens, the policy 24", "expected a model with the policy's tokenizer"),
        lambda: {"reward_model": reward_model(tiny(vocab_size=20))},
    ),
    Mistake(
        "a critic of another tokenizer",
        ("value_model knows 20 tokens, the policy 24", "expected a critic with the policy's tokenizer"),
        lambda: {"value_model": reward_model(tiny(vocab_size=20))},
        ("ppo",),
    ),
    Mistake(
        "a reference of another tokenizer",
        ("ref_model knows 20 tokens, the policy 24", "expected a model with the policy's tokenizer"),
        lambda: {"kl_coef": 0.1, "ref_model": tiny(vocab_size=20)},
        ("grpo",),
    ),
    Mistake(
        "a group of one",
        (
            "group_size: got 1",
            "compares a completion with the others",
            "expected at least 2, or advantage: reinforce++",
        ),
        lambda: {"num_samples_per_prompt": 1},
        ("grpo", "rloo"),
    ),
    Mistake(
        "groups of one that are drawn again",
        ("max_resamplings: got 1", "group_size 1", "expected 0, or a group_size of at least 2"),
        lambda: {"max_resamplings": 1},
        ("reinforce",),
    ),
    Mistake(
        "an unknown loss",
        ("loss_type: got 'grop', expected one of grpo, bnpo, dr_grpo",),
        lambda: {"loss_type": "grop"},
        ("grpo",),
    ),
    Mistake(
        "no reward applies",
        ("no completion of rollout 00000000 has a reward", "expected functions that give numbers"),
        lambda: {"reward_func": nothing},
    ),
    Mistake(
        "no answers in the data",
        ("no completion of rollout 00000000 has a reward", "have no reference answer", "data_loader_config.columns"),
        lambda: {"reward_func": nothing, "train_loader": ids(4)},
    ),
    Mistake(
        "log-probs of another length",
        ("old_logprobs: found the shape (1, 2)", "(1, 3)", "Cut and pad both alike"),
        lambda: {"train_loader": [GIVEN | {"old_logprobs": torch.zeros(2, 2)}]},
    ),
    Mistake(
        "log-probs that are no numbers",
        ("old_logprobs: found nan", "expected its log-probability, a finite number of at most 0"),
        lambda: {"train_loader": [GIVEN | {"old_logprobs": torch.full((2, 3), torch.nan)}]},
    ),
    Mistake(
        "probabilities for log-probs",
        ("old_logprobs: found 0.5", "expected its log-probability, a finite number of at most 0"),
        lambda: {"train_loader": [GIVEN | {"old_logprobs": torch.full((2,), 0.5)}]},
    ),
    Mistake(
        "responses that the model does not know",
        ("responses: found the id 99, and the model knows the ids 0 to 23", "its own tokenizer"),
        lambda: {"train_loader": [GIVEN | {"responses": torch.full((2, 3), 99)}]},
    ),
    Mistake(
        "responses with rewards that the model does not know",
        ("responses: found the id 99, and the model knows the ids 0 to 23", "its own tokenizer"),
        lambda: {
            "reward_func": None,
            "train_loader": [GIVEN | {"responses": torch.full((2, 3), 99), "rewards": torch.ones(2)}],
        },
        ("grpo",),
    ),
    Mistake(
        "rewards for other functions",
        ("rewards: found 2 for a response that is given", "expected 1"),
        lambda: {"train_loader": [GIVEN | {"rewards": torch.zeros(2, 2)}]},
    ),
    Mistake(
        "sums of log-probs",
        ("old_logprobs: found sums over completions", "expected [B, L]"),
        lambda: {"train_loader": [GIVEN | {"old_logprobs": torch.zeros(2), "rewards": torch.rand(2)}]},
        ("ppo",),
    ),
    Mistake(
        "drawn from what does not learn",
        ("gen_repetition_penalty: got 1.2", "set off_policy_correction to truncate or mask, or leave it at 1"),
        lambda: {"gen_repetition_penalty": 1.2},
    ),
    Mistake(
        "updates that do not divide a rollout",
        ("rows_per_update: got 3, which does not divide the 8 completions of a rollout", "Expected a divisor, or null"),
        lambda: {"rows_per_update": 3},
        ("grpo", "rloo"),
    ),
    Mistake(
        "updates of PPO that do not divide a rollout",
        ("ppo_batch_size: got 3, which does not divide the 4 completions of a rollout", "Expected a divisor, or null"),
        lambda: {"ppo_batch_size": 3},
        ("ppo",),
    ),
    Mistake(
        "no completions",
        ("group_size: got 0", "expected an integer of at least 1"),
        lambda: {"num_samples_per_prompt": 0},
        ("grpo",),
    ),
    Mistake(
        "a reward function by name",
        ("reward function: got the name 'exact_match'", "rewards: [exact_match]"),
        lambda: {"reward_func": "exact_match"},
    ),
    Mistake(
        "a reward function that is none",
        ("reward function int: got a int, expected a function f(prompts, completions, answers)",),
        lambda: {"reward_func": 3},
    ),
    Mistake(
        "an end that is no list",
        ("stop_token_ids: got 2, expected a list of token ids",),
        lambda: {"stop_token_ids": 2},
    ),
    Mistake(
        "an end by its text",
        ("stop_token_ids: got ['</s>'], expected a list of token ids",),
        lambda: {"stop_token_ids": ["</s>"]},
    ),
    Mistake(
        "a batch without a row",
        ("prompts: found (0, 4), a batch without a row", "expected at least one prompt"),
        lambda: {"train_loader": [{"prompts": torch.zeros(0, 4).long()}]},
    ),
    Mistake(
        "responses that are no ids",
        ("responses: found torch.float32 of the shape (1, 3)", "expected integers, the ids of tokens"),
        lambda: {"train_loader": [GIVEN | {"responses": torch.rand(2, 3)}]},
    ),
    Mistake(
        "rewards that are no numbers",
        ("rewards: found no numbers", "expected a tensor, or lists of one length"),
        lambda: {"train_loader": [GIVEN | {"rewards": ["good", "bad"]}]},
    ),
    Mistake(
        "rewards that are infinite",
        ("rewards: found an infinite one beside a response", "expected finite numbers, NaN where there is none"),
        lambda: {"train_loader": [GIVEN | {"rewards": torch.tensor([1.0, torch.inf])}]},
    ),
    Mistake(
        "rewards that are all missing",
        (
            "no completion of rollout 00000000 has a reward",
            "expected numbers as the rewards of responses that are given",
        ),
        lambda: {"train_loader": [GIVEN | {"rewards": torch.full((2,), torch.nan)}]},
    ),
    Mistake(
        "a correction of a sequence without its floor",
        ("off_policy_floor: got 2", "below 1"),
        lambda: {"off_policy_correction": "mask", "off_policy_floor": 2.0},
    ),
]
CASES = [pytest.param(case, name, id=f"{name}: {case.name}") for case in STOPS for name in case.trainers]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_the_message_says_what_where_and_how_to_mend_it(case: Mistake, name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as stop:
        make(name, tmp_path, **case.options()).train()
    message, position = str(stop.value), 0
    for part in case.says:
        assert part in message[position:], message
        position = message.index(part, position)
    assert not rollouts_of(tmp_path)


# Runs that would end well, and have learned nothing.


class Vain(NamedTuple):
    """A run that learns nothing, what the message says, in this order, and how many rollouts it made."""

    name: str
    says: tuple[str, ...]
    options: Options
    rollouts: int = 3
    trainers: tuple[str, ...] = ("grpo", "ppo")


VAIN = [
    Vain(
        "all responses are masked",
        (
            "nothing was learned: all of the run (1 rollout) gave no update",
            "rollout 00000000 (4 completions of 1 prompt; all rewards 0), left out because: nothing was written (4)",
            "response_attention_mask is 1 on them",
        ),
        {"train_loader": [MASKED]},
        rollouts=1,
    ),
    Vain(
        "rewards that stay equal however often groups are drawn",
        (
            "nothing was learned: all of the run (3 rollouts) gave no update",
            "rollout 00000002 (8 completions of 2 prompts; all rewards 1, every group drawn up to 3 times)",
            "all rewards of its group are equal (8)",
            "easier or harder prompts",
        ),
        {"reward_func": equal, "max_resamplings": 2},
        trainers=("grpo", "rloo"),
    ),
    Vain(
        "a reward function that fails, in a run too short to be stopped for that",
        (
            "nothing was learned: all of the run (1 rollout) gave no update",
            "no rewards, 4 errors, the first: reward function 'fails' raised KeyError: 'level'",
            "left out because: no reward (4)",
            "look at what the reward functions give",
        ),
        {"reward_func": fails, "max_steps": 1, "train_loader": prompts(2, 1)[:1], "max_failed_rewards": 1.0},
        rollouts=1,
        trainers=("grpo",),
    ),
    Vain(
        "the same for ever",
        (
            "nothing was learned: the first 10 rollouts gave no update",
            "rollout 00000009 (8 completions of 2 prompts; all rewards 1",
        ),
        {"reward_func": equal, "max_resamplings": 1, "max_epochs": 40},
        rollouts=10,
        trainers=("grpo",),
    ),
    Vain(
        "no completion ends, and such ones are masked",
        ("nothing was learned in", "nothing in their rows counts in the loss", "overlong: mask"),
        {"overlong": "mask", "stop_token_ids": []},
    ),
    Vain(
        "responses with their rewards are masked",
        ("nothing was learned in 2 steps: nothing in their rows counts", "response_attention_mask"),
        {"reward_func": None, "train_loader": [MASKED | {"rewards": torch.rand(4)}] * 2},
        rollouts=0,
        trainers=("grpo",),
    ),
]
CASES = [pytest.param(case, name, id=f"{name}: {case.name}") for case in VAIN for name in case.trainers]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_a_run_that_has_learned_nothing_ends_with_the_reason(case: Vain, name: str, tmp_path: Path) -> None:
    """The rollouts are there to be looked at, none of them made twice; no model is published."""
    with pytest.raises(ValueError) as stop:
        train(name, tmp_path, **({"reward_in_process": True} | case.options))
    message, position = str(stop.value), 0
    for part in case.says:
        assert part in message[position:], message
        position = message.index(part, position)
    assert len(rollouts_of(tmp_path)) == case.rollouts
    assert not list(tmp_path.glob("rollouts/set-aside-*")) and not (tmp_path / "model").exists()


def test_rollouts_that_gave_no_update_are_not_made_again(tmp_path: Path) -> None:
    """Those at the end of an epoch count, though no step followed them; a run that goes on from there makes the same ones."""
    how: Options = {"reward_in_process": True, "max_resamplings": 1, "save_interval": 1, "prompts_per_part": 2}
    trainer, seen = train("grpo", tmp_path / "level", max_epochs=2, reward_func=_level_of_the_last, **how)
    assert len(seen) == 4 and trainer.run.progress.rollout == 6
    assert len(rollouts_of(tmp_path / "level")) == 6 and not list((tmp_path / "level" / "rollouts").glob("set-aside-*"))
    first, _ = train("grpo", tmp_path / "cut", reward_func=_level_of_the_last, **how)
    assert first.run.progress.rollout == 3
    again, seen = train("grpo", tmp_path / "cut", max_epochs=2, resume="auto", reward_func=_level_of_the_last, **how)
    assert len(seen) == 2 and not list((tmp_path / "cut" / "rollouts").glob("set-aside-*"))
    for name, value in trainer.base_model.state_dict().items():
        assert torch.equal(value, again.base_model.state_dict()[name])


SAYS = [  # the run goes on
    Mistake(
        "rewards that are equal for ever",
        ("in 3 rollouts in a row the rewards of", "were equal", "easier or harder prompts"),
        lambda: {"reward_func": equal},
    ),
    Mistake(
        "functions by name, and one that is passed",
        ("rewards of the section are not called: a reward_func is passed",),
        lambda: {"rewards": ["exact_match"]},
    ),
    Mistake(
        "rewards that are equal in a short run",
        (
            "the gradient of 3 steps, all of the run, was 0",
            "rewards are all equal teach nothing",
            "frac_reward_zero_std",
        ),
        lambda: {"reward_func": equal},
        ("grpo", "rloo"),
    ),
    Mistake(
        "held-out prompts without answers",
        ("in the evaluation no completion of rollout 00000000 has a reward", "2 of 2 have no reference answer"),
        lambda: {"reward_func": where_answered, "val_loader": ids(4)},
        ("grpo", "ppo"),
    ),
    Mistake(
        "one of several functions that applies to nothing",
        ("in 3 rollouts in a row the reward where_answered applied to no completion", "columns: {answer: ...}"),
        lambda: {"reward_func": [where_answered, even_share], "train_loader": ids(4) * 3},
        ("grpo", "ppo"),
    ),
    Mistake(
        "a model that never stops",
        ("in 3 rollouts in a row no completion ended before gen_max_seq_len", "stop tokens"),
        lambda: {"stop_token_ids": []},
    ),
    Mistake(
        "no stop token",
        ("no token is known that ends a completion", "8 tokens (gen_max_seq_len)", "Pass stop_token_ids"),
        lambda: {"stop_token_ids": None},
    ),
    Mistake(
        "no stop token is ever drawn",
        ("gen_suppress_tokens has all tokens that end a completion (2)", "8 tokens (gen_max_seq_len)"),
        lambda: {"gen_suppress_tokens": [2, 5]},
    ),
    Mistake(
        "prompts that leave little room",
        ("a prompt of 30 tokens leaves 2 of the model's context of 32", "cut there", "set dataset_block_size to 24"),
        lambda: {"train_loader": ids(30)},
    ),
]
CASES = [pytest.param(case, name, id=f"{name}: {case.name}") for case in SAYS for name in case.trainers]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_what_teaches_nothing_is_said_once(
    case: Mistake, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llm_trainer.trainers.on_policy.PATIENCE", 3)
    make(name, tmp_path, **case.options()).train()
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING: " in line]
    about = [line for line in said if case.says[0] in line]
    assert len(about) == 1, said
    assert re.search(".*".join(map(re.escape, case.says)), about[0]), about


# Stored rollouts.


def test_rollouts_that_cannot_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder of a run is as good as its folder rollouts; what is missing or damaged in it is named."""
    train("grpo", tmp_path / "run")
    options: Options = {"reward_func": None, "rollouts": str(tmp_path / "run")}
    _, seen = train("grpo", tmp_path / "again", **options)
    assert len(seen) == 3 and "WARNING" not in capsys.readouterr().out
    train("grpo", tmp_path / "judged", **(options | {"reward_func": equal}))
    said = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert len(said) == 1 and "was rewarded by even_share" in said[0] and "equal of this run will judge eval" in said[0]
    shutil.rmtree(tmp_path / "run" / "rollouts" / "00000000")
    with pytest.raises(ValueError, match=r"found no .*00000000; expected .* kept all of them \(keep_rollouts: true\)"):
        train("grpo", tmp_path / "a", **options)
    (tmp_path / "run" / "rollouts" / "00000001").rename(tmp_path / "run" / "rollouts" / "00000000")
    column = tmp_path / "run" / "rollouts" / "00000000" / "advantages.values.npy"
    column.write_bytes(column.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"00000000: damaged, advantages.values.npy has .* expected it as it was writ"):
        train("grpo", tmp_path / "b", **options)


@pytest.mark.parametrize("phase", ["make", "finish"])
def test_a_disk_that_fills_up_while_a_rollout_is_written(
    phase: str, small_disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message that says where and what to do; with space again the run goes on, and is the same."""
    disk = small_disk(8 << 20)
    whole, _ = train("grpo", tmp_path / "whole")
    calls: list[int] = []
    judge = OnPolicyTrainer._judged

    def fill_at_the_second(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            fill(disk)
        return judge(*arguments)

    def filling(prompts: Any, completions: Any, answers: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            fill(disk)
        return even_share(prompts, completions, answers)

    options: Options = {"resume": "auto", "log_dir": str(tmp_path / "log")}
    if phase == "finish":
        monkeypatch.setattr(OnPolicyTrainer, "_judged", fill_at_the_second)
    else:
        options |= {"reward_func": filling, "reward_in_process": True}
    with pytest.raises((DiskError, OSError), match=r"rollouts/00000001[^']*' could not be saved: No space left"):
        train("grpo", disk / "run", **options)
    os.remove(disk / "filler")
    again, seen = train("grpo", disk / "run", **(options | {"reward_func": even_share}))
    assert seen and again.run.progress.step == 3
    for name, value in whole.base_model.state_dict().items():
        assert torch.equal(value, again.base_model.state_dict()[name])


# What must hold before the first update.


def noisy(model: Any) -> Any:
    """With what differs at each forward of training, as dropout does."""
    model.model.register_forward_hook(_shaken)
    return model


def _shaken(module: Any, inputs: Any, outputs: Any) -> None:
    if module.training:
        outputs.last_hidden_state.data += torch.randn_like(outputs.last_hidden_state) / 2


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_ratio_that_is_not_one_before_the_first_update(name: str, tmp_path: Path) -> None:
    several = {"grpo_steps": 2} if name == "grpo" else {}
    model = noisy(tiny())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"before the first update of a rollout and in it differ .* causes: dropout"):
        train(name, tmp_path, model, **several)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_a_reference_that_is_not_the_policy_before_the_first_update(name: str, tmp_path: Path) -> None:
    held = {"kl_coef": 0.1} if name == "grpo" else {"kl_beta": 0.1}
    model = tiny()
    trainer = make(name, tmp_path, model, **held)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter *= 3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"policy and reference, .* differ by .* if they are meant to differ, pass ref_m"
    ):
        trainer.train()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    other = tiny(seed=4)  # it is another model, and may be
    train(name, tmp_path / "other", ref_model=other, max_steps=1, **held)


def test_nothing_is_lost_by_a_mistake_in_the_middle(tmp_path: Path) -> None:
    """A prompt of the third rollout that is too long: what was made and learned before is there when it is mended."""
    wrong = [*prompts(count=4), *ids(40)]
    with pytest.raises(ValueError, match="prompt 0 of a rollout has 40 tokens"):
        train("grpo", tmp_path, train_loader=wrong, save_interval_steps=1, resume="auto")
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "rollouts").glob("0000000[01]/meta.json"))]
    trainer, _ = train("grpo", tmp_path, train_loader=[*prompts(count=4), *ids(8)], resume="auto")
    assert trainer.run.progress.step == 3 and trainer.run.progress.rollout == 3
    after = [path.stat().st_mtime_ns for path in sorted((tmp_path / "rollouts").glob("0000000[01]/meta.json"))]
    assert before == after and len(before) == 2
