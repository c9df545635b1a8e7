"""Weights that are not those that were sent are found before a token is drawn with them; right ones never raise an alarm."""

from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_trainer.config.model import ModelConfig
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Request
from llm_trainer.generation.verify import (
    LIMITS,
    Hashes,
    Verified,
    WrongWeights,
    check_probe,
    hashes_of,
    probe_ids,
)
from llm_trainer.generation.worker import llm_trainer_wire
from llm_trainer.models.build import build_model

FIRST_HASH = 15703696555441489980
GREEDY = Decoding(max_new_tokens=3, temperature=0)
REQUESTS = [Request([5, 6, 7], 0)]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
UP = "model.layers.0.mlp.up_proj.weight"
Weights = Iterable[tuple[str, Tensor]]


def small_model() -> nn.Module:
    """One layer, with a tied head."""
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    return build_model(shape).eval()


def hash_of(tensor: Tensor) -> int:
    hashes = Hashes()
    hashes.note("it", tensor)
    return hashes.read()["it"]


# The hash.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_every_bit_counts_at_its_place(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(5, 7) * 10).to(dtype)
    seen = {hash_of(tensor)}
    data = tensor.view(torch.uint8).flatten()
    for place in range(len(data)):
        for bit in range(8) if dtype is not torch.bool else (0,):
            changed = data.clone()
            changed[place] ^= 1 << bit
            seen.add(hash_of(changed.view(dtype).view(5, 7)))
    assert len(seen) == 1 + len(data) * (8 if dtype is not torch.bool else 1)
    assert hash_of(tensor.clone()) in seen


def test_order_shape_and_type_count_and_memory_does_not() -> None:
    tensor = torch.arange(70_000, dtype=torch.float32)
    swapped = tensor.clone()
    swapped[[3, 69_999]] = swapped[[69_999, 3]]
    others = [swapped, tensor.view(7, 10_000), tensor.view(torch.int32), tensor.roll(2), tensor[:-1], -tensor]
    assert len({hash_of(tensor), *map(hash_of, others)}) == 1 + len(others)
    assert hash_of(torch.zeros(3)) != hash_of(torch.zeros(4)) and hash_of(torch.zeros(3)) != hash_of(-torch.zeros(3))
    larger = torch.stack([tensor, -tensor], 1)
    assert hash_of(larger[:, 0]) == hash_of(tensor)  # strided
    assert hash_of(larger.flatten()[3:8]) == hash_of(larger.flatten()[3:8].clone())  # beginning anywhere
    assert hash_of(torch.tensor(7)) == hash_of(torch.tensor(7)) != hash_of(torch.tensor(8))


def test_processors_and_devices_find_the_same_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numpy does it for the one, torch for the others, each in blocks of its own size."""
    noise = torch.Generator().manual_seed(0)
    for length in (0, 1, 100, 1 << 14, 40_001):
        words = torch.randint(-(2**63), 2**63 - 1, (length,), generator=noise)
        expected = int(llm_trainer_wire._mixed_sum_of_words(words))
        assert llm_trainer_wire._mixed_sum_on_cpu(words.numpy()) == expected
        with monkeypatch.context() as patched:
            patched.setattr(llm_trainer_wire, "_AT_ONCE", 1 << 10)
            assert int(llm_trainer_wire._mixed_sum_of_words(words)) == expected
    first = torch.arange(3, dtype=torch.float64)  # as it always was: rollouts on the disk are found by it
    assert hash_of(first) == FIRST_HASH


def test_small_updates_of_many_numbers_never_cancel() -> None:
    """One unit in the last place, up or down, of numbers side by side: sums of the numbers alone would miss some."""
    tensor = torch.ones(64)
    seen = set()
    for number in range(500):
        bits = tensor.view(torch.int32).clone()
        first = number % 60
        bits[first : first + 4] += torch.tensor([1, -2, 1, number // 60])
        seen.add(hash_of(bits.view(torch.float32)))
    assert len(seen) == 500


# A sampler that is sent weights.


class Copied(InProcess):
    """A copy of a model, filled by what is sent."""

    def load(self, weights: Weights, version: int) -> None:
        own = self.model.state_dict()
        for name, tensor in weights:
            own[name].copy_(tensor)
        self.version = version


def streamed(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As an engine streams them: tied tensors once."""
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor.detach()


def scored(model: nn.Module) -> Callable[[list[list[int]]], list[list[float]]]:
    """Log-probabilities by the trained weights."""

    @torch.no_grad()
    def score(rows: list[list[int]]) -> list[list[float]]:
        ids = torch.tensor(rows)
        logprobs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return logprobs.gather(2, ids[:, 1:, None])[:, :, 0].tolist()

    return score


