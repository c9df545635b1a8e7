"""A small model of each family of vision-language models, built from its configuration: two layers of everything."""

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import IMAGE, VOCAB
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Idefics3Config,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)

from llm_trainer.models.build import model_of_config

TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_TOWER: dict[str, Any] = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
QWEN_TOWER |= {"patch_size": 4, "out_hidden_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def _siglip(**changes: Any) -> SiglipVisionConfig:
    return SiglipVisionConfig(**TOWER, image_size=16, patch_size=8, **changes)


def _llava() -> Any:
    return LlavaConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=_siglip(),
        image_token_index=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


def _llava_next() -> Any:
    # as published: CLIP with a token of the whole image, the layer before the last one
    return LlavaNextConfig(
        text_config=LlamaConfig(**TEXT),
        vision_config=CLIPVisionConfig(**TOWER, image_size=16, patch_size=8, projection_dim=16),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
        tie_word_embeddings=False,
    )


def _qwen2_5_vl() -> Any:
    vision = QWEN_TOWER | {"window_size": 16, "fullatt_block_indexes": [1]}
    text = {**TEXT, "rope_parameters": MROPE}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=False)


def _qwen3_vl(kind: Any = Qwen3VLConfig, **more: Any) -> Any:
    vision = QWEN_TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    text = {**TEXT, "head_dim": 8, "rope_parameters": MROPE, **more}
    return kind(text_config=text, vision_config=vision, image_token_id=IMAGE, tie_word_embeddings=False)


def _qwen3_vl_moe() -> Any:
    return _qwen3_vl(Qwen3VLMoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


def _idefics3(kind: Any = Idefics3Config) -> Any:
    vision = {**TOWER, "image_size": 16, "patch_size": 4}
    text = LlamaConfig(**TEXT)
    return kind(text_config=text, vision_config=vision, image_token_id=IMAGE, scale_factor=2, tie_word_embeddings=False)


def _smolvlm() -> Any:
    return _idefics3(SmolVLMConfig)


def _gemma3() -> Any:
    text = {**TEXT, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    return Gemma3Config(
        text_config={**text, "tie_word_embeddings": True},
        vision_config=_siglip().to_dict(),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
        tie_word_embeddings=True,
    )


def _internvl() -> Any:
    return InternVLConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config={**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )


FAMILIES: dict[str, Callable[[], Any]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_vl_moe": _qwen3_vl_moe,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "gemma3": _gemma3,
    "internvl": _internvl,
}


def family_model(name: str, attention: str = "blocked") -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_of_config(FAMILIES[name](), attention)
    assert isinstance(model, AutoModelForImageTextToText._model_mapping[type(model.config)])
    return model
