"""Tiny models and a ragged batch, padded and laid flat, for the tests of this room."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_trainer.config.model import MIXTURES, ModelConfig, MoeConfig, VLMConfig
from llm_trainer.config.vision import VisionConfig
from llm_trainer.losses.language import IGNORE
from llm_trainer.models.build import build_model

LENGTHS = (5, 9, 1, 7)
VOCAB = 61


def tiny_config(architecture: str = "qwen3", **changes: object) -> ModelConfig:
    moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    settings = {
        "architecture": architecture,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # logits that differ, and attention that is not uniform
        "moe": moe if architecture in MIXTURES else None,
    }
    return ModelConfig(**{**settings, **changes})  # type: ignore[arg-type]


def tiny_model(attention: str = "blocked", architecture: str = "qwen3", **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model(tiny_config(architecture, **changes), attention=attention)


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in LENGTHS]


def flat_batch() -> dict[str, Tensor]:
    """`[1, N]`, positions restarting, no label on the first token of a document."""
    ids = torch.cat(documents())[None]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    labels = ids.masked_fill(positions == 0, IGNORE)
    return {
        "input_ids": ids,
        "position_ids": positions,
        "document_lengths": torch.tensor(LENGTHS),
        "labels": labels,
    }


def padded_batch(left: bool = False) -> dict[str, Tensor]:
    """`[B, T]` with garbage on the padding."""
    width = max(LENGTHS) + 2
    ids, mask = torch.full((len(LENGTHS), width), VOCAB - 1), torch.zeros(len(LENGTHS), width, dtype=torch.long)
    for row, document in enumerate(documents()):
        place = slice(width - len(document), width) if left else slice(0, len(document))
        ids[row, place], mask[row, place] = document, 1
    starts = (mask.cumsum(1) == 1) & (mask == 1)  # on the left, the first token has padding before it, not a context
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | starts, IGNORE)}


IMAGE = 5  # the id of the placeholder


def tiny_vlm_config(**changes: object) -> VLMConfig:
    """A LLaVA whose images are 4 tokens each; `tokens_per_image=1`: an InternVL."""
    text = {field: getattr(tiny_config(), field) for field in ("vocab_size", "hidden_size", "intermediate_size")}
    vision = VisionConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
    settings = {
        **text,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "image_token_id": IMAGE,
        "vision": vision,
    }
    return VLMConfig(**{**settings, **changes})  # type: ignore[arg-type]


def tiny_vlm(attention: str = "blocked", **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    return build_model(tiny_vlm_config(**changes), attention=attention)
