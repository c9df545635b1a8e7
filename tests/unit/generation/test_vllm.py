"""The same as `test_servers.py` with servers of vLLM: in LLM_TRAINER_VLLM_PYTHON, see `vllm_process.py`."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from decoding_models import build_moe, build_qwen3
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.link import Link, ServerError
from llm_trainer.generation.servers import Servers
from llm_trainer.generation.service import Interrupted, Request
from llm_trainer.generation.transports import Broadcast, Files
from llm_trainer.generation.verify import WrongWeights
from llm_trainer.generation.vllm_server import Vllm
from llm_trainer.train.hooks import Hook
from policies import make, rollouts_of
from rollout_server import Drops, FakeServer, Skips, Swaps, Truncates, Unannounced, moved, never, streamed, verified
from vllm_process import needs_vllm, started

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "faults"))
from victim import fork_life

pytestmark = [pytest.mark.slow, needs_vllm]
# vLLM's attention on CPUs has heads of 32 at least.
SHAPE = {
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
PLAIN = Decoding(max_new_tokens=12, seed=3, stop_token_ids=(5,))
REQUESTS = [Request([1, 2, 3 + row], row, 3) for row in range(6)]


@pytest.fixture(scope="module")
def first() -> nn.Module:
    """The model whose folder the server was started with."""
    return build_qwen3(**SHAPE)


@pytest.fixture
def model(first: nn.Module) -> nn.Module:
    return deepcopy(first)


@pytest.fixture(scope="module")
def server(first: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("policy")
    first.save_pretrained(folder)  # type: ignore[operator]
    with started(folder, "--worker-extension-cls", "vllm_faults.FaultyWorker") as url:
        yield url


def far(model: nn.Module, decoding: Decoding, prompt: Any, completion: Any, part: slice = slice(None)) -> float:
    """How far the log-probs of a completion, or of a part of it, are from a teacher-forced forward."""
    scores = InProcess(model).logprobs([[*prompt, *completion.ids]], decoding)[0][len(prompt) - 1 :]
    pairs = list(zip(scores, completion.logprobs, strict=True))[part]
    return max(abs(ours - theirs) for ours, theirs in pairs)


def test_a_server_that_was_started_anew_is_found(model: nn.Module, server: str) -> None:
    """First: nobody has sent it weights, so it is as after a start. The one before it at its address was another one."""
    with FakeServer(model) as before:
        service = verified(model, before.url)
        service.load(streamed(moved(model)), 1)
    servers = service.service
    assert isinstance(servers, Servers)
    servers.fleet.servers[0].ask = Vllm(Link(server, 60))
    with pytest.raises(WrongWeights, match="version -2; expected version 1"):
        service.generate(REQUESTS, PLAIN, never)
    service.load(streamed(model), 2)
    assert service.generate(REQUESTS, PLAIN, never)[0][0].versions == [(0, 2)]


@pytest.mark.parametrize("transport", [Files, lambda: Broadcast("gloo")], ids=["files", "group"])
def test_tokens_have_the_logprobs_of_a_teacher_forced_forward(
    model: nn.Module, server: str, transport: Callable[[], Any], record_property: Callable[[str, object], None]
) -> None:
    service = verified(model, server, transport=transport())
    seconds = []
    for version in range(20):
        moved(model, 0.02)
        began = time.monotonic()
        service.load(streamed(model), version)
        seconds.append(time.monotonic() - began)
    record_property("seconds_per_sync", sorted(seconds)[10])
    print(f"seconds per sync: {sorted(seconds)[10]:.3f}")
    changes: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"repetition_penalty": 1.3}]
    for change in [*changes, {"temperature": 0.7, "suppress_tokens": (7, 9)}]:
        decoding = Decoding(**{**vars(PLAIN), **change})
        drawn = service.generate(REQUESTS, decoding, never)
        again = service.generate(REQUESTS, decoding, never)
        assert [[one.ids for one in group] for group in drawn] == [[one.ids for one in group] for group in again]
        for request, group in zip(REQUESTS, drawn, strict=True):
            for completion in group:
                assert completion.versions == [(0, 19)]
                assert far(model, decoding, request.ids, completion) < 5e-6 / min(1.0, decoding.temperature or 1.0)


class KeepsCache(Vllm):
    """Keys and values of all versions are shared, and never forgotten: a pause would forget them too."""

    def pause(self) -> None: ...

    def draw(self, *asked: Any) -> Any:
        return super().draw(*asked[:-1], "always")

    def accept(self, label: str) -> None:
        self.link.ask("POST", "/update_weight_version", {"new_version": label})


class LeavesHead(Vllm):
    """The head stays as it was packed."""

    def finish_update(self) -> None:
        self._rpc("llm_trainer_leave_head_old")
        super().finish_update()
        self._rpc("llm_trainer_pack_again")


FAULTS: dict[str, tuple[Any, Any, str]] = {
    "update skipped": (Skips, None, "says that it has weights '.*-1', expected"),
    "tensor dropped": (Vllm, Drops, "'model.norm.weight' was sent as .* and is not there"),
    "file truncated": (Vllm, Truncates, "cannot be read here"),
    "head left old": (LeavesHead, None, "not what .* decodes with"),
    "tensors swapped": (Vllm, Swaps, "up_proj.weight' was sent as .* and is there as"),
    "version moved": (Unannounced, None, "says that it has weights '', expected"),
    "old prefix cache": (KeepsCache, None, "its prefix cache is old"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_weights_are_found_before_a_token_is_used(model: nn.Module, server: str, name: str) -> None:
    dialect, transport, message = FAULTS[name]
    service = verified(model, server, transport=Files())
    servers = service.service
    assert isinstance(servers, Servers)
    link = Link(server, 60)
    if name == "old prefix cache":  # what is kept from the first version on
        servers.fleet.servers[0].ask = dialect(link)
        with pytest.raises(WrongWeights, match=message):  # also that of the tests before
            for version in (1, 2):
                service.load(streamed(moved(model)), version)
        return
    service.load(streamed(moved(model)), 1)
    before = link.ask("GET", "/weight_info")
    servers.fleet.servers[0].ask = dialect(link)
    servers.transport = (transport or Files)()
    moved(model, 1e-4 if name in ("update skipped", "version moved") else 0.2)
    with pytest.raises((WrongWeights, ServerError), match=message):
        service.load(streamed(model), 2)
    if name != "head left old":
        assert link.ask("GET", "/weight_info") == before  # no version has moved
    with pytest.raises(WrongWeights, match="no weights that were verified"):
        service.generate(REQUESTS, PLAIN, never)


def test_weights_may_move_while_tokens_are_drawn(model: nn.Module, server: str) -> None:
    service = verified(model, server)
    service.load(streamed(model), 1)
    older = deepcopy(model)
    found: list[Any] = []
    decoding = Decoding(max_new_tokens=500, seed=3)

    def draw() -> None:
        found.extend(service.generate(REQUESTS, decoding, never))

    thread = threading.Thread(target=draw)
    thread.start()
    time.sleep(0.3)
    service.load(streamed(moved(model)), 2)
    thread.join(120)
    changed = [(request, one) for request, group in zip(REQUESTS, found, strict=True) for one in group]
    changed = [(request, one) for request, one in changed if len(one.versions) == 2]
    assert changed, "no completion was under way when the weights moved"
    for request, one in changed:
        (_, first), (start, second) = one.versions
        assert (first, second) == (1, 2)
        assert far(older, decoding, request.ids, one, slice(0, start)) < 1e-4
        assert far(model, decoding, request.ids, one, slice(start, None)) < 1e-4


def test_a_stop_ends_what_is_under_way(model: nn.Module, server: str) -> None:
    service = verified(model, server)
    service.load(streamed(model), 1)
    began = time.monotonic()
    with pytest.raises(Interrupted):
        service.generate(REQUESTS, Decoding(max_new_tokens=500), lambda: time.monotonic() - began > 0.3)
    assert time.monotonic() - began < 5
    assert len(service.generate(REQUESTS, PLAIN, never)) == 6


def test_a_killed_run_is_learned_again_from_its_rollouts(server: str, tmp_path: Path) -> None:
    def live(folder: str, url: str, dies: bool = False, **options: Any) -> int:
        def die(run: Any) -> None:
            if dies and run.progress.step == 2:
                os.kill(os.getpid(), signal.SIGKILL)

        def train() -> None:
            options["hooks"] = [Hook("die", die, every_steps=1)]
            model = build_qwen3(**SHAPE)
            make("grpo", tmp_path / folder, model, rollout_servers=[url], save_interval=1, **options).train()
            torch.save(model.state_dict(), tmp_path / folder / "end.pt")

        _, status = os.waitpid(fork_life(tmp_path / folder, train), 0)
        return os.waitstatus_to_exitcode(status)

    assert live("run", server, dies=True) == -signal.SIGKILL
    assert live("run", server) == 0  # goes on
    assert len(rollouts_of(tmp_path / "run")) == 3
    nowhere = "http://127.0.0.1:9"  # nothing is sampled, so nobody is asked
    assert live("again", nowhere, rollouts=str(tmp_path / "run/rollouts")) == 0
    ends = [torch.load(tmp_path / folder / "end.pt") for folder in ("run", "again")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_experts_take_new_weights(tmp_path: Path) -> None:
    """On CPUs vLLM packs those of a mixture of experts at the first load alone; a server of its own."""
    model = build_moe(**SHAPE, hidden_size=64, moe_intermediate_size=32)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    with started(tmp_path) as url:
        service = verified(model, url)
        for version in range(3):
            service.load(streamed(moved(model)), version)
            assert service.difference < 5e-6
        for request, group in zip(REQUESTS, service.generate(REQUESTS, PLAIN, never), strict=True):
            for completion in group:
                assert completion.versions == [(0, 2)] and far(model, PLAIN, request.ids, completion) < 5e-6
