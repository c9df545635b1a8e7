"""Episodes: the policy's ids are never encoded again, others' words are masked, and what fails costs its own episode."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import talks
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.rollouts import FINISHES, Rollout
from policies import rollouts_of, tiny, train

MODEL = {"vocab_size": talks.VOCABULARY, "max_position_embeddings": 128}


def play(folder: Path, name: str = "grpo", **options: Any) -> tuple[Rollout, dict[str, float]]:
    """One rollout of episodes, and the metrics of learning from it."""
    made = options.pop("tokenizer", None) or talks.tokenizer()
    given = {
        "train_loader": [{"level": [3, 5]}],
        "reward_func": None,
        "environment": talks.Counts,
        "tokenizer": made,
        "stop_token_ids": None,
        "gen_max_seq_len": 40,
        "gen_suppress_tokens": talks.suppressed(made),
    }
    _, seen = train(name, folder, tiny(**MODEL), **(given | options))
    return rollouts_of(folder)[0], seen[0]


def turns_of(rollout: Rollout, row: int) -> list[tuple[bool, list[int]]]:
    """The tokens behind the prompt in runs, whether the policy wrote each run."""
    trained = np.asarray(rollout.store["trained"][row])
    start = int(trained.argmax())
    edges = [start, *(np.flatnonzero(np.diff(trained[start:])) + start + 1).tolist(), len(trained)]
    ids = rollout.store["input_ids"][row]
    return [(bool(trained[a]), ids[a:b].tolist()) for a, b in pairwise(edges)]


def test_ids_are_appended_masked_and_never_encoded_again(tmp_path: Path) -> None:
    rollout, seen = play(tmp_path)
    made = talks.tokenizer()
    chat, changed = ChatFormat(made), 0
    assert rollout.column("episode").tolist() == [0, 1, 2, 3] * 2
    for row in range(len(rollout)):
        level = 3 if row < 4 else 5
        ids, trained = rollout.store["input_ids"][row], rollout.store["trained"][row]
        prompt = chat.encode_prompt([{"role": "user", "content": f"hi {level}"}])
        assert ids[: len(prompt)].tolist() == prompt and not trained[: len(prompt)].any()
        runs = turns_of(rollout, row)
        assert [own for own, _ in runs] == [True, False, True, False, True][: len(runs)]
        texts, points = [], 0
        for number, (own, run) in enumerate(runs):
            text = made.decode(run)
            if own:
                texts.append(text.removesuffix("<|im_end|>"))
                points += text.count("7")
                changed += made.encode(text, add_special_tokens=False) != run
                assert all(made.convert_ids_to_tokens(token) in (*talks.WORDS, "<|im_end|>") for token in run)
            else:  # with the newline that the template prints behind the token which the policy ended its turn with
                assert text == f"\n<|im_start|>user\n{number // 2 + 1}<|im_end|>\n<|im_start|>assistant\n"
                assert made.encode(text, add_special_tokens=False) == run
        # The same text as the template makes of the messages.
        messages: list[Any] = [{"role": "user", "content": f"hi {level}"}]
        for number, text in enumerate(texts[:-1], start=1):
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": str(number)}]
        whole = made.decode(chat.encode_prompt(messages)) + texts[-1]
        assert made.decode(ids).removesuffix("<|im_end|>") == whole
        is_done = rollout.column("finish")[row] == FINISHES.index("stop")
        assert is_done == (len(texts) == 3 and ids[-1] == talks.STOP)
        assert (rollout.store["sampled_logprobs"][row] != 0).tolist() == trained.tolist()
        stepped = points if is_done else points - texts[-1].count("7")
        assert rollout.column("rewards")[row, 0] == stepped
    assert changed  # the policy wrote "h" and "i" where the tokenizer has a token for both
    assert seen["sampling/sampling_logp_difference/max"] < 1e-4 and seen["ratio"] == 1
    assert seen["completions/max_length"] <= 40


def test_the_ledger_has_the_words_of_the_environment(tmp_path: Path) -> None:
    rollout, seen = play(tmp_path)
    said = sum(len(run) for row in range(len(rollout)) for own, run in turns_of(rollout, row) if not own)
    wrote = sum(int(trained.sum()) for trained in rollout.column("trained"))
    ledger = rollout.ledger
    assert ledger["environment"] == said > 0 and ledger["trained"] == wrote
    assert ledger["sampled"] == said + wrote and not ledger["masked"] and not ledger["dropped"]
    assert seen["episodes/turns"] > 1 and seen["rewards/environment"] == rollout.column("rewards").mean()


def test_a_template_that_rewrites_earlier_turns_gives_rows_of_one_episode(tmp_path: Path) -> None:
    """Thinking that the template drops is in the row that wrote it, and in no later one."""
    made = talks.tokenizer(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('h')[-1] if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rollout, seen = play(tmp_path, tokenizer=made)
    last, of_row = rollout.episodes()
    assert len(last) == 8 < len(rollout)
    assert rollout.column("group")[last].tolist() == [0] * 4 + [1] * 4
    rewards, advantages = rollout.column("rewards")[:, 0], []
    for row in range(len(rollout)):
        start = int(np.asarray(rollout.store["trained"][row]).argmax())
        advantages.append(rollout.store["advantages"][row][start])
        if row and of_row[row - 1] == of_row[row]:  # what was rewritten is the prompt of this row
            shown = made.decode(rollout.store["input_ids"][row][:start])
            earlier = shown.split("assistant\n")[-2].split("<|im_end|>")[0]
            wrote = made.decode(turns_of(rollout, row - 1)[-1][1]).removesuffix("<|im_end|>")
            assert "h" in wrote and earlier == wrote.split("h")[-1]
    assert np.array_equal(rewards, rewards[last][of_row])
    assert np.array_equal(advantages, np.array(advantages)[last][of_row])
    # Compared with the other episodes of the group, not with their rows.
    totals = rewards[last].reshape(2, 4)
    expected = (totals - totals.mean(1, keepdims=True)) / (totals.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(np.array(advantages)[last].reshape(2, 4), expected, atol=1e-4)
    assert seen["reward"] == pytest.approx(totals.mean())


@pytest.mark.parametrize("in_process", [False, True])
def test_what_fails_costs_its_own_episode(in_process: bool, tmp_path: Path) -> None:
    kinds = ["fine", "no_start", "raises", "nan", "endless", "hangs", "exits"]
    if in_process:  # the others would end this process
        kinds = kinds[:5]
    rollout, seen = play(
        tmp_path,
        train_loader=[{"kind": kinds}],
        environment=talks.Trouble,
        environment_in_process=in_process,
        environment_seconds=1.0,
        max_failed_rewards=1.0,
        max_turns=3,
        gen_max_seq_len=90,
        num_samples_per_prompt=2,
        gen_suppress_tokens=talks.suppressed(talks.tokenizer(), "7"),
    )
    causes = {"no_start": "raised", "raises": "raised", "nan": "not_finite", "endless": "never_ended"}
    causes |= {"hangs": "time", "exits": "exited"}
    counted: dict[str, int] = {}
    for row in range(len(rollout)):
        kind, facts = kinds[rollout.column("group")[row]], rollout.facts(row)
        cause = facts["episode"].get("cause")
        is_cut = rollout.column("finish")[row] == FINISHES.index("length")
        assert is_cut or cause == causes.get(kind), (kind, facts)
        assert (cause is not None) == ("environment" in facts["errors"])
        assert np.isnan(rollout.column("rewards")[row, 0]) == (cause is not None)
        if cause is not None:
            counted[cause] = counted.get(cause, 0) + 1
            assert row not in rollout.used
    assert sum(counted.values()) >= len(kinds)  # hardly an episode is cut
    failed = {name.rpartition("/")[2]: value for name, value in seen.items() if name.startswith("episodes/failed/")}
    rows = len(rollout)
    assert failed == pytest.approx({cause: count / rows for cause, count in counted.items()})
    assert seen["rewards/failed"] == pytest.approx(sum(counted.values()) / rows)
    dropped = rollout.ledger["dropped"]
    assert list(dropped) == ["the completion failed"] and dropped["the completion failed"] > 0
