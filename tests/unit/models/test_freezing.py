"""What of a model is not trained, by parts and by names."""

from typing import Any

import pytest
from tiny_models import tiny_config

from llm_trainer.models.build import build_model
from llm_trainer.models.freezing import describe_frozen, freeze_parts


def llava() -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen3Config, SiglipVisionConfig

    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape["num_attention_heads"] = 2
    vision = SiglipVisionConfig(**shape, image_size=8, patch_size=4, vision_use_head=False)
    text = Qwen3Config(**shape, num_key_value_heads=1, head_dim=8, vocab_size=32)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=31))


def learning(model: Any) -> set[str]:
    """The parts of LLaVA, by the words of its names, that learn."""
    words = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            words.add(name.removeprefix("model.").partition(".")[0])
    return words


TOWER, PROJECTOR, LANGUAGE, HEAD = "vision_tower", "multi_modal_projector", "language_model", "lm_head"


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        (["language"], {TOWER, PROJECTOR}),
        (["vision"], {PROJECTOR, LANGUAGE, HEAD}),
        (["language", "vision"], {PROJECTOR}),
        (["projector", "lm_head"], {TOWER, LANGUAGE}),
    ],
)
def test_parts_of_a_model_are_frozen(frozen: list[str], trained: set[str]) -> None:
    model = llava()
    freeze_parts(model, frozen)
    assert learning(model) == trained


def test_a_merger_inside_the_tower_is_a_projector() -> None:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(text_config=text | {"vocab_size": 64, "num_key_value_heads": 1}, vision_config=vision)
    model = Qwen2_5_VLForConditionalGeneration(config)
    freeze_parts(model, ["language", "vision"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith("model.visual.merger.") for name in trained)


def test_what_is_frozen_is_said() -> None:
    model = llava()
    assert describe_frozen(model) == ""
    freeze_parts(model, ["language", "position_embedding"])
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tower = sum(size for name, size in sizes.items() if TOWER in name)
    language = sum(size for name, size in sizes.items() if LANGUAGE in name or HEAD in name)
    named = "(model.vision_tower.embeddings.position_embedding)"
    expected = f"vision: {4 * 16:,} of {tower:,} parameters {named}, language: {language:,} parameters"
    assert describe_frozen(model) == expected


def test_what_names_nothing_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"freeze: 'visoin' is no part of this Llava.* expected vision, projector, language"
    ):
        freeze_parts(llava(), ["visoin"])
    with pytest.raises(ValueError, match="freeze: 'vision' is no part of this Qwen3ForCausalLM"):
        freeze_parts(build_model(tiny_config("qwen3")), ["vision"])
    with pytest.raises(ValueError, match="freeze: language, vision, projector leave nothing that learns"):
        freeze_parts(llava(), ["language", "vision", "projector"])
    with pytest.raises(ValueError, match=r"freeze: '\(' is no regular expression"):
        freeze_parts(llava(), ["("])
