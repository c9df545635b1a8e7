"""From a description to a model, to a Hugging Face folder, and back."""

from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, GPT2Config

from llm_trainer.checkpoint import write_model
from llm_trainer.models.build import build_config, build_model, flops_per_token, num_parameters, set_stops


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe"])
def test_a_description_becomes_a_transformers_model(architecture: str) -> None:
    config = build_config(tiny_config(architecture, rope_theta=5e5, head_dim=6))
    assert config.model_type == architecture
    assert config.rope_parameters["rope_theta"] == 5e5
    model = build_model(tiny_config(architecture, head_dim=6))
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (24, 32)
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
