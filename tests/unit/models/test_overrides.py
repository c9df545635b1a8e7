"""Positions that are stretched, and dropout that is changed, in a model that is loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCAB, tiny_config
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from llm_trainer.models.build import build_config, build_model
from llm_trainer.models.overrides import overridden, steady_context
from llm_trainer.models.scored import scored

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SAME = [1.0, 2.0, 3.0, 4.0]


def tiny(kind: type[PretrainedConfig] = LlamaConfig, **changes: Any) -> PretrainedConfig:
    shape = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return kind(**{**shape, **heads, **tokens, **changes})


def of_rope(kind: type[PretrainedConfig] = LlamaConfig, **rope: Any) -> Any:
    return overridden(tiny(kind), {"rope_parameters": rope})


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "linear", "factor": 2}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        (LLAMA3, 512),
        ({"rope_type": "longrope", "factor": 4.0, "short_factor": SAME, "long_factor": SAME}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 64),  # at inference only
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
    ],
)
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config])
def test_the_context_is_raised_with_the_positions(
    kind: type[PretrainedConfig], rope: dict[str, Any], context: int
) -> None:
    base = tiny(kind)
    found: Any = overridden(base, {"rope_parameters": rope})
    assert found.max_position_embeddings == context
    assert {name: found.rope_parameters[name] for name in rope} == rope
    assert found.rope_parameters["rope_theta"] == 10000.0
    assert base.max_position_embeddings == 64  # type: ignore[attr-defined]  # a copy was changed
    # What the model computes with is what transformers makes of the same configuration.
    by_hand = tiny(kind, rope_parameters=dict(found.rope_parameters), max_position_embeddings=context)
    ids = torch.arange(40)[None]
    logits = []
    for config in (found, by_hand, base):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        logits.append(model(ids).logits)
    assert torch.equal(logits[0], logits[1])
    if rope["rope_type"] != "dynamic":
        assert not torch.allclose(logits[0], logits[2], atol=1e-6)


def test_the_older_name_and_type_are_understood() -> None:
    found: Any = overridden(tiny(), {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert found.rope_parameters == {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def test_positions_that_are_stretched_already() -> None:
    stretched = of_rope(rope_type="yarn", factor=4.0, beta_fast=16)
    further: Any = overridden(stretched, {"rope_parameters": {"factor": 8.0}})  # no type: the others stay
    assert further.rope_parameters["beta_fast"] == 16
    assert further.max_position_embeddings == 512
    other: Any = overridden(stretched, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}})
    assert "beta_fast" not in other.rope_parameters
    assert other.max_position_embeddings == 128  # of the 64 that it was trained on
    twice: Any = overridden(other, {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}})
    assert twice.max_position_embeddings == 256


def test_another_base_reaches_further_where_it_is_said() -> None:
    rope = {"rope_theta": 1e6}
    assert overridden(tiny(), {"rope_parameters": rope}).max_position_embeddings == 64  # type: ignore[attr-defined]
    reach = round(64 * 100 ** (6 / 8))  # 8 numbers of a head, so the slowest pair turns by theta^(-6/8)
    found: Any = overridden(tiny(), {"rope_parameters": rope, "max_position_embeddings": reach})
    assert found.max_position_embeddings == reach
    with pytest.raises(ValueError, match=f"got {reach + 1}, .* reach {reach} tokens"):
        overridden(tiny(), {"rope_parameters": rope, "max_position_embeddings": reach + 1})


def test_layers_with_positions_of_their_own() -> None:
    layers = ["sliding_attention", "full_attention"]
    base = tiny(Gemma3TextConfig, layer_types=layers, num_hidden_layers=2, sliding_window=16)
    rope = {"rope_type": "linear", "factor": 8.0}
    found: Any = overridden(base, {"rope_parameters": {"full_attention": rope}})
    assert found.max_position_embeddings == 512
    assert found.rope_parameters["full_attention"] == {"rope_theta": 1e6, **rope}
    assert found.rope_parameters["sliding_attention"] == {"rope_theta": 1e4, "rope_type": "default"}
    with pytest.raises(ValueError, match="expected a mapping for one of sliding_attention, full_attention"):
        overridden(base, {"rope_parameters": rope})


def test_dropout_of_the_family() -> None:
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    found: Any = overridden(gpt2, {"resid_pdrop": 0.3, "attn_pdrop": 0})
    assert (found.resid_pdrop, found.attn_pdrop) == (0.3, 0.0)
    assert found.embd_pdrop == gpt2.embd_pdrop
    with pytest.raises(ValueError, match="summary_first_dropout: .* nothing in GPT2LMHeadModel reads it"):
        overridden(gpt2, {"summary_first_dropout": 0.3})
    with pytest.raises(ValueError, match="positions of GPT2Config are weights"):
        overridden(gpt2, {"max_position_embeddings": 2048})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"attention_dropot": 0.1}, "LlamaConfig has no such key; did you mean attention_dropout?"),
        ({"attention_dropout": 1.0}, "got 1.0, expected a number of at least 0 and below 1"),
        (
            {"hidden_size": 64},
            "hidden_size: would change the shape of the weights .* expected one of attention_dropout",
        ),
        ({"hidden_act": "gelu"}, "hidden_act: would change .* what they mean"),
        ({"vocab_size": 99}, "expected it at vocabulary_config"),
        ({"dtype": "bfloat16"}, "expected it at run_config.precision"),
        ({"rope_parameters": "yarn"}, "got 'yarn', expected a mapping such as"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type: got 'ntk', and transformers knows no such RoPE"),
        ({"rope_parameters": {"rope_type": "yarn", "facto": 2.0}}, "yarn has no such parameter; did you mean factor?"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn needs factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 0.5}},
            "factor: got 0.5, expected a number of at least 1",
        ),
        ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "expected a number above low_freq_factor"),
        (
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "factor": 2.0,
                    "short_factor": SAME,
                    "long_factor": [9.0] * 4,
                }
            },
            "differs from long_factor, .* how a step is cut",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1], "long_factor": SAME}},
            "expected a list of 4 numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 128},
            "got 128, .* dynamic, .* at inference, reach 64",
        ),
        ({"max_position_embeddings": 128}, "got 128, and positions as they were loaded reach 64 .* yarn, factor: 2.0"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "max_position_embeddings": 129},
            "got 129, .* reach 128 tokens",
        ),
        ({"max_position_embeddings": 0}, "expected an integer of at least 1"),
        ({"rope_parameters": {"factor": 2.0}, "rope_scaling": {"factor": 2.0}}, "two names of one thing"),
    ],
)
def test_what_cannot_be_meant(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overridden(tiny(), overrides)


def test_a_folder_keeps_what_was_changed(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(tiny()).save_pretrained(tmp_path / "base")
    overrides = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}, "attention_dropout": 0.25}
    model = build_model(tmp_path / "base", overrides=overrides)
    empty = build_model(tmp_path / "base", overrides=overrides, empty=True)
    assert empty.config.rope_parameters == model.config.rope_parameters
    assert model.model.layers[0].self_attn.attention_dropout == 0.25  # type: ignore[union-attr, index]
    model.save_pretrained(tmp_path / "new")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert plain.config.max_position_embeddings == 256
    ids = torch.arange(200)[None] % VOCAB
    assert torch.allclose(plain(ids).logits, model.eval()(ids).logits, atol=1e-6)


def test_a_shape_has_its_own_keys() -> None:
    with pytest.raises(ValueError, match="model_config is a shape; expected them there"):
        build_model(tiny_config(), overrides={"attention_dropout": 0.1})
    with pytest.raises(ValueError, match=r"model_config\.rope_scaling\.rope_type: got 'ntk'"):
        build_config(tiny_config(rope_scaling={"type": "ntk", "factor": 2.0}))


def test_rows_whose_positions_depend_on_their_neighbours_are_refused() -> None:
    lists = {"short_factor": SAME, "long_factor": [2.0, 4.0, 8.0, 16.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, **lists}
    two_lists = tiny(rope_parameters=rope)
    dynamic = tiny(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0})
    steady = tiny(rope_parameters=rope | {"long_factor": SAME})
    assert [steady_context(config) for config in (two_lists, dynamic, steady, tiny())] == [16, 64, None, None]

    ids = torch.arange(34)[None] % VOCAB
    model = AutoModelForCausalLM.from_config(two_lists).eval()
    alone, behind = model(ids[:, :8]).logits, model(ids, position_ids=torch.arange(34)[None]).logits[:, :8]
    assert not torch.allclose(alone, behind, atol=1e-4)  # a longer row changes what stands before it, and in other rows
    flat = {"position_ids": torch.cat([torch.arange(16), torch.arange(16), torch.arange(2)])[None]}
    scored(model)(ids, document_lengths=torch.tensor([16, 16, 2]), **flat)
    with pytest.raises(ValueError, match="a micro-batch: rows of 34 tokens, and .* above 16 by the longest"):
        scored(model)(ids)
    with pytest.raises(ValueError, match="a micro-batch: rows of 17 tokens"):
        scored(model)(ids, document_lengths=torch.tensor([17, 17]))
