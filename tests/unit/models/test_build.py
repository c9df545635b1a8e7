"""From a description to a model, to a Hugging Face folder, and back."""

from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, Gemma2Config, GenerationConfig, GPT2Config, MambaConfig

from llm_trainer.checkpoint import write_model
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.model import MoeConfig
from llm_trainer.models.attention import Chosen, describe_attention, resolve_attention
from llm_trainer.models.build import (
    attention_of,
    build_config,
    build_model,
    flops_per_token,
    num_parameters,
    set_stops,
)
from llm_trainer.plan.shapes import shape_of


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "glm4_moe"])
def test_a_description_becomes_a_transformers_model(architecture: str) -> None:
    config = build_config(tiny_config(architecture, rope_theta=5e5, head_dim=4))
    assert config.model_type == architecture
    assert config.rope_parameters["rope_theta"] == 5e5
    model = build_model(tiny_config(architecture, head_dim=4))
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (16, 32)
    assert model.config._attn_implementation == "blocked"
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_stretched_positions_and_dtype() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    model = build_model(tiny_config(rope_scaling=scaling), attention="sdpa", dtype="bfloat16")
    assert model.config.rope_parameters == {"rope_theta": 10000.0, **scaling}
    assert model.dtype == torch.bfloat16


def test_round_trip_through_a_folder(tmp_path: Path) -> None:
    model = tiny_model()
    set_stops(model, (7, 9), 0)
    write_model(model, tmp_path / "model")
    again = build_model(tmp_path / "model")
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert GenerationConfig.from_pretrained(tmp_path / "model").eos_token_id == [7, 9]
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_architectures_without_position_ids_below_get_sdpa(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    assert build_model(str(tmp_path)).config._attn_implementation == "sdpa"


def test_models_without_the_best_attention_get_what_there_is(tmp_path: Path) -> None:
    """Gemma 2 has only the eager one; what was asked for by name is an error where there is none."""
    shape = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Gemma2Config(**shape, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for device in ("cpu", "cuda"):
        model = build_model(str(tmp_path), resolve_attention("auto", device))
        assert describe_attention(model.config, device) == ("eager", "transformers has no other for gemma2")
    described = build_config(tiny_config())
    assert described.architectures is None  # nothing has been made of it yet
    for attention in ("sdpa", "flash_attention_2"):
        assert attention_of(Chosen(attention), described) == attention
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        build_model(str(tmp_path), "sdpa")
    assert build_model(str(tmp_path), "eager").config._attn_implementation == "eager"


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        build_model(tmp_path)


def test_broken_weights_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = torch.nan
    write_model(model, tmp_path)
    with pytest.raises(ValueError, match=r"not finite.*model\.norm\.weight"):
        build_model(tmp_path)


def test_flops_count_what_a_token_passes_through() -> None:
    """6 per weight of a matrix that a token meets, 12 * layers * width of attention per position (PaLM, appendix B)."""
    model = tiny_model()
    attention = 32 * 32 * 2 + 2 * 32 * 16
    weights = 2 * (attention + 3 * 32 * 48 + 2 * 8 + 2 * 32) + 32 + VOCAB * 32
    assert num_parameters(model) == weights  # the embedding is the head
    assert flops_per_token(model, 10) == 6 * weights + 12 * 2 * 32 * 10
    untied = tiny_model(tie_word_embeddings=False)
    assert num_parameters(untied) == weights + VOCAB * 32
    assert flops_per_token(untied, 10) == flops_per_token(model, 10)
    experts = tiny_model(architecture="qwen3_moe")
    assert flops_per_token(experts, 0) == 6 * (num_parameters(experts) - 2 * 2 * 3 * 32 * 16)
    moe = MoeConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1)
    shared = tiny_model(architecture="glm4_moe", moe=moe)
    assert flops_per_token(shared, 0) == 6 * (num_parameters(shared) - 6 * 3 * 32 * 16)  # one layer has experts


def test_flops_of_a_model_without_attention_are_those_of_its_products() -> None:
    model = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64))
    assert (
        flops_per_token(model, 10) == flops_per_token(model, 1000) == 6 * num_parameters(model)
    )  # the head is the table
    with pytest.raises(ConfigError, match="MambaForCausalLM has no attention; plan cannot describe it"):
        shape_of(model)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe"])
def test_first_layers_may_have_no_experts(architecture: str) -> None:
    moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1)
    first, second = tiny_model(architecture=architecture, moe=moe).model.layers
    assert first.mlp.gate_proj.weight.shape == (48, 32)
    assert second.mlp.experts.down_proj.shape == (4, 32, 16)


def test_experts_that_every_token_passes(tmp_path: Path) -> None:
    """They are one wide one; what is read back from a folder says the same."""
    moe = MoeConfig(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        num_shared_experts=3,
        routed_scaling_factor=2.5,
        norm_topk_prob=False,
    )
    model = tiny_model(architecture="glm4_moe", moe=moe).eval()
    assert model.model.layers[0].mlp.shared_experts.up_proj.weight.shape == (48, 32)
    router = model.model.layers[1].mlp.gate
    logits, weights, chosen = router(torch.linspace(-1, 1, 64).view(2, 32))
    torch.testing.assert_close(weights, 2.5 * logits.sigmoid().gather(1, chosen))
    with torch.no_grad():
        router.e_score_correction_bias += torch.tensor([0.5, -0.25, 0.125, 0.0])
    write_model(model, tmp_path / "model")
    again = build_model(tmp_path / "model").eval()
    ids = torch.arange(20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.num_nextn_predict_layers == 0  # servers would look for such layers
