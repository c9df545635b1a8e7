"""Rollout servers: whose tokens they are, which weights drew them, and what happens when one of them fails."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import deepcopy
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from decoding_models import build_qwen3
from llm_trainer.config.errors import ConfigError
from llm_trainer.data.rollouts import Rollout
from llm_trainer.generation import verify
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.link import Link, ServerError
from llm_trainer.generation.servers import Servers
from llm_trainer.generation.service import Completion, Interrupted, Request
from llm_trainer.generation.transports import Broadcast, Files
from llm_trainer.generation.verify import WrongWeights
from llm_trainer.train.hooks import Hook
from policies import make, prompts, rollouts_of, tiny, train
from rollout_server import (
    Drops,
    FakeServer,
    Skips,
    Swaps,
    Truncates,
    Unannounced,
    moved,
    never,
    streamed,
    verified,
)

PLAIN = Decoding(max_new_tokens=6, seed=3)
REQUESTS = [Request([1, 2, 3 + row], row, 4) for row in range(6)]


@pytest.fixture
def model() -> nn.Module:
    return build_qwen3(tie_word_embeddings=True)


@pytest.fixture
def start() -> Iterator[Callable[..., FakeServer]]:
    with ExitStack() as stack:
        yield lambda model, **options: stack.enter_context(FakeServer(model, **options))


def ids_of(groups: list[list[Completion]]) -> list[list[list[int]]]:
    return [[one.ids for one in group] for group in groups]


# What they draw.


@pytest.mark.parametrize("transport", [Files, lambda: Broadcast("gloo")], ids=["files", "group"])
def test_completions_have_the_logprobs_of_the_new_weights(
    model: nn.Module, start: Callable[..., FakeServer], transport: Callable[[], Any]
) -> None:
    one, other = start(model), start(model)
    alone = verified(moved(model), one.url)
    alone.load(streamed(model), 7)
    wanted = ids_of(alone.generate(REQUESTS, PLAIN, never))

    both = verified(moved(model, 0.0), one.url, other.url, transport=transport())
    for version in (1, 2):
        both.load(streamed(model), version)
    drawn = both.generate(REQUESTS, PLAIN, never)
    assert ids_of(drawn) == wanted  # whichever server drew them
    assert min(server.asked.count("/inference/v1/generate") for server in (one, other)) > 6  # the work is shared
    for request, group in zip(REQUESTS, drawn, strict=True):
        assert len({tuple(completion.ids) for completion in group}) > 1  # 4 samples, of a server that takes 3 at a time
        for completion in group:
            scores = InProcess(model).logprobs([[*request.ids, *completion.ids]], PLAIN)[0][len(request.ids) - 1 :]
            assert completion.logprobs == pytest.approx(scores, abs=1e-5)
            assert completion.versions == [(0, 2)] and completion.finish == "length"


def test_requests_name_their_noise(model: nn.Module, start: Callable[..., FakeServer]) -> None:
    service = verified(model, start(model).url)
    service.load(streamed(model), 0)
    (group,) = ids_of(service.generate([Request([1, 2], 5, 5)], PLAIN, never))
    (last,) = ids_of(service.generate([Request([1, 2], 5, 2, sample=3)], PLAIN, never))
    assert last == group[3:]
    ((short, *_),) = service.generate([Request([1, 2], 5, 5, most=2)], PLAIN, never)
    assert short.ids == group[0][:2] and short.finish == "length"
    (later,) = ids_of(service.generate([Request([1, 2], 5, 5, first=4)], PLAIN, never))
    assert later != group
    (greedy,) = ids_of(service.generate([Request([1, 2], 5, 2)], Decoding(max_new_tokens=6, temperature=0.0), never))
    assert greedy[0] == greedy[1]


def test_a_stop_string_cuts_what_was_drawn_after_it(model: nn.Module, start: Callable[..., FakeServer]) -> None:
    service = verified(model, start(model).url)
    service.load(streamed(model), 0)
    ((whole,),) = service.generate([Request([1, 2], 5)], PLAIN, never)

    def decode(ids: list[int]) -> str:
        return " ".join(f"<{token}>" for token in ids)

    after = decode(whole.ids[1:3])
    stops = Decoding(max_new_tokens=6, seed=3, stop_strings=(after,), decode=decode)
    ((cut,),) = service.generate([Request([1, 2], 5)], stops, never)
    assert (cut.ids, cut.logprobs, cut.finish) == (whole.ids[:3], whole.logprobs[:3], "stop")


def test_what_would_bias_a_ratio_is_refused(model: nn.Module, start: Callable[..., FakeServer]) -> None:
    plain = verified(model, start(model).url)
    plain.load(streamed(model), 0)
    cut = Decoding(max_new_tokens=6, seed=3, top_k=4, top_p=0.9)
    with pytest.raises(ValueError, match=r"top_k=4, top_p=0.9: .* do not say from which.*return-sampling-mask"):
        plain.generate(REQUESTS, cut, never)
    with pytest.raises(ValueError, match="score tokens under softmax"):
        plain.logprobs([[1, 2]], Decoding(max_new_tokens=1, temperature=0.5))

    says = verified(model, start(model, returns_kept=True).url)
    says.load(streamed(model), 0)
    ((one,),) = says.generate([Request([1, 2], 5)], cut, never)
    assert one.kept is not None and all(token in kept for token, kept in zip(one.ids, one.kept, strict=True))
    with pytest.raises(ValueError, match="processed_logprobs"):
        verified(model, start(model, is_processed=False).url).load(streamed(model), 0)


# Wrong weights: nothing that they drew is ever returned.


FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "update skipped": ({"dialect": Skips}, "", "says that it has weights '.*-1', expected"),
    "tensor dropped": ({"transport": Drops()}, "", "'model.norm.weight' was sent as .* and is not there"),
    "file truncated": ({"transport": Truncates()}, "", "cannot be read here"),
    "head left old": ({}, "head left old", "not what .* decodes with"),
    "tensors swapped": ({"transport": Swaps()}, "", "up_proj.weight' was sent as .* and is there as"),
    "version moved": ({"dialect": Unannounced}, "", "says that it has weights '.*-1', expected"),
    "old prefix cache": ({}, "old prefix cache", "its prefix cache is old"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_weights_are_found_before_a_token_is_used(
    model: nn.Module, start: Callable[..., FakeServer], name: str
) -> None:
    options, fault, message = FAULTS[name]
    server = start(model)
    service = verified(model, server.url)
    if name == "old prefix cache":  # what is kept from the first version on
        server.fault = fault
    service.load(streamed(model), 1)
    server.fault = fault
    for key, wrong in options.items():
        right = service.service
        assert isinstance(right, Servers)
        if key == "transport":
            right.transport = wrong
        else:
            right.fleet.servers[0].ask = wrong(Link(server.url, 10))
    moved(model, 1e-4 if "skipped" in name or "moved" in name else 0.2)  # below what a probe can see
    before = server.label
    with pytest.raises((WrongWeights, ServerError), match=message):
        service.load(streamed(model), 2)
    if fault == "":
        assert server.label == before  # no version has moved
    with pytest.raises(WrongWeights, match="no weights that were verified"):
        service.generate(REQUESTS, PLAIN, never)


def test_every_server_is_looked_at(model: nn.Module, start: Callable[..., FakeServer]) -> None:
    several = [start(model) for _ in range(4)]
    service = verified(model, *(server.url for server in several))
    service.load(streamed(model), 1)
    several[3].fault = "head left old"
    for right in several[:3]:
        right.seconds = 0.1  # the wrong one answers before the others
    message = f"not what rollout server {several[3].url} decodes with: .* by rollout server {several[0].url} and"
    with pytest.raises(WrongWeights, match=message):
        service.load(streamed(moved(model, 0.2)), 2)


def test_a_server_that_was_started_anew_is_found(model: nn.Module, start: Callable[..., FakeServer]) -> None:
    server = start(model)
    service = verified(model, server.url)
    service.load(streamed(moved(model)), 1)
    service.generate(REQUESTS, PLAIN, never)
    server.restart()
    with pytest.raises(WrongWeights, match="version -2; expected version 1"):
        service.generate(REQUESTS, PLAIN, never)
    service.load(streamed(model), 2)
    assert service.generate(REQUESTS, PLAIN, never)[0][0].versions == [(0, 2)]


def test_what_is_sent_is_hashed_once(
    model: nn.Module, start: Callable[..., FakeServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By whoever verifies it, for itself and for the servers."""
    noted: list[str] = []

    class Noting(verify.Hashes):
        def note(self, name: str, tensor: torch.Tensor) -> None:
            noted.append(name)
            super().note(name, tensor)

    monkeypatch.setattr(verify, "Hashes", Noting)
    service = verified(model, start(model).url)
    service.load(streamed(model), 0)
    assert noted == [name for name, _ in streamed(model)]


