"""What an image is in tokens and in numbers."""

import pickle
from copy import deepcopy

import pytest

pytest.importorskip("PIL")
import numpy as np
import torch

from llm_trainer.config.errors import ConfigError
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.pictured import find_places
from llm_trainer.data.encode.templates import default_template, has_default_template
from llm_trainer.data.read.errors import Location
from llm_trainer.data.vision import ImageFormat
from llm_trainer.image_batch import moved
from vision_data import PATCH, PROCESSORS, SIDE, file_of, llava_processor, picture

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
    assert there["images"].order is batch.order and there["images"].counts is batch.counts
    assert there["rows"] == ["a"]


@pytest.mark.parametrize("name", PROCESSORS)
def test_formats_travel_to_workers_that_are_spawned(name: str) -> None:
    """These are given pickles; a processor without videos is not the class that its name says."""
    images = ImageFormat(PROCESSORS[name](), max_pixels=900)
    there = pickle.loads(pickle.dumps(images))
    assert type(there.processor) is type(images.processor) and there.facts() == images.facts()
    shown, expected = there.numbers([picture()]), images.numbers([picture()])
    assert shown.keys() == expected.keys()
    assert all(torch.equal(shown[key], value) for key, value in expected.items())


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


def test_a_tokenizer_that_calls_the_placeholder_by_another_number_is_named() -> None:
    from copy import copy

    from llm_trainer.data.encode.tokenizer import train_tokenizer

    processor = copy(llava_processor())
    processor.tokenizer = train_tokenizer(["What is in the picture?"], 300, ["<other>", "<image>"])
    before, now = (one.convert_tokens_to_ids("<image>") for one in (llava_processor().tokenizer, processor.tokenizer))
    assert before != now
    with pytest.raises(ConfigError, match=f"has it as id {now}, and LlavaProcessor makes placeholders of id {before}"):
        ImageFormat(processor)


def without_filling(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    is_there = inputs["pixel_attention_mask"].flatten(2).any(2)
    return {name: values[is_there] for name, values in inputs.items()}


@pytest.mark.parametrize("family", PROCESSORS)
def test_ids_and_pixels_are_those_of_transformers(family: str) -> None:
    processor = PROCESSORS[family]()
    images = ImageFormat(processor)
    pictures = [picture(20, 30, seed=1), picture(64, 20, seed=2)]
    # 1. what transformers makes of them
    text = f"Hi\n{images.marker}\nyou {images.marker}? No"
    made = processor(text=[text], images=[pictures], return_tensors="pt", add_special_tokens=False)
    ids = made["input_ids"][0].tolist()
    # 2. and we, of their sizes alone
    chat = ChatFormat(processor.tokenizer, images=images)
    refs = [images.count(file_of(one), None, Location("rows.jsonl", 1)) for one in pictures]
    [one] = chat.encode_documents(["Hi\n<image>\nyou <image>? No"], [refs])
    assert one.input_ids[: len(ids)] == ids and len(one.input_ids) == len(ids) + 1  # and the eos
    batch = images.batch(pictures, [[0, 1]])
    assert batch.num_placeholders == ids.count(images.image_token_id)
    for place, length in zip(one.places, batch.lengths.tolist(), strict=True):
        block = ids[place.start : place.stop]
        assert ids[place.first] == images.image_token_id and block.count(images.image_token_id) == length
        assert not any(one.trained[place.start : place.stop])
    shown, theirs = batch.inputs, {name: made[name] for name in batch.inputs}
    if "pixel_attention_mask" in shown:  # tiles of an image, filled up to those of the image that has the most
        shown, theirs = without_filling(shown), without_filling(theirs)
    for name, values in shown.items():
        assert torch.equal(values.flatten(), theirs[name].flatten()), name
    # 3. ids in which they are already are found again
    places = find_places(np.array(one.input_ids), refs, images)
    assert [(place.first, place.tower) for place in places] == [(place.first, place.tower) for place in one.places]


def test_what_a_tower_sees_is_counted() -> None:
    sizes = {"llava": 16, "llava_next": 5 * 16, "qwen2_5_vl": 32, "qwen3_vl": 32, "idefics3": 5 * 16, "gemma3": 16}
    for family, expected in sizes.items():
        assert ImageFormat(PROCESSORS[family](), patch_size=PATCH).tower_tokens(20, 30) == expected, family


def test_a_processor_leaves_nothing_in_the_key_of_stores() -> None:
    images = ImageFormat(llava_processor())
    chat = ChatFormat(llava_processor().tokenizer, images=images)
    before = chat.facts()
    images.batch([picture(), picture(40, 40)], [[0, 1]])
    assert chat.facts() == before
    assert (
        ChatFormat(llava_processor().tokenizer, images=ImageFormat(llava_processor(), max_pixels=9)).facts() != before
    )


def test_the_default_template_prints_parts_as_it_prints_text() -> None:
    processor = llava_processor()
    images = ImageFormat(processor)
    ref = images.count(file_of(picture()), None, Location("rows.jsonl", 1))
    talk = [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": "One <image>, two\n<image>", "images": [ref, ref]},
        {"role": "assistant", "content": "Two."},
    ]
    found = []
    for marker in ("", "<image>"):
        tokenizer = deepcopy(processor.tokenizer)
        tokenizer.chat_template = default_template(tokenizer, marker)
        assert has_default_template(tokenizer)
        chat = ChatFormat(tokenizer, images=images)
        found.append((chat._takes_images, chat.encode(talk).input_ids, chat.encode(talk).trained))
    assert [how for how, *_ in found] == ["text", "some"] and found[0][1:] == found[1][1:]


def test_the_placeholder_as_a_users_text_is_text() -> None:
    processor = PROCESSORS["qwen2_5_vl"]()
    images = ImageFormat(processor)
    chat = ChatFormat(processor.tokenizer, images=images)
    ref = images.count(file_of(picture()), None, Location("rows.jsonl", 1))
    said = {"role": "user", "content": "<image>What does <|image_pad|> mean?", "images": [ref]}
    ids = chat.encode_prompt([said])
    assert ids.count(images.image_token_id) == images.num_placeholders(20, 30)
    assert "What does <|image_pad|> mean?" in processor.tokenizer.decode(ids)


def test_weights_of_messages_stay_with_their_words() -> None:
    images = ImageFormat(llava_processor())
    chat = ChatFormat(llava_processor().tokenizer, images=images)
    ref = images.count(file_of(picture()), None, Location("rows.jsonl", 1))
    talk = [
        {"role": "user", "content": "<image>What?", "images": [ref]},
        {"role": "assistant", "content": "A <image> cat.", "images": [ref], "loss_weight": 0.5},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Two."},
    ]
    blind = [{**turn, "content": turn["content"].replace("<image>", "")} for turn in talk]
    one, other = chat.encode(talk), ChatFormat(llava_processor().tokenizer).encode(blind)
    is_text = np.array(one.input_ids) != images.image_token_id
    weights = one.loss_weights()
    assert not weights[~is_text].any() and set(weights.tolist()) == {0, 0.5, 1}
    # the words around an image meet in a text without it, so only how much they weigh together is the same
    assert (weights == 1).sum() == (other.loss_weights() == 1).sum()
    assert (weights == 0.5).sum() >= (other.loss_weights() == 0.5).sum()
