"""What cannot be split over processes is refused by name, before anything is changed."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from llm_trainer.config.model import ModelConfig, MoeConfig
from llm_trainer.engine.tensor import split_layers
from llm_trainer.models.build import build_model

SHAPE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class FourProcesses:
    """As much of a mesh as is looked at before anything is split."""

    def size(self) -> int:
        return 4


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear comes with no plan"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2)),
            "GPT2LMHeadModel comes with no",
        ),
        (lambda: build_model(ModelConfig(**SHAPE)), "got 4, expected a divisor of num_key_value_heads, 2"),
        (
            lambda: build_model(
                ModelConfig(architecture="qwen3_moe", moe=MoeConfig(4, 2, moe_intermediate_size=8), **SHAPE)
            ),
            "the plan of Qwen3MoeForCausalLM asks for ",
        ),
    ],
)
def test_what_cannot_be_split(model, message) -> None:
    with pytest.raises(ValueError, match=message):
        split_layers(model(), FourProcesses())  # type: ignore[arg-type]