def test_two_runs_on_one_server_find_each_other(model: nn.Module, start: Callable[..., FakeServer]) -> None:
    server = start(model)
    one, other = verified(model, server.url), verified(model, server.url)
    one.load(streamed(model), 1)
    other.load(streamed(model), 1)
    with pytest.raises(WrongWeights, match="version -2"):
        one.generate(REQUESTS, PLAIN, never)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_right_syncs_raise_no_alarm(start: Callable[..., FakeServer], count: int) -> None:
    small = build_qwen3(tie_word_embeddings=True, num_hidden_layers=1)
    service = verified(small, start(small).url)
    for version in range(count):
        service.load(streamed(moved(small, 1e-3)), version)
    assert service.version == count - 1 and service.difference < 1e-5


# Servers that fail.


def test_a_server_that_dies_is_left_out_until_it_is_there_again(
    model: nn.Module, start: Callable[..., FakeServer]
) -> None:
    one, other = start(model), start(model)
    service = verified(model, one.url, other.url)
    said: list[str] = []
    servers = service.service
    assert isinstance(servers, Servers)
    servers.join(0, lambda value: [value], {}, said.append)
    service.load(streamed(model), 1)
    wanted = ids_of(service.generate(REQUESTS, PLAIN, never))
    other.fault = "dies"
    assert ids_of(service.generate(REQUESTS, PLAIN, never)) == wanted
    other.thread.join()
    assert len(said) == 1 and other.url in said[0]
    service.load(streamed(moved(model)), 2)  # without it
    other.fault = ""
    other.restart()
    other.open()
    service.load(streamed(model), 3)
    assert other.label == one.label
    one.close()
    other.close()
    with pytest.raises(ServerError, match="no rollout server is left: .*Start them again"):
        service.generate(REQUESTS, PLAIN, never)
    one.open()
    other.open()


