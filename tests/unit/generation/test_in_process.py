"""The service in this process: groups, rows that enter and leave, versions, interruptions."""

import copy
import warnings

import pytest
import torch
from torch import nn

from decoding_models import MODELS, PROMPTS, SIZES, build_qwen3
from llm_trainer.engine.out_of_memory import OutOfMemoryError
from llm_trainer.generation import slots
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Interrupted, Request
from llm_trainer.generation.verify import Hashes, WrongWeights, check_hashes
from llm_trainer.models.attention import BLOCKED_ARCHITECTURES


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


def test_a_completion_that_is_asked_for_in_pieces_is_the_same() -> None:
    """The noise of a token is that of its number in the completion, whichever request draws it, and beside whatever."""
    model, decoding = build_qwen3(), Decoding(max_new_tokens=8, seed=3)
    whole = InProcess(model).generate([Request([1, 2], 7, samples=3)], decoding, never)[0]
    requests = [Request([1, 2, *one.ids[:2]], 7, sample=number, first=2, most=3) for number, one in enumerate(whole)]
    pieces = InProcess(model).generate(requests, decoding, never)
    assert [piece.ids for (piece,) in pieces] == [one.ids[2:5] for one in whole]
    anew = InProcess(model).generate([request._replace(first=0) for request in requests], decoding, never)
    assert [piece.ids for (piece,) in anew] != [piece.ids for (piece,) in pieces]


def test_what_does_not_fit_is_drawn_again_with_fewer_rows() -> None:
    """Token for token the same; a row that does not fit alone is one message, and so is another process's part in it."""
    model, decoding, most = build_qwen3(), Decoding(max_new_tokens=8, seed=3), 2
    requests = [Request(prompt, number, samples=2) for number, prompt in enumerate(PROMPTS)]
    whole = InProcess(model).generate(requests, decoding, never)

    def short(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > most:
            raise MemoryError("no room")

    model.model.layers[1].register_forward_pre_hook(short)
    service = InProcess(model)
    with pytest.warns(UserWarning, match=r"ran out of memory \(no room\).*at most [24] at a time"):
        found = service.generate(requests, decoding, never)
    assert [[one.ids for one in group] for group in found] == [[one.ids for one in group] for group in whole]
    assert service.max_rows == 2
    with pytest.raises(MemoryError):
        InProcess(model, alone=False).generate(requests, decoding, never)
    most = 0
    with (
        pytest.warns(UserWarning),
        pytest.raises(OutOfMemoryError, match=r"no room\), with a single row. What helps: fewer"),
    ):
        service.generate(requests, decoding, never)


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


def with_adapters(model: nn.Module, **options: object) -> nn.Module:
    """Adapters that have learned something, on the head too."""
    peft = pytest.importorskip("peft", reason="needs peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports, and of embeddings that are not tied any more
        targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
        config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, lora_dropout=0.2, **options)
        return peft.get_peft_model(model, config)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["in place", "a copy"])
