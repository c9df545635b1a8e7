"""Models that judge the steps of a completion: where steps end on ids, and what GRPO and PPO learn from their scores."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_trainer.checkpoint import write_model
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.rewarding import StepJudge, label_of_right, load_judge, process_reward_model, reward_model
from llm_trainer.trainers.judging import StepEnds
from policies import STOP, make, rollouts_of, tiny, train


class Pieces:
    """A tokenizer whose ids are bytes that were made by hand."""

    def __init__(self, *pieces: bytes, special: tuple[int, ...] = ()) -> None:
        self.pieces, self.all_special_ids, self.pad_token_id = pieces, list(special), None
        self.eos_token_id, self.chat_template = None, None

    def save_pretrained(self, folder: str) -> None:
        """There are no files of it."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False, **_: Any) -> str:
        return b"".join(self.pieces[number] for number in ids).decode(errors="replace")


A, B, LINE, LINES, BLANK, IN_ONE, TWO, END = range(8)
HAND = Pieces(b"a", b"b", b"\n", b"\n\n", b" ", b".\n\nc", b".\n\nd\n\n", b"</s>", special=(END,))


@pytest.mark.parametrize(
    ("ids", "ends"),
    [
        ([A, LINES, B, LINES, END], [1, 3]),
        ([A, LINE, LINE, B, A, END], [2, 5]),  # a separator of two tokens; the rest ends with the completion
        ([A, LINES, B, LINE], [1, 3]),  # cut in the middle of a separator
        ([A, LINES, LINE], [1]),  # nothing but a part of one is left
        ([A, IN_ONE, LINES, END], [1, 2]),  # inside of a token, whose end is the next step
        ([A, IN_ONE], [1]),  # which is the last token of two steps, and is judged once
        ([A, IN_ONE, LINE, LINE, LINE, LINE, END], [1, 3]),  # separators alone end no step
        ([TWO, B], [0, 1]),  # two in one token
        ([LINES, BLANK, LINES, A, LINES], [4]),
        ([A, B, LINE, A, LINE], [4]),
        ([LINES, END], [1]),  # no text at all: one step
        ([END], [0]),
        ([A], [0]),
        ([], []),
    ],
)
def test_where_steps_end(ids: list[int], ends: list[int]) -> None:
    assert StepEnds("\n\n", HAND)(ids) == ends


def test_separators_of_parts_of_characters_and_of_special_tokens() -> None:
    letters = Pieces(b"a", b" \xd0", b"\xba\xd0", b"\xb8", b"\xd0", b"\xba", b"<step>", special=(6,))
    assert StepEnds(" ки", letters)([0, 1, 2, 3, 0, 4, 5, 0, 1, 2, 3]) == [3, 10]
    assert StepEnds("<step>", letters)([0, 6, 0, 0, 6]) == [1, 4]
    # A tokenizer that leaves out the space that a text begins with.
    stripped = Pieces(b"a", b" ")
    whole = stripped.decode
    stripped.decode = lambda ids, **how: whole(ids, **how).removeprefix(" ")  # type: ignore[method-assign]
    assert StepEnds("a ", stripped)([0, 0, 1, 0, 0, 1, 0]) == [2, 5, 6]


def test_every_cut_of_a_text_into_tokens_has_the_same_steps(reference_dir: Path) -> None:
    """A real tokenizer: a step ends at the first token with which the decoded text has the separator."""
    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    noise = np.random.default_rng(0)
    for separator in ("\n\n", "e", ". ", "ки"):
        parts = ["so it is", "one and one", "а тепло", "1 + 1 = 2.", separator, separator, separator]
        for _ in range(20):
            text = "".join(noise.choice(parts, 12))
            ids = tokenizer.encode(text, add_special_tokens=False)
            expected, taken = list[int](), 0
            for match in re.finditer(re.escape(separator), text):
                if text[taken : match.start()].strip():
                    had = [tokenizer.decode(ids[:count]).count(separator) for count in range(1, len(ids) + 1)]
                    number = text[: match.end()].count(separator)
                    expected.append(next(place for place, count in enumerate(had) if count >= number))
                taken = match.end()
            if text[taken:].strip() or not expected:
                expected.append(len(ids) - 1)
            assert StepEnds(separator, tokenizer)(ids) == sorted(set(expected)), text


class Scores(nn.Module):
    """A score for each token by its id, and none of its own for padding."""

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return (ids * 7 % 10 / 10.0).masked_fill(attention_mask == 0, torch.nan)


LETTERS = Pieces(*(bytes([97 + number]) for number in range(24)), special=(STOP,))
# Of ten ids one ends a step.
FEW: dict[str, Any] = {"tokenizer": LETTERS, "gen_suppress_tokens": [0, 1, *range(12, 24)], "gen_max_seq_len": 12}
STEPS: dict[str, Any] = {**FEW, "reward_func": None, "reward_model": Scores(), "reward_model_steps": "f"}


