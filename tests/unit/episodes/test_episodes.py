"""Episodes: the policy's ids are never encoded again, others' words are masked, and what fails costs its own episode."""

import json
import os
import signal
import time
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import talks
from llm_trainer.cli.rollouts import rollouts as show
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.options import Sampling
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.rollouts import FINISHES, Rollout
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Completion
from llm_trainer.rewards.functions import RewardError
from llm_trainer.train.signals import TrainingInterrupted
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
    shape = {key: options.pop(key) for key in ("max_position_embeddings",) if key in options}
    _, seen = train(name, folder, tiny(**MODEL | shape), **(given | options))
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


def test_the_ledger_has_the_words_of_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rollout, seen = play(tmp_path)
    said = sum(len(run) for row in range(len(rollout)) for own, run in turns_of(rollout, row) if not own)
    wrote = sum(int(trained.sum()) for trained in rollout.column("trained"))
    ledger = rollout.ledger
    assert ledger["environment"] == said > 0 and ledger["trained"] == wrote
    assert ledger["sampled"] == said + wrote and not ledger["masked"] and not ledger["dropped"]
    assert seen["episodes/turns"] > 1 and seen["rewards/environment"] == rollout.column("rewards").mean()
    show(tmp_path, None, "length", False, 1, None)
    text = capsys.readouterr().out
    assert f"tokens: {said + wrote} sampled = {wrote} trained + {said} said by others\n" in text
    assert "]]{{" in text and "}}[[" in text and "others said in {{ }}" in text and "an episode of 3 turns" in text


def test_evaluation_plays_episodes(tmp_path: Path) -> None:
    """Held-out rows are rewarded by the environment; prompts are answered in all turns."""
    play(
        tmp_path,
        val_loader=[{"level": [7, 9]}],
        eval_prompts=["hi"],
        eval_interval=1,
        sampling=Sampling(max_seq_len=40),
    )
    lines = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    [line] = [line for line in lines if "eval_reward" in line]
    assert line["eval_episodes/turns"] > 1 and line["eval_reward"] == line["eval_rewards/environment"]
    assert "\\nuser\\n1\\nassistant\\n" in (tmp_path / "log" / "gen.txt").read_text()


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
        environment_seconds=3.0,  # what exits is found out before, on a busy machine too
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


def test_sigterm_while_environments_answer(tmp_path: Path) -> None:
    """The run saves and goes on later with the part that was lost; what was made before is found again."""
    trainer, flag = os.getpid(), tmp_path / "was_here"

    class Terminates(talks.Counts):
        def step(self, message: Any) -> Any:
            if not flag.exists():
                flag.touch()
                os.kill(trainer, signal.SIGTERM)
                time.sleep(600)
            return super().step(message)

    options = {"environment": Terminates, "resume": "auto", "train_loader": [{"level": [3, 5]}] * 2}
    began = time.monotonic()
    with pytest.raises(TrainingInterrupted):
        play(tmp_path / "killed", **options)
    assert time.monotonic() - began < 10
    play(tmp_path / "killed", **options)
    play(tmp_path / "calm", **options)
    for found, expected in zip(rollouts_of(tmp_path / "killed"), rollouts_of(tmp_path / "calm"), strict=True):
        for name in ("input_ids", "trained", "rewards", "sampled_logprobs"):
            assert np.array_equal(found.store[name].values, expected.store[name].values)


def test_too_many_failures_stop_the_run_with_their_cause(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"8 of the last 8 episodes have failed.* KeyError: 'level' \(talks.py"):
        play(tmp_path, train_loader=[{"kind": ["no_start"] * 2}], environment=talks.Trouble)


def test_turns_tokens_and_context_end_an_episode(tmp_path: Path) -> None:
    """The policy is cut where it may write no more; it was its own doing, and is learned from."""
    rollout, seen = play(tmp_path / "tokens", gen_max_seq_len=3)
    for row in range(len(rollout)):
        written = int(rollout.store["trained"][row].sum())
        assert written <= 3 and (rollout.column("finish")[row] == FINISHES.index("stop")) <= (written == 3)
    assert seen["completions/clipped_ratio"] > 0.5 and seen["rewards/failed"] == 0
    rollout, seen = play(tmp_path / "context", max_position_embeddings=64)
    assert max(rollout.lengths) <= 64 and seen["completions/clipped_ratio"] == 1
    with pytest.raises(RewardError, match=r"begins with \d+ tokens, and the model's context is 16"):
        play(tmp_path / "start", max_position_embeddings=16)


