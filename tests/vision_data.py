"""Processors of vision-language models, made small without any download, and images, for tests."""

import io
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import train_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import Joined, load
from llm_trainer.models.vision_build import without_videos

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


def _tokenizer(plain: tuple[str, ...] = (), **named: str) -> Any:
    """A small tokenizer with these special tokens, some of which it knows by name."""
    from transformers import PreTrainedTokenizerFast

    small = train_tokenizer(["What is in the picture? A cat. Two dogs."] * 4, 400, [*plain, *named.values()])
    how = {"eos_token": small.eos_token, "pad_token": small.pad_token, "extra_special_tokens": named}
    return PreTrainedTokenizerFast(tokenizer_object=small.backend_tokenizer, **how)


def _qwen(name: str) -> Any:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 4096})
    around = {"vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>"}
    tokenizer = _tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>", **around)
    return without_videos(getattr(transformers, name))(image_processor=images, tokenizer=tokenizer)


def _llava_next() -> Any:
    from transformers import LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    square = {"height": SIDE, "width": SIDE}
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=square, image_grid_pinpoints=pinpoints)
    how = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaNextProcessor(images, _tokenizer(("<image>",)), patch_size=PATCH, **how)


def _idefics3() -> Any:
    from transformers import Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE})
    tiles = [f"<row_{row}_col_{column}>" for row, column in ((1, 1), (1, 2), (2, 1), (2, 2))]
    tokens = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *tiles)
    return Idefics3Processor(images, _tokenizer(tokens), image_seq_len=4)


def _gemma3() -> Any:
    from transformers import Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    around = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return Gemma3Processor(images, _tokenizer(image_token="<image_soft_token>", **around), image_seq_length=4)


def _internvl() -> Any:
    from transformers import InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    how = {"size": {"height": SIDE, "width": SIDE}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    around = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    tokenizer = _tokenizer(context_image_token="<IMG_CONTEXT>", **around)
    made = without_videos(InternVLProcessor)
    return made(image_processor=GotOcr2ImageProcessorPil(**how), tokenizer=tokenizer, image_seq_length=4)


PROCESSORS: dict[str, Callable[[], Any]] = {  # family -> its processor, made small
    "llava": llava_processor,
    "llava_next": _llava_next,
    "qwen2_5_vl": partial(_qwen, "Qwen2_5_VLProcessor"),
    "qwen3_vl": partial(_qwen, "Qwen3VLProcessor"),
    "idefics3": _idefics3,
    "gemma3": _gemma3,
    "internvl": _internvl,
}


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


def asked(question: str, answer: str = "A cat.") -> list[dict[str, Any]]:
    """A question and its answer."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(folder: Path, rows: list[Any], images: int = 4) -> Path:
    """A file of rows in a folder of images, 0.png and so on, each of another height."""
    for number in range(images):
        (folder / f"{number}.png").write_bytes(file_of(picture(20 + number, 30, seed=number)))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def loaded(path: Path, chat: ChatFormat, kind: str = "conversations", **how: Any) -> Joined:
    """The rows of such a file as training reads them."""
    return load([str(path)], get_kind(kind), chat, DataOptions(**how), path.parent / "cache")