def test_bad_servers_are_named_at_the_start(model: nn.Module, start: Callable[..., FakeServer]) -> None:
    server = start(model)
    gone = FakeServer(model)
    gone.close()
    with pytest.raises(ServerError, match=rf"do not answer: {gone.url}.*llm-trainer rollout-server"):
        verified(model, server.url, gone.url).load(streamed(model), 0)
    service = verified(model, server.url)
    servers = service.service
    assert isinstance(servers, Servers)
    servers.join(0, lambda value: [value], {"vocab_size": 41, "model_type": "qwen3"}, print)
    with pytest.raises(ValueError, match="its vocab_size is 40, expected 41"):
        service.load(streamed(model), 0)
    torn = start(model, is_torn=True)
    with pytest.raises(ValueError, match="weights of two versions"):
        verified(model, torn.url).load(streamed(model), 0)
    with pytest.raises(ValueError, match="expected an address such as"):
        Servers(["gpu-3:8000"])
    with pytest.raises(ValueError, match="none twice"):
        Servers([server.url, server.url + "/"])

    class Other(FakeServer):
        llm_trainer_facts = None  # type: ignore[assignment]

    with Other(model) as other, pytest.raises(ValueError, match="started by `llm-trainer rollout-server`"):
        verified(model, other.url).load(streamed(model), 0)


def test_an_update_that_broke_off_is_begun_anew(
    model: nn.Module, start: Callable[..., FakeServer], tmp_path: Path
) -> None:
    server = start(model)
    server.answer("/pause", {})
    server.answer("/start_weight_update", {})  # and the trainer was killed
    service = verified(model, server.url, transport=Files(tmp_path))
    service.load(streamed(model), 0)
    assert service.generate(REQUESTS, PLAIN, never)
    assert not list(tmp_path.iterdir())  # what weights took is given back


def test_a_stop_ends_what_is_under_way(model: nn.Module, start: Callable[..., FakeServer]) -> None:
    server = start(model)
    service = verified(model, server.url)
    service.load(streamed(model), 0)
    server.seconds = 8.0
    began = time.monotonic()
    with pytest.raises(Interrupted):
        service.generate(REQUESTS, PLAIN, lambda: time.monotonic() - began > 0.2)
    assert time.monotonic() - began < 5
    server.seconds = 0.0
    assert len(service.generate(REQUESTS, PLAIN, never)) == 6  # and nothing is left out


# Several processes.