def test_adapters_are_decoded_from_the_cache_as_the_merged_model_is(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same slots, not by reading the whole row again for each token; and what is sent is what is held."""
    model = with_adapters(build_qwen3()).train()
    merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    requests = [Request(prompt, number, samples=2) for number, prompt in enumerate(PROMPTS)]
    decoding = Decoding(max_new_tokens=8, seed=3)
    expected = InProcess(merged).generate(requests, decoding, never)
    reads = []
    plain_read = slots.SlotReader.read

    def read(self: slots.SlotReader, new: torch.Tensor) -> torch.Tensor:
        reads.append(len(new))
        return plain_read(self, new)

    monkeypatch.setattr(slots.SlotReader, "read", read)
    service = InProcess(model, dtype=dtype)
    service.load(weights_of(model), version=1)
    found = service.generate(requests, decoding, never)
    assert len(reads) == 7 and max(reads) == 2 * len(PROMPTS)
    for ours, theirs in zip(found, expected, strict=True):
        assert [one.ids for one in ours] == [one.ids for one in theirs]
        torch.testing.assert_close(ours[0].logprobs, theirs[0].logprobs, rtol=0, atol=1e-4)
    sent = Hashes()
    for name, tensor in weights_of(model):
        sent.note(name, tensor)
    check_hashes(sent.read(), service.held(), 1, "here")
    assert model.training


def test_a_sharded_model_with_adapters_is_refused_by_name() -> None:
    model = with_adapters(build_qwen3())
    next(model.parameters()).ds_id = 0  # type: ignore[attr-defined]  # as ZeRO-3 marks its parameters
    with pytest.raises(ValueError, match=r"sharded.*got PeftModel\. Use engine: torch"):
        InProcess(model, dtype=torch.float32)


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


@pytest.mark.parametrize("tied", [False, True])
def test_a_copy_is_verified_as_what_it_multiplies_with(tied: bool) -> None:
    model = build_qwen3(tie_word_embeddings=tied)
    service = InProcess(model, dtype=torch.bfloat16)
    sent = [(name, tensor.to(torch.bfloat16)) for name, tensor in weights_of(model)]
    service.load(sent, 1)
    hashes = Hashes()
    for name, tensor in sent:
        hashes.note(name, tensor)
    check_hashes(hashes.read(), service.held(), 1, "here")
    head = service.copy.packed.get("lm_head.weight")
    if head is not None:  # as where it was packed before
        head.pack(head.unpacked() * 2)
        with pytest.raises(WrongWeights, match="lm_head.weight"):
            check_hashes(hashes.read(), service.held(), 1, "here")


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


CUTS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.6},
    "suppressed": {"suppress_tokens": [3, 14, 31]},
    "all": {
        "temperature": 1.4,
        "top_k": 12,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.3,
        "suppress_tokens": [3, 14],
    },
}


def exact_probabilities(model: torch.nn.Module, prompt: list[int], options: dict) -> torch.Tensor:
    """By the processors of transformers, in their order."""
    from transformers import generation as theirs

    processors = []
    if "repetition_penalty" in options:
        processors.append(theirs.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    if "suppress_tokens" in options:
        processors.append(theirs.SuppressTokensLogitsProcessor(options["suppress_tokens"]))
    if "temperature" in options:
        processors.append(theirs.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(theirs.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(theirs.TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(theirs.MinPLogitsWarper(options["min_p"]))
    ids = torch.tensor([prompt])
    with torch.no_grad():
        scores = model(ids).logits[:, -1].float()
    for processor in processors:
        scores = processor(ids, scores)
    return scores.softmax(-1)[0].double()


@pytest.mark.parametrize("name", CUTS)
def test_tokens_are_drawn_as_often_as_their_probability_says(name: str) -> None:
    """Chi-square of 5,000 draws; the seed is fixed, so this does not fail by chance."""
    model, prompt, num_draws = build_qwen3(), PROMPTS[0], 5_000
    decoding = Decoding(max_new_tokens=1, seed=11, **CUTS[name])
    service = InProcess(model, max_rows=num_draws)
    [drawn] = service.generate([Request(prompt, 5, samples=num_draws)], decoding, never)
    observed = torch.tensor([completion.ids[0] for completion in drawn]).bincount(minlength=40).double()
    exact = exact_probabilities(model, prompt, CUTS[name])
    assert observed[exact == 0].sum() == 0
    is_frequent = exact * num_draws >= 5
    rest = torch.tensor([observed[~is_frequent].sum(), (exact[~is_frequent].sum() * num_draws).clamp(min=1e-9)])
    counts = torch.cat([observed[is_frequent], rest[:1]])
    expected = torch.cat([exact[is_frequent] * num_draws, rest[1:]])
    counts, expected = counts[expected >= 1], expected[expected >= 1]
    chi_square = ((counts - expected).square() / expected).sum()
    p_value = torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), chi_square / 2)
    assert len(expected) > 2 and p_value > 1e-3
    for completion in drawn[:50]:
        assert completion.logprobs[0] == pytest.approx(float(exact[completion.ids[0]].log()), abs=1e-5)
        if completion.kept is not None:
            assert sorted(completion.kept[0]) == exact.nonzero()[:, 0].tolist()


def count_equal_rows(num_rows: int, num_tokens: int, **options: float) -> int:
    generator = torch.Generator().manual_seed(4)
    requests = []
    for number in range(num_rows):
        length = int(torch.randint(1, 12, (), generator=generator))
        requests.append(Request(torch.randint(40, (length,), generator=generator).tolist(), number))
    service = InProcess(build_qwen3(**options))
    decoding = Decoding(max_new_tokens=num_tokens, seed=0, stop_token_ids=[7])
    together = service.generate(requests, decoding, never)
    num_equal = 0
    for request, (batched,) in zip(requests, together, strict=True):
        [[alone]] = service.generate([request], decoding, never)
        num_equal += alone.ids == batched.ids
    return num_equal


def test_rows_alone_and_in_a_batch_are_the_same() -> None:
    assert count_equal_rows(40, 6) == 40


@pytest.mark.slow
def test_a_thousand_rows_alone_and_in_a_batch_are_the_same() -> None:
    # Far from uniform (0.5), rounding of the logits reaches 1e-5, and one of 20,000 tokens was another one.
    assert count_equal_rows(1000, 20, initializer_range=0.1) == 1000


def test_prompts_that_are_too_many_for_one_forward_are_computed_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_qwen3()
    requests = [Request(prompt, number) for number, prompt in enumerate(PROMPTS)]
    decoding = Decoding(max_new_tokens=3, seed=0)
    expected = InProcess(model).generate(requests, decoding, never)
    monkeypatch.setattr(slots, "PREFILL_TOKENS", 7)
    found = InProcess(model).generate(requests, decoding, never)
    assert [group[0].ids for group in found] == [group[0].ids for group in expected]


def test_architectures_are_those_that_training_knows_as_plain() -> None:
    assert slots.ARCHITECTURES == BLOCKED_ARCHITECTURES


def test_what_was_compiled_for_training_decodes_as_it_is() -> None:
    model = build_qwen3()
    requests = [Request(prompt, number) for number, prompt in enumerate(PROMPTS)]
    decoding = Decoding(max_new_tokens=3, seed=0)
    expected = InProcess(model).generate(requests, decoding, never)

    def refuse(graph: object, inputs: object) -> None:
        raise AssertionError("compiled")

    model.model.layers[0].compile(backend=refuse)
    assert InProcess(model).generate(requests, decoding, never) == expected


@pytest.mark.parametrize("architecture", sorted(slots.ARCHITECTURES))
def test_every_architecture_that_is_read_from_slots_is_read_right(architecture: str) -> None:
    """Log-probabilities while decoding, prompts shared, against one forward of the model as it is."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | {"sliding_window": None, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = AutoConfig.for_model(architecture, **sizes, **experts, shared_expert_intermediate_size=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert slots.reads_slots(model)
    service = InProcess(model, dtype=torch.float32)
    service.load(weights_of(model), 0)
    requests = [Request(prompt, number, samples=2) for number, prompt in enumerate(PROMPTS)]
    made = service.generate(requests, Decoding(max_new_tokens=5, seed=0), never)
    for prompt, group in zip(PROMPTS, made, strict=True):
        for completion in group:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]
            exact = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), exact, rtol=0, atol=1e-4
            )  # of about -6; a wrong read shows in the first digits