def of_steps(completion: str) -> list[float | None]:
    """What `Scores` says of the steps that end with an f (its id is 5), by hand."""
    ids = [ord(letter) - 97 for letter in completion]
    found, has_text = list[float | None](), False
    for number in ids:
        found.append(number * 7 % 10 / 10 if number == 5 and has_text else None)
        has_text = number != 5
    rest = completion.rstrip("c").rpartition("f")[2]  # c ends a completion
    if rest or all(value is None for value in found):
        found[-1] = ids[-1] * 7 % 10 / 10
    return found


def by_function(prompts: list[str], completions: list[str], answers: list[str]) -> list[list[float | None]]:
    return [of_steps(completion) for completion in completions]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}),
        ("grpo", {"loss_type": "dr_grpo", "grpo_steps": 2, "kl_coef": 0.1, "kl_in": "reward"}),
        ("reinforce", {}),
        ("ppo", {}),
        ("ppo", {"gamma": 0.9, "whiten_rewards": True}),
    ],
)
def test_scores_of_steps_are_learned_from_as_a_functions(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """The same curve as by a function that gives the same numbers to the same tokens."""
    _, by_model = train(name, tmp_path / "model", **STEPS, **options)
    _, others = train(name, tmp_path / "function", reward_func=by_function, **FEW, **options)
    assert len(by_model) == len(others) >= 3 and max(one["grad_norm"] for one in by_model) > 0.05
    for one, other in zip(by_model, others, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    counts = set()
    for rollout, other in zip(rollouts_of(tmp_path / "model"), rollouts_of(tmp_path / "function"), strict=True):
        own, theirs = rollout.token_rewards(), other.token_rewards()
        assert own is not None and theirs is not None and own[1].shape[1] == 0
        np.testing.assert_array_equal(rollout.store["input_ids"].values, other.store["input_ids"].values)
        np.testing.assert_allclose(np.concatenate(own[0]), np.concatenate(theirs[0]), atol=1e-6)
        np.testing.assert_allclose(rollout.store["advantages"].values, other.store["advantages"].values, atol=1e-5)
        means = [np.nanmean(values) for values in own[0]]
        np.testing.assert_allclose(rollout.column("model_reward"), means, atol=1e-6)
        counts |= {int((~np.isnan(values)).sum()) for values in own[0]}
    assert len(counts) > 1  # of steps
    means = [float(np.nanmean(values)) for values in rollouts_of(tmp_path / "model")[0].token_rewards()[0]]  # type: ignore[index]
    assert by_model[0]["rewards/model_reward"] == pytest.approx(np.mean(means), abs=1e-6)


def test_beside_a_function_of_whole_completions(tmp_path: Path) -> None:
    def length(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        return [-len(completion) / 10 for completion in completions]

    with_function = STEPS | {"reward_func": {"length": length}, "reward_weights": [0.5]}
    _, by_model = train("grpo", tmp_path / "model", **with_function)
    both = {"length": length, "steps": by_function}
    _, others = train("grpo", tmp_path / "function", reward_func=both, reward_weights=[0.5, 1.0], **FEW)
    for one, other in zip(by_model, others, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
    np.testing.assert_allclose(
        rollouts_of(tmp_path / "model")[2].store["advantages"].values,
        rollouts_of(tmp_path / "function")[2].store["advantages"].values,
        atol=1e-5,
    )


def test_of_kinds_that_compare_whole_completions_the_mean_counts(tmp_path: Path) -> None:
    def mean(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
        found = []
        for completion in completions:
            known = [value for value in of_steps(completion) if value is not None]
            found.append(sum(known) / len(known))
        return found

    train("rloo", tmp_path / "model", **STEPS, num_samples_per_prompt=4)
    train("rloo", tmp_path / "mean", reward_func=mean, **FEW, num_samples_per_prompt=4)
    for one, other in zip(rollouts_of(tmp_path / "model"), rollouts_of(tmp_path / "mean"), strict=True):
        np.testing.assert_allclose(one.store["advantages"].values, other.store["advantages"].values, atol=1e-5)


# Which number is taken.


def classifier(labels: dict[int, str] | None, **config: Any) -> Any:
    """A token classifier of transformers, with names of its labels or with as many as it has by itself."""
    from transformers import AutoModelForTokenClassification

    torch.manual_seed(3)
    own = tiny(seed=1).config
    own.id2label = labels
    if labels is None:
        own.num_labels = 2
    for name, value in config.items():
        setattr(own, name, value)
    return AutoModelForTokenClassification.from_config(own).eval()


@pytest.mark.parametrize(
    ("labels", "right"),
    [(None, 1), ({0: "LABEL_0", 1: "LABEL_1"}, 1), ({0: "Correct", 1: "incorrect"}, 0), ({0: "-", 1: "+"}, 1)],
)
def test_of_two_labels_the_probability_of_right(labels: Any, right: int) -> None:
    model = classifier(labels)
    ids, mask = torch.randint(0, 24, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        found = StepJudge(model)(ids, mask)
    torch.testing.assert_close(found, (logits[..., right].exp() / logits.exp().sum(-1)))
    assert logits.shape == (3, 6, 2) and found.std() > 0.01


def test_of_one_label_the_probability_or_the_number_itself() -> None:
    ids = torch.randint(0, 24, (2, 5))
    mask = torch.ones_like(ids)
    for kind, read in ((None, torch.sigmoid), ("regression", lambda value: value)):
        model = classifier({0: "score"}, problem_type=kind)
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits[..., 0]
            torch.testing.assert_close(StepJudge(model)(ids, mask), read(logits))


def test_a_folder_judges_the_steps_of_a_rollout(tmp_path: Path) -> None:
    from transformers import AutoModelForTokenClassification

    classifier({0: "wrong", 1: "right"}).save_pretrained(tmp_path / "judge")
    model = load_judge(tmp_path / "judge", judges_steps=True)
    train("grpo", tmp_path / "run", **(STEPS | {"reward_model": model}), max_steps=1)
    theirs = AutoModelForTokenClassification.from_pretrained(tmp_path / "judge").eval()
    rollout = rollouts_of(tmp_path / "run")[0]
    for row in range(len(rollout)):
        ids = torch.from_numpy(rollout.store["input_ids"][row].astype(np.int64))[None]
        begin = int(rollout.store["versions"][row][0])
        at = [begin + end for end in StepEnds("f", LETTERS)(ids[0, begin:].tolist())]
        with torch.no_grad():
            expected = theirs(ids).logits.softmax(-1)[0, :, 1].numpy()
        values = rollout.store["step_rewards"][row]
        assert np.flatnonzero(~np.isnan(values)).tolist() == at
        np.testing.assert_allclose(values[at], expected[at], atol=1e-5)


# What cannot be used.


def test_what_is_no_judge_of_steps_is_refused(tmp_path: Path) -> None:
    steps, whole = process_reward_model(tiny(), 0), reward_model(tiny())
    for model, options, said in (
        (
            whole,
            {},
            "reward_model_steps: a .*ForSequenceClassification judges whole completions, and no steps; expected",
        ),
        (None, {}, "reward_model_steps: got 'f', but there is no model that judges steps; expected reward_model_ch"),
        (steps, {"tokenizer": None}, "reward_model_steps: the text 'f' is looked for .* expected tokenizer"),
        (classifier({0: "a", 1: "b", 2: "c"}), {}, r"has 3 labels \(a, b, c\); expected one, .* or two"),
        (classifier({0: "a", 1: "b"}), {}, r"has 2 labels \(a, b\); expected one, .* default names LABEL_0"),
        (classifier({0: "yes", 1: "right"}), {}, r"has 2 labels \(yes, right\)"),
        (steps, {"reward_model_steps": ""}, "reward_model_steps"),
    ):
        with pytest.raises(ValueError, match=said):
            make("grpo", tmp_path, **(STEPS | {"reward_model": model} | options))
    with pytest.raises(ValueError, match="normalize_rewards: .* reward_model_steps.* whiten_rewards"):
        make("ppo", tmp_path, **STEPS, normalize_rewards=True)


class PerRow(nn.Module):
    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return ids.float().mean(1)


def test_a_module_that_gives_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got \[\d+\] for ids \[\d+, \d+\], expected one number for each token"):
        train("grpo", tmp_path, **(STEPS | {"reward_model": PerRow()}))


def test_folders_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    write_model(reward_model(tiny()), tmp_path / "whole")
    classifier({0: "a", 1: "b", 2: "c"}).save_pretrained(tmp_path / "three")
    classifier(None).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="reward_model_steps: a .*ForSequenceClassification judges whole completions"):
        load_judge(tmp_path / "whole", judges_steps=True)
    with pytest.raises(ValueError, match="ForTokenClassification judges the steps .* expected reward_model_steps"):
        load_judge(tmp_path / "two", judges_steps=False)
    with pytest.raises(ValueError, match="has 3 labels"):
        load_judge(tmp_path / "three", judges_steps=True)
    for name in ("three", "two", "whole"):
        (tmp_path / name / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has 3 labels"):
        load_judge(tmp_path / "three", judges_steps=True)
    assert label_of_right(["LABEL_0", "LABEL_1"]) == 1


def test_episodes_have_one_reward(tmp_path: Path) -> None:
    def add(a: int, b: int) -> int:
        """The sum.

        Args:
            a: one number.
            b: another one.
        """
        return a + b

    with pytest.raises(ValueError, match="reward_model_steps: got 'f', but an episode .* has one reward"):
        make("grpo", tmp_path, **STEPS, tools=[add])
