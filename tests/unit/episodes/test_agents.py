"""Agents that were written elsewhere: the chat protocol in front of a policy, and what a session records."""

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import talks
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.rollouts import FINISHES
from llm_trainer.episodes.endpoint import ChatEndpoint, Session
from llm_trainer.episodes.playing import Limits
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from policies import rollouts_of, tiny, train

MODEL = {"vocab_size": talks.VOCABULARY, "max_position_embeddings": 256}


def ask(base_url: str, messages: list[Any], **options: Any) -> Any:
    """The answer of a server to a request; an error as its text."""
    data = json.dumps({"model": "any", "messages": messages, **options}).encode()
    request = urllib.request.Request(f"{base_url}/chat/completions", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"]


def counting(base_url: str, row: Any) -> Any:
    """An agent: three turns in one conversation, one in another; a point for every 7."""
    if row["level"] == 5:
        raise KeyError("level")
    talk = [{"role": "user", "content": f"hi {row['level']}"}]
    points = 0
    for turn in range(3):
        answer = ask(base_url, talk)
        if isinstance(answer, tuple):
            return points
        message = answer["choices"][0]["message"]
        points += message["content"].count("7")
        talk += [{"role": "assistant", "content": message["content"]}, {"role": "user", "content": str(turn)}]
    ask(base_url, [{"role": "system", "content": "as"}, {"role": "user", "content": "rate"}])
    return points


def train_agent(folder: Path, agent: Any, made: Any, **options: Any) -> dict[str, float]:
    """What is seen of one step of GRPO on two rows, the second of level 5, that an agent plays."""
    _, [seen] = train(
        "grpo",
        folder,
        tiny(**MODEL),
        train_loader=[{"level": [3, 5]}],
        reward_func=None,
        agent=agent,
        max_failed_rewards=1.0,
        tokenizer=made,
        stop_token_ids=None,
        gen_suppress_tokens=talks.suppressed(made),
        **options,
    )
    return seen


@pytest.mark.parametrize("in_process", [False, True])
def test_an_agent_trains_by_its_base_url(in_process: bool, tmp_path: Path) -> None:
    made = talks.tokenizer()
    seen = train_agent(tmp_path, counting, made, environment_in_process=in_process, gen_max_seq_len=60)
    rollout, chat = rollouts_of(tmp_path)[0], ChatFormat(made)
    last, of_row = rollout.episodes()
    assert len(last) == 8 and len(rollout) > 8  # the other conversation is a row of its own
    assert seen["rewards/failed"] == 0.5 and seen["episodes/failed/raised"] == 0.5
    for row in np.flatnonzero(rollout.column("group") == 0):
        ids, trained = rollout.store["input_ids"][row], rollout.store["trained"][row]
        begin = [{"role": "user", "content": "hi 3"}]
        if row and of_row[row] == of_row[row - 1]:
            begin = [{"role": "system", "content": "as"}, {"role": "user", "content": "rate"}]
        prompt = chat.encode_prompt(begin)
        assert ids[: len(prompt)].tolist() == prompt and trained[len(prompt)] and not trained[: len(prompt)].any()
        assert ((rollout.store["sampled_logprobs"][row] != 0) == trained).all()
        if len(begin) == 1 and rollout.column("finish")[row] == FINISHES.index("stop"):
            own = [made.decode([token]) for token in ids[np.asarray(trained)]]
            assert rollout.column("rewards")[row, 0] == own.count("7")
    assert "KeyError: 'level'" in rollout.facts(int(last[-1]))["errors"]["agent"]
    assert seen["sampling/sampling_logp_difference/max"] < 1e-4


def test_the_protocol(tmp_path: Path) -> None:
    """Waiting requests are one batch; a conversation that goes on is appended to, another one begins anew."""
    made, model = talks.tokenizer(), tiny(**MODEL)
    service, sizes = InProcess(model, torch.float32), []
    service.load(model.state_dict().items(), version=4)
    decoding = Decoding(max_new_tokens=8, seed=1, stop_token_ids=[talks.STOP], suppress_tokens=talks.suppressed(made))

    def generate(requests: Any) -> Any:
        sizes.append(len(requests))
        return service.generate(requests, decoding, lambda: False)

    limits, chat = Limits(3, 100, 256, ends_itself=False), ChatFormat(made)
    found: dict[str, Any] = {}

    def talk(name: str, url: str) -> None:
        messages: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        first = ask(url, messages, temperature=0.3)
        messages += [first["choices"][0]["message"], {"role": "user", "content": "more"}]
        found[name] = first, ask(url, messages), ask(url, messages[:1], max_tokens=1), ask(url, messages)

    with ChatEndpoint() as endpoint:
        threads = []
        for number, name in enumerate("ab"):
            endpoint.sessions[name] = Session(chat, [talks.STOP], limits, number)
            threads.append(threading.Thread(target=talk, args=(name, endpoint.base_url(name))))
            threads[-1].start()
        while endpoint._waiting.qsize() < 2:
            time.sleep(0.01)
        while any(thread.is_alive() for thread in threads):
            endpoint.answer(generate, 0.2)
        url = endpoint.base_url("a")
        with urllib.request.urlopen(f"{url}/models") as answer:
            assert json.load(answer)["data"][0]["id"] == "policy"
        hi = [{"role": "user", "content": "hi"}]
        assert ask(url, hi, stream=True) == (400, "stream: answers come whole; expected stream: false")
        assert ask(url, hi, n=2)[0] == 400 and ask(url, [])[0] == 400 and ask(url, ["hi"])[0] == 400
        assert "there is no session under /sessions/c" in ask(endpoint.base_url("c"), hi)[1]
    assert sizes[0] == 2
    for name in "ab":
        first, second, short, refused = found[name]
        session = endpoint.sessions[name]
        assert first["usage"]["completion_tokens"] <= 8 and first["choices"][0]["finish_reason"] in ("stop", "length")
        assert refused == (400, f"the session is over: 3 turns, {session.num_written} tokens were written")
        assert short["usage"]["completion_tokens"] == 1
        assert len(session.segments) == 2 and all(version == (0, 4) for version in session.segments[0].versions[:1])
        appended = session.segments[0]
        assert made.decode(appended.ids).count("more") == 1 and not all(appended.trained)
        assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    # The noise of a session does not depend on the other one.
    alone = Session(chat, [talks.STOP], limits, 1)
    with ChatEndpoint() as endpoint:
        endpoint.sessions["b"] = alone
        thread = threading.Thread(target=talk, args=("alone", endpoint.base_url("b")))
        thread.start()
        while thread.is_alive():
            endpoint.answer(generate, 0.2)
    assert [one.ids for one in alone.segments] == [one.ids for one in session.segments]


def test_an_agent_that_never_returns_is_ended(tmp_path: Path) -> None:
    def sleeps(base_url: str, row: Any) -> Any:
        import time

        ask(base_url, [{"role": "user", "content": "hi"}])
        if row["level"] == 5:
            time.sleep(600)
        return 1.0

    seen = train_agent(tmp_path, sleeps, talks.tokenizer(), agent_seconds=4.0, num_samples_per_prompt=2)
    assert seen["episodes/failed/time"] == 0.5
    rollout = rollouts_of(tmp_path)[0]
    assert rollout.facts(2)["errors"] == {"agent": "agent sleeps did not return within 4 s and was ended"}
    assert rollout.column("rewards")[:2, 0].tolist() == [1, 1]
