"""A vision-language model is put together without a download, and what is saved opens in transformers."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import tiny_config, tiny_vlm_config
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
)

from llm_trainer.checkpoint.weights import read_model, write_model
from llm_trainer.config.model import VLMConfig
from llm_trainer.data.encode.tokenizer import train_tokenizer
from llm_trainer.models.build import build_model
from llm_trainer.models.scored import scored
from llm_trainer.models.vision_build import processor_for, read_processor


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    return train_tokenizer(["a red square"], 400, special_tokens=["<image>"])


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize(("tokens", "name"), [(None, "Llava"), (1, "InternVL")])
def test_what_is_saved_opens_in_transformers(
    tmp_path: Path, tokenizer, architecture: str, tokens: int | None, name: str
) -> None:  # type: ignore[no-untyped-def]
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = tiny_vlm_config(
        architecture=architecture, vocab_size=len(tokenizer), image_token_id=image_id, tokens_per_image=tokens
    )
    model = build_model(config, attention="blocked")
    assert type(model).__name__ == f"{name}ForConditionalGeneration"
    assert model.config.text_config._attn_implementation == "blocked"
    assert model.config.vision_config._attn_implementation == "sdpa"
    write_model(model, tmp_path, processor_for(model.config, tokenizer))

    # 1. weights and processor
    opened, processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    for own, theirs in zip(model.state_dict().values(), opened.state_dict().values(), strict=True):
        assert torch.equal(own, theirs)
    again = build_model(str(tmp_path), attention="blocked")
    assert type(again) is type(model) and again.config.text_config._attn_implementation == "blocked"
    read_model(again, tmp_path)
    assert type(read_processor(tmp_path, tokenizer)) is type(processor)

    # 2. they agree about images, whatever these are like
    colours = [Image.new("RGB", (30, 20), "red"), Image.new("RGB", (7, 90), "blue")]
    batch = processor(text=["<image> a<image>"], images=[colours], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    assert int((batch["input_ids"] == image_id).sum()) == 2 * (tokens or 4)
    own_logits = model(**batch).logits
    torch.testing.assert_close(own_logits, opened(**batch).logits, rtol=1e-4, atol=1e-5)
    assert scored(model).vision.example().lengths.tolist() == [tokens or 4]


def test_parts_start_from_folders(tmp_path: Path) -> None:
    # 1. a language model, and a SigLIP of text and images
    language = build_model(tiny_config("llama", tie_word_embeddings=False))
    write_model(language, tmp_path / "language")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**shape, image_size=8, patch_size=4)
    text = SiglipTextConfig(
        **shape, vocab_size=8, max_position_embeddings=4, bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    siglip.save_pretrained(tmp_path / "vision")

    # 2. their weights are in what is put together
    paths = {"language_path": str(tmp_path / "language"), "vision_path": str(tmp_path / "vision")}
    config = VLMConfig(**paths, image_token_id=5)
    model = build_model(config)
    assert scored(model).whole_logits == ""
    own = model.state_dict()
    for name, tensor in language.state_dict().items():
        place = name.replace("model.", "model.language_model.")
        assert torch.equal(own[place], tensor), name
    tower = {name.removeprefix("vision_model."): tensor for name, tensor in siglip.vision_model.state_dict().items()}
    read = [name for name in own if "vision_tower" in name]
    assert len(read) > 15
    for name in read:
        assert torch.equal(own[name], tower[name.removeprefix("model.vision_tower.")]), name

    # 3. a tower that is not the wanted one
    with pytest.raises(
        ValueError, match="holds a siglip_vision_model, and tokens_per_image: 1 expects a internvl_vision"
    ):
        build_model(VLMConfig(**paths, image_token_id=5, tokens_per_image=1))
    with pytest.raises(ValueError, match="tokens_per_image: got 3, expected 4, one for each of 2 x 2 patches or 1"):
        build_model(VLMConfig(**paths, image_token_id=5, tokens_per_image=3))
    with pytest.raises(ValueError, match="language_path: .* holds a siglip"):
        build_model(VLMConfig(language_path=paths["vision_path"], vision_path=paths["vision_path"], image_token_id=5))


def test_a_processor_that_takes_videos_too_is_read_without_torchvision(tmp_path: Path) -> None:
    from transformers import Qwen2_5_VLConfig

    from vision_data import PROCESSORS

    made = PROCESSORS["qwen2_5_vl"]()
    made.save_pretrained(tmp_path)
    Qwen2_5_VLConfig().save_pretrained(tmp_path)
    again = read_processor(tmp_path, made.tokenizer)
    assert type(again).__name__ == "Qwen2_5_VLProcessor" and again.image_token == "<|image_pad|>"
    image = Image.new("RGB", (30, 20), "red")
    there, here = (one(text=["<|image_pad|>"], images=[image], return_tensors="pt") for one in (again, made))
    assert torch.equal(there["pixel_values"], here["pixel_values"])
    again.save_pretrained(tmp_path / "again")
    assert "Qwen2_5_VLProcessor" in (tmp_path / "again" / "processor_config.json").read_text()
