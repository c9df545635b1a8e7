"""What an image is in tokens and in numbers."""

import pytest

pytest.importorskip("PIL")
import torch

from llm_trainer.config.errors import ConfigError
from llm_trainer.data.vision import ImageFormat
from llm_trainer.image_batch import moved
from vision_data import PATCH, SIDE, llava_processor, picture

NUM = (SIDE // PATCH) ** 2


def test_an_images_tokens_are_asked_of_the_processor_once_per_size(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = llava_processor()
    images = ImageFormat(processor)
    assert images.marker == "<image>"
    assert images.ids(20, 30) == [images.image_token_id] * NUM
    assert images.tokens(20, 30).text == "<image>"
    assert images.num_placeholders(500, 30) == images.tower_tokens(500, 30) == NUM
    monkeypatch.setattr(images, "processor", None)
    assert images.ids(20, 30) == [images.image_token_id] * NUM


def test_each_distinct_image_of_a_micro_batch_is_there_once() -> None:
    images = ImageFormat(llava_processor())
    batch = images.batch([picture(seed=1), picture(40, 40, seed=2)], [[0], [], [1, 0]])
    assert batch.inputs["pixel_values"].shape == (2, 3, SIDE, SIDE)
    assert batch.order.tolist() == [0, 1, 0]
    assert batch.counts.tolist() == [1, 0, 2]
    assert batch.lengths.tolist() == [NUM, NUM]
    assert batch.num_placeholders == 3 * NUM
    there = moved({"input_ids": torch.zeros(1, 2), "images": batch, "rows": ["a"]}, "meta")
    assert there["images"].inputs["pixel_values"].is_meta
    assert there["images"].order.is_meta and not there["images"].counts.is_meta
    assert there["rows"] == ["a"]


def test_a_blank_image_is_shown_by_no_row() -> None:
    blank = ImageFormat(llava_processor()).blank()
    assert blank.inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert blank.num_placeholders == 0 and blank.lengths.tolist() == [NUM]


def test_larger_images_are_made_smaller() -> None:
    images = ImageFormat(llava_processor(), max_pixels=600)
    assert images.limited(20, 30) == (20, 30)
    height, width = images.limited(200, 300)
    assert height * width <= 600 and width / height == pytest.approx(1.5, abs=0.1)
    whole = ImageFormat(llava_processor()).numbers([picture(200, 300)])
    assert not torch.equal(images.numbers([picture(200, 300)])["pixel_values"], whole["pixel_values"])


def test_a_tokenizer_that_lacks_the_placeholder_is_named() -> None:
    from copy import copy

    from llm_trainer.data.encode.tokenizer import train_tokenizer

    processor = copy(llava_processor())
    processor.tokenizer = train_tokenizer(["nothing to see"], 300)
    with pytest.raises(ConfigError, match="image_token '<image>': the tokenizer writes it as .* tokens; expected one"):
        ImageFormat(processor)