def test_ppo_steps_over_what_others_say(tmp_path: Path) -> None:
    """Advantages and returns are those of the policy's tokens alone, as if nothing stood between them."""
    gamma, lam = 0.9, 0.8
    rollout, seen = play(
        tmp_path,
        "ppo",
        completions_per_prompt=2,
        gamma=gamma,
        lam=lam,
        kl_beta=0.0,
        whiten_advantages=False,
    )
    has_several = 0
    for row in range(len(rollout)):
        places = np.flatnonzero(rollout.store["trained"][row])
        has_several += int((np.diff(places) > 1).any())
        values = rollout.store["values"][row][places].astype(np.float64)
        advantage, following = 0.0, 0.0
        for at, place in reversed(list(enumerate(places))):
            reward = rollout.column("rewards")[row, 0] if at == len(places) - 1 else 0.0
            advantage = reward + gamma * following - values[at] + gamma * lam * advantage
            following = values[at]
            assert rollout.store["advantages"][row][place] == pytest.approx(advantage, abs=1e-5)
            assert rollout.store["returns"][row][place] == pytest.approx(advantage + values[at], abs=1e-5)
        others = np.setdiff1d(np.arange(rollout.lengths[row]), places)
        assert not rollout.store["advantages"][row][others].any()
    assert has_several and seen["episodes/turns"] > 1


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: one of them.
        b: the other.
    """
    return a + b


def shout(text: str) -> str:
    """Make a text loud.

    Args:
        text: what is to be loud.
    """
    raise ValueError(f"not {text}")


def test_tools_are_shown_called_and_answered(tmp_path: Path) -> None:
    """What the policy writes is scripted: the ids of a call, of one that fails, and of an answer."""
    made = talks.tokenizer()
    turns = [
        '<tool_call>{"name": "add", "arguments": {"a": 4, "b": 3}}</tool_call>',
        '<tool_call>{"name": "shout", "arguments": {"text": "hi"}}</tool_call><tool_call>{"name": "nothing"}</tool_call>',
        "<tool_call>add</tool_call>",
        "7",
    ]
    script = Script([[*made.encode(turn, add_special_tokens=False), talks.STOP] for turn in turns])

    def judged(prompts: Any, completions: Any, answers: Any) -> list[float]:
        return [float(text.endswith("7")) for text in completions]

    asked = [{"role": "user", "content": "add 4 to 3"}]
    rollout, seen = play(
        tmp_path,
        train_loader=[{"messages": [asked], "answer": ["7"]}],
        environment=None,
        tools=[add, shout],
        reward_func=judged,
        generation_service=script,
        max_logp_difference=1e9,
        gen_max_seq_len=400,
        gen_suppress_tokens=[],
        max_position_embeddings=4096,
        tokenizer=made,
    )
    shown = made.decode(rollout.store["input_ids"][0])
    assert "Add two numbers" in shown and shown.endswith("assistant\n7<|im_end|>")
    said = [made.decode(run).split("<|im_start|>tool\n")[1:] for own, run in turns_of(rollout, 0) if not own]
    answers = [[part.split("<|im_end|>")[0] for part in parts] for parts in said]
    assert answers[0] == ["7"]
    assert answers[1] == ["Error: ValueError: not hi", "Error: there is no tool nothing; the tools are add, shout"]
    assert answers[2][0].startswith("Error: the call is no JSON")
    assert seen["rewards/judged"] == 1 and seen["episodes/turns"] == 4
    assert "episode" in rollout.facts(0) and rollout.ledger["environment"] > 0


class Script(InProcess):
    """Writes what it is given, turn by turn, whatever it is asked."""

    def __init__(self, turns: list[list[int]]) -> None:
        super().__init__(tiny(**MODEL | {"max_position_embeddings": 4096}), torch.float32)
        self.turns = dict(zip(accumulate((len(turn) for turn in turns), initial=0), turns, strict=False))

    def generate(self, requests: Any, decoding: Any, stop: Any) -> Any:
        made = []
        for request in requests:
            ids = self.turns[request.first]  # as many as were written before
            made.append([Completion(ids, [-1.0] * len(ids), "stop", [(0, self.version)])] * request.samples)
        return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": int}, "environment: int has no reset and no step"),
        ({"environment": "talks:Nothing"}, "environment: talks:Nothing: talks has no function Nothing"),
        ({"environment": None, "tools": [max]}, "tools: max cannot be described to the model"),
        ({"environment": None, "tools": [add]}, "tools: nothing judges the episodes"),
        ({"tools": [add]}, "got environment and tools; expected one of them"),
        ({"tokenizer": None}, "a chat template makes ids of; expected tokenizer="),
    ],
)
def test_what_cannot_be_is_said_at_once(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        given = {"train_loader": [{"level": [1]}], "reward_func": None, "environment": talks.Counts}
        train("grpo", tmp_path, tiny(**MODEL), **({"tokenizer": talks.tokenizer()} | given | options))
