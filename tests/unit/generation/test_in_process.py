"""The service in this process: groups, rows that enter and leave, versions, interruptions."""

import pytest
import torch

from decoding_models import MODELS, PROMPTS, build_qwen3
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Interrupted, Request


def never() -> bool:
    return False


@pytest.mark.parametrize("name", MODELS)
def test_rows_enter_and_leave_and_nobody_notices(name: str) -> None:
    """Groups of different sizes and lengths through few rows give what each sample alone gives."""
    model = MODELS[name]()
    requests = [Request(prompt, 7 + number, samples=3 - number % 2) for number, prompt in enumerate(PROMPTS)]
    decoding = Decoding(max_new_tokens=8, seed=3, stop_token_ids=range(8), context_length=12)
    wide = InProcess(model).generate(requests, decoding, never)
    for num_rows in (1, 4):
        narrow = InProcess(model, max_rows=num_rows).generate(requests, decoding, never)
        assert [[one.ids for one in group] for group in narrow] == [[one.ids for one in group] for group in wide]
    assert [len(group) for group in wide] == [3, 2, 3, 2]
    assert len({len(one.ids) for group in wide for one in group}) > 3
    assert len({tuple(one.ids) for one in wide[0]}) > 1
    forced = Decoding(max_new_tokens=1)
    for request, group in zip(requests, wide, strict=True):
        exact = InProcess(model).logprobs([[*request.ids, *one.ids] for one in group], forced)
        for one, logprobs in zip(group, exact, strict=True):
            torch.testing.assert_close(one.logprobs, logprobs[len(request.ids) - 1 :], rtol=0, atol=1e-5)
        assert all((one.finish == "stop") == (one.ids[-1] < 8) for one in group)


def test_a_request_is_interrupted_between_tokens() -> None:
    asked = []

    def stop() -> bool:
        asked.append(True)
        return len(asked) == 3

    service = InProcess(build_qwen3())
    with pytest.raises(Interrupted):
        service.generate([Request([1, 2], 0)], Decoding(max_new_tokens=9, seed=0), stop)
    assert len(asked) == 3


def test_completions_carry_the_version_that_was_loaded() -> None:
    service = InProcess(build_qwen3())
    service.load([], version=5)
    [[completion]] = service.generate([Request([1, 2], 0)], Decoding(max_new_tokens=2, seed=0), never)
    assert completion.versions == [(0, 5)] and service.version == 5


def test_a_stop_string_ends_a_row_after_the_token_that_completes_it() -> None:
    model = build_qwen3()

    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in ids)

    free = InProcess(model).generate([Request([1, 2], 0)], Decoding(max_new_tokens=20, seed=0), never)[0][0]
    text = decode(free.ids)
    decoding = Decoding(max_new_tokens=20, seed=0, stop_strings=[text[4:7]], decode=decode)
    [[stopped]] = InProcess(model).generate([Request([1, 2], 0)], decoding, never)
    assert stopped.finish == "stop" and decode(stopped.ids) == text[: text.index(text[4:7]) + 3]
    with pytest.raises(ValueError, match="decode is None"):
        Decoding(max_new_tokens=1, stop_strings=["x"])


def weights_of(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return list(model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_decodes_with_the_weights_that_were_loaded_last(name: str) -> None:
    model = MODELS[name]()
    requests = [Request(prompt, number, samples=2) for number, prompt in enumerate(PROMPTS)]
    decoding = Decoding(max_new_tokens=6, seed=3)
    service = InProcess(model, dtype=torch.float32)
    with pytest.raises(ValueError, match="holds no weights"):
        service.generate(requests, decoding, never)
    for version in (1, 2):
        service.load(weights_of(model), version)
        expected = InProcess(model).generate(requests, decoding, never)
        found = service.generate(requests, decoding, never)
        for ours, theirs in zip(found, expected, strict=True):
            assert [one.ids for one in ours] == [one.ids for one in theirs]
            torch.testing.assert_close(ours[0].logprobs, theirs[0].logprobs, rtol=0, atol=1e-5)
            assert ours[0].versions == [(0, version)]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    assert [one.ids for one in service.generate(requests, decoding, never)[0]] == [one.ids for one in found[0]]


def test_a_copy_without_an_embedding_of_its_own_head_and_in_bf16() -> None:
    model = build_qwen3(tie_word_embeddings=True)
    service = InProcess(model, dtype=torch.bfloat16)
    names = {name for name, _ in model.named_parameters()}
    assert "lm_head.weight" not in names
    service.load(((name, tensor) for name, tensor in weights_of(model) if name in names), 0)
    requests = [Request(prompt, number) for number, prompt in enumerate(PROMPTS)]
    made = service.generate(requests, Decoding(max_new_tokens=6, seed=0), never)
    for prompt, (completion,) in zip(PROMPTS, made, strict=True):
        exact = InProcess(model).logprobs([prompt + completion.ids], Decoding(max_new_tokens=1))[0][len(prompt) - 1 :]
        torch.testing.assert_close(completion.logprobs, exact, rtol=0, atol=0.5)
        assert exact != completion.logprobs


def test_a_copy_takes_all_weights_of_its_model_or_none() -> None:
    model = build_qwen3()
    service = InProcess(model, dtype=torch.float32)
    weights = weights_of(model)
    service.load(weights, 1)
    for broken, message in (
        (weights[:-1], r"1 tensors of the sampler's copy did not arrive, lm_head.weight"),
        ([*weights, ("more", torch.ones(1))], "more is no tensor"),
        (
            [(name, tensor[:-1]) for name, tensor in weights],
            r"arrived as \[39, 32\], the sampler's copy has \[40, 32\]",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            service.load(broken, 2)
        assert service.version == -1
        with pytest.raises(ValueError, match="load that failed"):
            service.generate([Request([1], 0)], Decoding(max_new_tokens=1), never)
    service.load(weights, 3)
    assert service.version == 3


def test_the_cache_bounds_the_rows() -> None:
    model = build_qwen3()
    requests = [Request([1, 2], 0, samples=6)]
    decoding = Decoding(max_new_tokens=6, seed=0)
    bytes_of_row = 8 * 2 * 2 * 2 * 8 * 4  # tokens, layers, keys and values, heads, width, float32
    free = InProcess(model).generate(requests, decoding, never)
    bounded = InProcess(model, max_cache_bytes=2 * bytes_of_row)
    seen = []
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append(len(inputs["input_ids"])), with_kwargs=True)
    assert [one.ids for one in bounded.generate(requests, decoding, never)[0]] == [one.ids for one in free[0]]
    assert max(seen) == 2
