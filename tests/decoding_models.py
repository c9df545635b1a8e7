"""Tiny models that are decoded from."""

import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

PROMPTS = [[5, 6, 7, 8, 9, 10], [3], [11, 12, 13], [20, 1, 20, 1]]
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,  # far from uniform, so that an error shows
}


def build_qwen3(**more: object) -> nn.Module:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **more})).eval()


def build_llama() -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, eos_token_id=None)).eval()


def build_moe(**more: object) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**{**sizes, **more})
    return Qwen3MoeForCausalLM(config).eval()


def build_gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5)
    return GPT2LMHeadModel(config).eval()


class Whole(nn.Module):
    """A module that maps ids to logits and knows no cache, over a transformers model."""

    def __init__(self, model: nn.Module, form: str = "tensor") -> None:
        super().__init__()
        self.model, self.form = model, form

    def forward(self, ids: Tensor) -> object:
        output = self.model(ids, use_cache=False)
        return {"tensor": output.logits, "dict": {"logits": output.logits}, "object": output}[self.form]


MODELS = {
    "qwen3": build_qwen3,
    "sliding": lambda: build_qwen3(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "moe": build_moe,
    "llama": build_llama,
    "gpt2": build_gpt2,
    "whole": lambda: Whole(build_qwen3()),
}
