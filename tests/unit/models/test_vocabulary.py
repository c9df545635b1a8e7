"""Tokens that a tokenizer and its model get: their rows, and everything else as it was."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen3Config,
)

from llm_trainer.models.vocabulary import extend_rows, extend_tokenizer, extend_vocabulary, num_ids
from talks import tokenizer as characters

ROWS = 4096  # of which the tokenizer has a hundred: a row more is a small share of the probability
NEW, SPECIAL = "hi7", "<|tool|>"


def tiny(kind: type[PretrainedConfig], rows: int = ROWS, **changes: Any) -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    if kind is GPT2Config:
        shape, heads = {"n_embd": 16, "n_layer": 1, "n_head": 2}, {}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(kind(vocab_size=rows, **{**shape, **heads, **tokens, **changes})).eval()
    head = made.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return made


def mean_loss(model: Any, ids: torch.Tensor) -> float:
    """Of random text of the old ids, in nats per token."""
    logits = model(ids).logits.float()
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LlamaConfig, {"tie_word_embeddings": False}),
        (LlamaConfig, {"tie_word_embeddings": True}),
        (Qwen3Config, {"tie_word_embeddings": True}),
        (Gemma2Config, {}),  # tied, embeddings scaled by the width, logits capped
        (PhiConfig, {}),  # a bias in the head
        (GPT2Config, {}),
    ],
)
@torch.no_grad()
def test_new_rows_are_the_mean_of_their_pieces(kind: type[PretrainedConfig], changes: dict[str, Any]) -> None:
    made, model = characters(), tiny(kind, **changes)
    model.requires_grad_(True)
    head = model.get_output_embeddings()
    is_tied = head.weight is model.get_input_embeddings().weight
    known, pieces = num_ids(made), made("hi7", add_special_tokens=False).input_ids
    assert len(pieces) == 2
    ids = torch.randint(0, known, (4, 32), generator=torch.Generator().manual_seed(1))
    logits, loss = model(ids).logits, mean_loss(model, ids)
    rows = {name: value.clone() for name, value in model.named_parameters() if value.shape[0] == ROWS}
    generator = torch.get_rng_state()

    extend_vocabulary(model, made, [NEW], [SPECIAL], pad_to_multiple_of=100)

    # 1. ids, and rows as many as wanted
    assert made.convert_tokens_to_ids([NEW, SPECIAL]) == [known, known + 1]
    assert made("ahi7b").input_ids == [*made("a").input_ids, known, *made("b").input_ids]
    assert made.decode([known, known + 1], skip_special_tokens=True) == NEW
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == head.out_features == 4100
    # 2. each the mean of its pieces, in every table; the others are untouched
    assert len(rows) == (1 if is_tied else 2) + (head.bias is not None)
    for name, before in rows.items():
        after = model.get_parameter(name)
        assert after.requires_grad
        assert after.shape == (4100, *before.shape[1:])
        assert torch.allclose(after[known], before[pieces].mean(0))
        assert torch.equal(after[:known], before[:known])
        assert torch.equal(after[known + 2 : ROWS], before[known + 2 :])
        assert torch.allclose(after[ROWS:], before[:known].mean(0).expand_as(after[ROWS:]), atol=1e-6)
    # 3. the model says of old text what it said
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == is_tied
    now = model(ids).logits
    assert now.shape[-1] == 4100
    assert torch.allclose(now[..., :known], logits[..., :known], atol=1e-6)
    assert abs(mean_loss(model, ids) - loss) < 1e-3
    likeliest_piece = now[..., pieces].amax(-1)
    assert (now[..., known] < likeliest_piece + 1e-6).all()  # not what is always said
    assert torch.equal(torch.get_rng_state(), generator)


def test_on_the_meta_device_and_in_sixteen_bit() -> None:
    made = characters()
    pieces = extend_tokenizer(made, [NEW], [SPECIAL])
    with torch.device("meta"):
        empty = tiny(LlamaConfig, rows=num_ids(made) - 2, tie_word_embeddings=True)
    extend_rows(empty, pieces, num_ids(made))
    assert empty.get_output_embeddings().weight.shape == (num_ids(made), 16)
    assert empty.get_output_embeddings().weight is empty.get_input_embeddings().weight
    half = tiny(LlamaConfig, rows=num_ids(made) - 2).to(torch.bfloat16)
    before = half.get_input_embeddings().weight.detach().clone()
    extend_rows(half, pieces, num_ids(made))
    for new, old in pieces.items():
        assert torch.equal(half.get_input_embeddings().weight[new], before[list(old)].float().mean(0).bfloat16())


@pytest.mark.parametrize(
    ("tokens", "special", "message"),
    [
        (["a"], [], "'a' exists already, as id"),
        ([], ["<|im_end|>"], "'<|im_end|>' exists already, as id 2"),
        (["new", "new"], [], "'new' is named twice"),
        (["new"], ["new"], "'new' is named twice"),
        ([" "], [], "expected text that is not only white space"),
    ],
)
def test_tokens_that_cannot_be_added(tokens: list[str], special: list[str], message: str) -> None:
    made = characters()
    with pytest.raises(ValueError, match=message.replace("|im_end|", r"\|im_end\|")):
        extend_tokenizer(made, tokens, special)
    assert num_ids(made) == num_ids(characters())  # nothing was added


def test_models_that_cannot_be_extended() -> None:
    made = characters()
    with pytest.raises(ValueError, match=r"needs \d+ rows before any token is added, and the model has 64"):
        extend_vocabulary(tiny(LlamaConfig, rows=64), made, [NEW])
    with pytest.raises(ValueError, match="got a Linear, expected a language model of transformers"):
        extend_vocabulary(nn.Linear(2, 2), made, [NEW])  # type: ignore[arg-type]
    quantised = tiny(LlamaConfig, tie_word_embeddings=False)
    quantised.lm_head.weight = nn.Parameter(torch.zeros(ROWS, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"a table of torch.int8 \[4096, 16\] .* before it is quantised"):
        extend_vocabulary(quantised, made, [NEW])
    assert num_ids(made) == num_ids(characters())
    second_table = tiny(LlamaConfig, rows=num_ids(made))
    other = nn.Embedding(num_ids(made), 16)

    def look_up(module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        other(inputs["input_ids"])

    second_table.model.register_forward_pre_hook(look_up, with_kwargs=True)
    with pytest.raises(ValueError, match=r"does not read the id \d+: it has another table of its vocabulary"):
        extend_vocabulary(second_table, made, [NEW])
