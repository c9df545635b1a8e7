"""Processors of vision-language models, made small without any download, and images, for tests."""

import io
from functools import cache
from typing import Any

import numpy as np

from llm_trainer.data.encode.tokenizer import train_tokenizer

PATCH, SIDE = 4, 16  # of the tower: 16 placeholders per image


@cache
def llava_processor(chat_template: str | None = None) -> Any:
    """LLaVA's processor around SigLIP's, Pillow's backend; an image of any size is 16 placeholders `<image>`."""
    from transformers import LlavaProcessor
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer = train_tokenizer(["What is in the picture? A cat. Two dogs."] * 4, 300, ["<image>"])
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=chat_template,
    )


def picture(height: int = 20, width: int = 30, seed: int = 0) -> Any:
    """A picture of noise, RGB."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(image: Any, kind: str = "PNG", **how: Any) -> bytes:
    """The bytes of a file that holds it."""
    file = io.BytesIO()
    image.save(file, format=kind, **how)
    return file.getvalue()