def updated(model: nn.Module, size: float = 1e-6) -> None:
    """A small optimizer step."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)


def with_service(kind: type[InProcess] = Copied) -> tuple[Any, Verified]:
    """A trained model, and a sampler of it that has been sent its weights once."""
    model = small_model()
    service = Verified(kind(deepcopy(model).eval()), scored(model), probe_ids(64), LIMITS[torch.float32])
    service.load(streamed(model), 0)
    updated(model)
    return model, service


def test_two_hundred_right_syncs_raise_no_alarm() -> None:
    model, service = with_service()
    largest = 0.0
    for version in range(1, 201):
        updated(model, 1e-3)
        service.load(streamed(model), version)
        largest = max(largest, service.difference)
        assert service.version == version
    assert largest < 1e-5 < LIMITS[torch.float32]  # nowhere near
    (completion,) = service.generate(REQUESTS, GREEDY, lambda: False)[0]
    assert completion.versions == [(0, 200)]


class Faulty(Copied):
    """A sampler with one fault, from its second weights on."""

    fault = ""

    def load(self, weights: Weights, version: int) -> None:
        if version == 0:
            return super().load(weights, version)
        own = self.model.state_dict()
        if self.fault == "the version moved without weights":
            self.version = version
            return None
        if self.fault == "an update was skipped":
            for _ in weights:
                pass
            self.version = version
            return None
        if self.fault == "the version stayed":
            super().load(weights, version)
            self.version = 0
            return None
        if self.fault == "the tied head was left old":
            self.model.lm_head.weight = nn.Parameter(own[HEAD].clone())
        if self.fault == "the tied head is not what is multiplied":  # as a packed one: nothing of it is seen
            old = own[HEAD] + 0.3 * torch.randn_like(own[HEAD])
            self.model.lm_head.forward = lambda hidden: hidden @ old.T
        received = dict(weights)
        if self.fault == "a tensor was dropped":
            received.pop(UP)
        if self.fault == "two tensors were swapped":
            other = UP.replace("up", "gate")
            received[UP], received[other] = received[other], received[UP]
        if self.fault == "half a tensor is old":
            received[UP] = torch.cat([received[UP][:8], own[UP][8:]])
        return super().load(received.items(), version)


FAULTS = {
    "an update was skipped": f"did not arrive in .*'{EMBEDDING}' was sent as [0-9a-f]{{16}}, and is there as [0-9a-f]{{16}}; .*"
    "; and 11 more",
    "the version moved without weights": "did not arrive in",
    "the version stayed": "were sent to the sampler of this process, which says that it has version 0; expected 1",
    "a tensor was dropped": f"did not arrive in the sampler of this process: '{UP}' was sent as",
    "two tensors were swapped": f"did not arrive in .*'{UP}' was sent as",
    "half a tensor is old": f"did not arrive in .*'{UP}' was sent as",
    "the tied head was left old": f"did not arrive in .*'{HEAD}' was not sent, and is there as .* none of the tensors sent",
    "the tied head is not what is multiplied": "version 1 are not what the sampler of this process decodes with: .* expected "
    "less than 0.0001",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_run_before_a_token_is_used(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, service = with_service(Faulty)
    drawn: list[int] = []
    monkeypatch.setattr(InProcess, "generate", lambda *args: drawn.append(1))
    monkeypatch.setattr(Faulty, "fault", fault)
    with pytest.raises(WrongWeights, match=FAULTS[fault]) as found:
        service.load(streamed(model), 1)
    assert "version 1" in str(found.value) and "None of its tokens were used" in str(found.value)
    assert service.version == -1
    with pytest.raises(WrongWeights, match="has no weights that were verified"):
        service.generate(REQUESTS, GREEDY, lambda: False)
    with pytest.raises(WrongWeights, match="has no weights that were verified"):
        service.logprobs([[1, 2]], GREEDY)
    assert not drawn


def test_without_a_fault_the_same_service_raises_no_alarm() -> None:
    model, service = with_service(Faulty)
    service.load(streamed(model), 1)
    assert service.version == 1


def test_a_sampler_that_was_started_anew_with_first_weights_is_found_by_its_tokens() -> None:
    model, service = with_service()
    service.load(streamed(model), 1)
    service.service.version = 7  # its weights may be anything now
    with pytest.raises(WrongWeights, match="from 0 on with version 7; expected version 1"):
        service.generate(REQUESTS, GREEDY, lambda: False)


def test_other_ranks_are_not_left_waiting_for_weights_that_a_sampler_does_not_take() -> None:
    """The weights are a collective: whoever stops going through them leaves the others in it."""
    model, service = with_service(Faulty)
    given: list[str] = []

    def noted() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in streamed(model):
            given.append(name)
            yield name, tensor

    Faulty.fault = "the version moved without weights"
    with pytest.raises(WrongWeights):
        service.load(noted(), 1)
    Faulty.fault = ""
    assert given == [name for name, _ in streamed(model)]


def test_a_sampler_that_keeps_bf16_rounds_within_its_limit() -> None:
    model = small_model()
    sampler = deepcopy(model).bfloat16()
    service = Verified(Copied(sampler), scored(model), probe_ids(64), LIMITS[torch.bfloat16])
    service.load(((name, tensor.bfloat16()) for name, tensor in streamed(model)), 0)
    assert LIMITS[torch.float32] < service.difference < LIMITS[torch.bfloat16] / 10


def test_a_probe_that_is_not_a_number_is_no_agreement() -> None:
    assert check_probe([[-1.0, -2.0]], [[-1.0, -2.002]], 3, "here", 0.01) == pytest.approx(0.001)
    with pytest.raises(WrongWeights, match="differ by nan"):
        check_probe([[-1.0, float("nan")]], [[-1.0, -2.0]], 3, "here", 0.01)
    with pytest.raises(WrongWeights, match=r"at most -1\.0000 by the trained weights and -9\.0000 by the sampler"):
        check_probe([[-1.0, -2.0]], [[-9.0, -2.0]], 3, "here", 0.01)


def test_probes_are_the_same_at_every_call_and_within_the_vocabulary() -> None:
    for size in (3, 512, 151_936):
        rows = probe_ids(size)
        assert rows == probe_ids(size) and all(0 <= token < size for row in rows for token in row)
        assert len({token for row in rows for token in row}) > min(size, 50) - 2
    assert [len(row) for row in probe_ids(512, 16)] == [15]  # a server's prompt leaves room for a token
    assert probe_ids(512, 4096) == probe_ids(512)


def test_hashes_of_a_model_name_tied_tensors_twice() -> None:
    found = hashes_of(small_model())
    assert found[HEAD] == found[EMBEDDING] != found[UP]