def test_one_process_brings_weights_and_all_know_how_it_went(
    model: nn.Module, start: Callable[..., FakeServer]
) -> None:
    server = start(model)
    barrier = threading.Barrier(2, timeout=20)
    values: list[Any] = [None, None]
    ends: list[Any] = [None, None]

    def process(number: int) -> None:
        def gather(value: Any) -> list[Any]:
            values[number] = value
            barrier.wait()
            found = list(values)
            barrier.wait()
            return found

        service = Servers([server.url])
        service.join(number, gather, {}, print)
        service.load(iter(streamed(model)), 4)
        drawn = service.generate(REQUESTS[number : number + 1], PLAIN, never)
        server.options = {"is_torn": True}
        try:
            service.load(iter(streamed(model)), 5)
        except (ValueError, ServerError) as error:
            ends[number] = (drawn, service.version, str(error))

    threads = [threading.Thread(target=process, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert server.asked.count("/finish_weight_update") == 1
    for drawn, version, error in ends:
        assert drawn[0][0].versions == [(0, 4)] and version == -1 and "weights of two versions" in error


# A run.


def test_a_run_learns_from_servers_and_again_from_what_they_drew(
    start: Callable[..., FakeServer], tmp_path: Path
) -> None:
    server = start(tiny())
    first, _ = train("grpo", tmp_path / "first", rollout_servers=[server.url])
    assert [rollout.facts(0)["attempt"] for rollout in rollouts_of(tmp_path / "first")] == [0, 0, 0]
    asked = len(server.asked)
    again, _ = train(
        "grpo", tmp_path / "again", rollout_servers=[server.url], rollouts=str(tmp_path / "first/rollouts")
    )
    assert len(server.asked) == asked  # nothing is sampled
    for ours, theirs in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_remax_and_pass_at_k_through_servers(
    start: Callable[..., FakeServer], tmp_path: Path, max_staleness: int
) -> None:
    """In turns, and ahead with weights in flight: every row is what the weights that it names draw, or would draw greedily."""
    policy = tiny()
    server, of_step = start(policy), {0: deepcopy(policy)}

    def keep(run: Any) -> None:
        of_step[run.progress.step] = deepcopy(run.trainer.base_model)

    _, seen = train(
        "remax",
        tmp_path,
        policy,
        rollout_servers=[server.url],
        num_samples_per_prompt=2,
        rows_per_update=2,
        max_staleness=max_staleness,
        val_loader=prompts(count=2),
        eval_interval=1,
        eval_samples=4,
        pass_reward=0.5,
        hooks=[Hook("keep", keep, every_steps=1)],
    )

    # 1. what is learned from
    assert len(seen) == 6 and len(rollouts_of(tmp_path)) == 3
    for rollout in rollouts_of(tmp_path):
        step = rollout.store.meta["made_of"]["step"]
        assert rollout.is_greedy.tolist() == [False, False, True] * 2
        for row, is_greedy in enumerate(rollout.is_greedy):
            ids, first = rollout.store["input_ids"][row].tolist(), int(rollout.store["trained"][row].argmax())
            start_of, version = rollout.store["versions"][row].tolist()  # a server here ends what it has begun
            assert start_of == first and step - max_staleness <= version <= step
            inputs = torch.tensor([ids])
            with torch.no_grad():
                scores = of_step[version].eval()(inputs).logits[0, first - 1 : -1].log_softmax(-1)
            likeliest = scores.argmax(-1).tolist()
            if is_greedy:
                assert ids[first:] == likeliest
            else:
                drawn = scores.gather(-1, inputs[0, first:, None])[:, 0]
                assert rollout.store["sampled_logprobs"][row][first:] == pytest.approx(drawn.numpy(), abs=1e-5)

    # 2. what is held out
    evaluated = Rollout(tmp_path / "rollouts" / "evaluation" / "00000000")
    passed = (evaluated.column("rewards")[:, 0] >= 0.5).reshape(2, 4).sum(1)
    for k in (1, 2, 4):
        chance = 1 - sum(comb(4 - count, k) / comb(4, k) for count in passed.tolist()) / 2
        assert seen[-1][f"eval_pass@{k}"] == pytest.approx(chance)


def test_adapters_are_refused_by_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports
        policy = peft.get_peft_model(tiny(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    urls = ["http://127.0.0.1:9"]
    for service in ({"rollout_servers": urls}, {"generation_service": Servers(urls)}):
        with pytest.raises(ConfigError, match="the policy has adapters .* the process that trains then draws"):
            make("grpo", tmp_path, policy, **service)


def test_options_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weight_transport: got 'nccl', but there are no servers"):
        train("grpo", tmp_path, weight_transport="nccl")
    urls = ["http://127.0.0.1:9"]
    with pytest.raises(ConfigError, match="nccl writes no files"):
        train("grpo", tmp_path, rollout_servers=urls, weight_transport="nccl", weight_folder=str(tmp_path))
    with pytest.raises(ConfigError, match="two would draw completions"):
        train("grpo", tmp_path, rollout_servers=urls, generation_service=InProcess(tiny()))
