"""Decoding: against transformers' own `generate`, alone against in a batch, and the sampling distribution."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from decoding_models import MODELS, PROMPTS, Whole, build_gpt2, build_qwen3
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.generation import generate, stream
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Request


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_its_batch(name: str, temperature: float) -> None:
    model = MODELS[name]()
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "temperature": temperature, "seed": 3}
    together = generate(model, PROMPTS, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, [prompt], row_numbers=[row], **settings)
        assert alone.ids[0] == together.ids[row]
        torch.testing.assert_close(alone.logprobs[0], together.logprobs[row], rtol=1e-4, atol=1e-4)
    assert len({tuple(ids) for ids in together.ids}) == len(PROMPTS)


@pytest.mark.parametrize("name", ["qwen3", "sliding", "moe", "llama"])
def test_greedy_is_what_transformers_generates(name: str) -> None:
    model = MODELS[name]()
    ours = generate(model, PROMPTS, max_new_tokens=10, pad_token_id=0, temperature=0)
    for prompt, ids in zip(PROMPTS, ours.ids, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=10, do_sample=False
        )
        assert ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("form", ["tensor", "dict", "object"])
def test_a_module_without_cache_gives_the_same_completions(form: str) -> None:
    model = build_qwen3()
    settings = {"max_new_tokens": 8, "pad_token_id": 0, "seed": 1}
    cached, whole = generate(model, PROMPTS, **settings), generate(Whole(model, form), PROMPTS, **settings)
    assert whole.ids == cached.ids
    torch.testing.assert_close(whole.logprobs, cached.logprobs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cut", [{}, {"top_k": 5, "top_p": 0.8}, {"min_p": 0.1}, {"repetition_penalty": 1.3}])
def test_logprobs_are_those_of_the_distribution_drawn_from(cut: dict) -> None:
    model = build_qwen3()
    decoding = Decoding(max_new_tokens=6, temperature=0.7, suppress_tokens=[4], seed=0, **cut)
    service = InProcess(model)
    made = service.generate([Request(prompt, row) for row, prompt in enumerate(PROMPTS)], decoding, lambda: False)
    for prompt, (completion,) in zip(PROMPTS, made, strict=True):
        ids = completion.ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        if "repetition_penalty" in cut:
            for place in range(len(ids)):
                before = torch.tensor(prompt + ids[:place]).unique()
                values = logits[place, before]
                logits[place, before] = torch.where(values > 0, values / 1.3, values * 1.3)
        logits[:, 4] = -torch.inf
        logits = logits / 0.7
        for place, (token, logprob) in enumerate(zip(ids, completion.logprobs, strict=True)):
            kept = range(40) if completion.kept is None else completion.kept[place]
            among = logits[place, torch.tensor(list(kept))].log_softmax(0)
            assert logprob == pytest.approx(float(among[list(kept).index(token)]), abs=1e-5)
        assert (completion.kept is None) == (not decoding.is_cut)
        forced = service.logprobs([prompt + ids], decoding)[0]
        torch.testing.assert_close(forced[len(prompt) - 1 :], completion.logprobs, rtol=0, atol=1e-5)


def test_rows_stop_at_a_stop_token_and_the_others_go_on() -> None:
    model = build_qwen3()
    free = generate(model, PROMPTS, max_new_tokens=10, pad_token_id=0, seed=0)
    stop = free.ids[0][2]
    stopped = generate(model, PROMPTS, max_new_tokens=10, pad_token_id=0, seed=0, stop_token_ids=[stop])
    for before, after, finished in zip(free.ids, stopped.ids, stopped.finished, strict=True):
        end = before.index(stop) + 1 if stop in before else len(before)
        assert after == before[:end] and finished == (stop in before)
    assert len(stopped.ids[0]) <= 3 and not all(stopped.finished)


def test_suppressed_tokens_never_appear() -> None:
    model = build_qwen3()
    suppressed = list(range(30))
    for temperature in (0.0, 2.0):
        made = generate(
            model,
            PROMPTS,
            max_new_tokens=12,
            pad_token_id=0,
            temperature=temperature,
            suppress_tokens=suppressed,
            seed=0,
        )
        assert {token for ids in made.ids for token in ids} <= set(range(30, 40))


def test_rows_end_where_the_context_ends() -> None:
    model = build_gpt2()  # 12 learned positions: one step too far would raise inside the model
    for module in (model, Whole(model)):
        made = generate(module, PROMPTS, max_new_tokens=50, pad_token_id=0, seed=0, context_length=12)
        assert [len(prompt) + len(ids) for prompt, ids in zip(PROMPTS, made.ids, strict=True)] == [12] * 4
        assert made.finished == [False] * 4
    with pytest.raises(ValueError, match=r"prompt 1 has 12 tokens, but the model's context is 12"):
        generate(model, [[1], [1] * 12], max_new_tokens=1, pad_token_id=0)


def test_stream_yields_what_generate_returns() -> None:
    model = build_qwen3().train()
    settings = {"max_new_tokens": 9, "temperature": 0.9, "top_p": 0.9, "seed": 5}
    tokens = stream(model, PROMPTS[0], **settings)
    first = next(tokens)
    assert torch.is_grad_enabled() and not model.training
    assert [first, *tokens] == generate(model, [PROMPTS[0]], pad_token_id=0, **settings).ids[0]
    assert model.training


def test_modes_gradients_and_random_state_are_left_alone() -> None:
    model = build_qwen3().train()
    model.model.layers[0].eval()
    before = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=2, pad_token_id=0, seed=0)
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), before)


def test_without_a_seed_torch_decides() -> None:
    model = build_qwen3()
    torch.manual_seed(1)
    made = [generate(model, PROMPTS, max_new_tokens=8, pad_token_id=0).ids for _ in range(2)]
    torch.manual_seed(1)
    assert generate(model, PROMPTS, max_new_tokens=8, pad_token_id=0).ids == made[0] != made[1]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [({}, 300), ({"top_k": 3}, 3), ({"top_p": 0.5}, None), ({"top_p": 0.99}, None), ({"top_k": 9, "top_p": 0.6}, None)],
)
def test_the_distribution_is_the_filtered_softmax(settings: dict, kept: int | None) -> None:
    """Every probability of the inverse CDF, measured on an even grid of noise, against a full sort."""
    torch.manual_seed(0)
    logits, temperature = torch.randn(300) * 2, 1.3
    grid = (torch.arange(100_000) + 0.5) / 100_000
    decoding = Decoding(max_new_tokens=1, temperature=temperature, **settings)
    ids = decoding.choose(logits.expand(len(grid), -1), grid).ids
    expected, order = (logits / temperature).softmax(-1).sort(descending=True)
    if settings.get("top_k"):
        expected[settings["top_k"] :] = 0
        expected /= expected.sum()
    expected[expected.cumsum(0) - expected >= settings.get("top_p", 1.0)] = 0
    expected = torch.zeros(300).scatter(0, order, expected / expected.sum())
    assert kept is None or (expected > 0).sum() == kept
    torch.testing.assert_close(ids.bincount(minlength=300) / len(grid), expected, rtol=0, atol=3e-5)


def test_noise_of_one_never_picks_a_token_of_probability_zero() -> None:
    logits = torch.tensor([[2.0, 1.0, -torch.inf]])
    ids = Decoding(max_new_tokens=1).choose(logits, torch.ones(1)).ids
    assert ids.tolist() == [1]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"max_new_tokens": 0}]
)
def test_settings_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Decoding(**{"max_new_tokens": 1, **bad})


def test_bad_input_is_named() -> None:
    model = build_qwen3()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], max_new_tokens=1, pad_token_id=0)
    with pytest.raises(ValueError, match="row_numbers has 1 entries for 2 prompts"):
        generate(model, [[1], [2]], max_new_tokens=1, pad_token_id=0, row_numbers=[0])
    assert generate(model, [], max_new_tokens=1, pad_token_id=0).ids == []
    nn.init.constant_(model.lm_head.weight, torch.nan)
    with pytest.raises(ValueError, match="not finite at new token 0 of prompt 0"):
        generate(model, PROMPTS, max_new_tokens=1, pad_token_id=0)


# Texts that end a row.


def in_bytes(special: bool) -> Any:
    """A tokenizer that spells in bytes what it has no token for, as Llama 2's does: a wrong byte spoils its neighbours."""
    from tokenizers import Tokenizer, decoders, models

    words = [
        "<unk>",
        "</s>",
        "a",
        "b",
        "ab",
        "\u2581",
        "\u2581a",
        "\u2581ab",
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if special:
        tokenizer.add_special_tokens(["</s>"])
    return tokenizer


def spelled(text: str) -> list[int]:
    """Ids of `in_bytes`."""
    ids = []
    for letter in text:
        ids += [2 + "ab".index(letter)] if letter in "ab" else [8 + byte for byte in letter.encode()]
    return ids


def naive_end(decode: Callable[[list[int]], str], stops: Sequence[str], ids: list[int]) -> int | None:
    """After how many tokens the text of all of them first holds a stop string."""
    for count in range(1, len(ids) + 1):
        if any(stop in decode(ids[:count]) for stop in stops):
            return count
    return None


def found_end(decoding: Decoding, ids: list[int]) -> int | None:
    return next((count for count in range(1, len(ids) + 1) if decoding.says_stop(ids[:count])), None)


@pytest.mark.parametrize("kind", ["bytes of characters", "a real tokenizer"])
def test_stop_strings_are_found_in_the_last_tokens_as_in_the_whole_text(kind: str, reference_dir: Path) -> None:
    noise = np.random.default_rng(0)
    letters = ["a", "b", "ab", " ", "\u00e9", "\u4e16\u754c", "\U0001f600", "\n\n", ". ", "</s>"]
    if kind == "a real tokenizer":
        tokenizer = load_tokenizer(reference_dir / "tokenizer")
        decode, encode = tokenizer.decode, lambda text: tokenizer.encode(text, add_special_tokens=False)
    else:
        own = in_bytes(special=True)
        decode = own.decode

        def encode(text: str) -> list[int]:
            ids: list[int] = []
            for number, part in enumerate(text.split("</s>")):
                ids += [1] * (number > 0) + spelled(part)
            return ids

    seen = set()
    for _ in range(150):
        stops = ["".join(noise.choice(letters[:-1], noise.integers(1, 5))) for _ in range(noise.integers(1, 3))]
        stops = [stop for stop in stops if stop.strip()] or ["a\n\n"]
        text = "".join(noise.choice(letters, noise.integers(20, 90)))
        ids = encode(text)
        decoding = Decoding(max_new_tokens=1, stop_strings=stops, decode=decode)
        expected = naive_end(decode, stops, ids)
        assert found_end(decoding, ids) == expected, (stops, text)
        seen.add(expected is not None)
    assert seen == {True, False}


def test_tokens_without_text_hide_no_stop_string_and_few_tokens_become_text() -> None:
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return "".join("" if token == 0 else chr(96 + token) for token in ids)

    decoding = Decoding(max_new_tokens=1, stop_strings=["xy"], decode=decode)
    assert found_end(decoding, [1] * 100 + [24] + [0] * 60 + [25, 1]) == 162
    decoded.clear()
    assert found_end(decoding, [1] * 500) is None and max(decoded) <= 12
