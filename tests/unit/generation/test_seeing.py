"""Prompts with images: what transformers itself writes after them, whatever they are decoded with."""

from functools import cache
from typing import Any

import pytest
import torch

from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Completion, Request
from llm_trainer.image_batch import ImageBatch
from llm_trainer.models.vision import Vision

IMAGE, NEW = 5, 6


@cache
def vision_model(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {"num_key_value_heads": 2, "vocab_size": 61, "initializer_range": 0.3, "max_position_embeddings": 64}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 60}
    if family == "llava":
        tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = transformers.SiglipVisionConfig(**tower, image_size=8, patch_size=4, vision_use_head=False)
        whole = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_token_id": IMAGE}
        config = transformers.LlavaConfig(vision_config=vision, text_config=transformers.Qwen3Config(**text), **whole)
        return transformers.LlavaForConditionalGeneration(config).eval()
    tower = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "patch_size": 4}
    tower |= {"out_hidden_size": 32, "spatial_merge_size": 2, "window_size": 16, "fullatt_block_indexes": [0]}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    ids = {"image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def shown(family: str, number: int) -> ImageBatch:
    """A batch with two images, of which a prompt shows that of this `number`."""
    example = Vision.of(vision_model(family)).example(2)
    return ImageBatch(example.inputs, torch.tensor([number]), torch.tensor([1]), example.lengths)


def requests(family: str, samples: int = 1) -> list[Request]:
    """Of two lengths, the shorter one with the second image at its end, and one without any."""
    images = [shown(family, 0), shown(family, 1)]
    each = [IMAGE] * int(images[0].lengths[0])
    prompts = [[1, 9, *each, 10, 11, 12], [1, 13, *each], [1, 14, 15, 16, 17, 18]]
    every: list[ImageBatch | None] = [*images, None]
    return [Request(ids, row, samples, images=every[row]) for row, ids in enumerate(prompts)]


def written(family: str, asked: list[Request], temperature: float = 0.0) -> list[list[Completion]]:
    decoding = Decoding(max_new_tokens=NEW, temperature=temperature, seed=3, suppress_tokens=(IMAGE,))
    return InProcess(vision_model(family)).generate(asked, decoding, stop=lambda: False)


@torch.no_grad()
def read_anew(family: str, request: Request, ids: list[int]) -> list[float]:
    """Log-probs of ids behind a prompt, by the model's own forward of all of it at once; the placeholder is never drawn."""
    model, row = vision_model(family), torch.tensor([[*request.ids, *ids]])
    inputs: dict[str, Any] = {}
    if request.images is not None:
        which = request.images.order
        inputs = dict(request.images.inputs)
        if "image_grid_thw" in inputs:
            patches = len(inputs["pixel_values"]) // 2
            inputs["pixel_values"] = inputs["pixel_values"].split(patches)[int(which)]
            inputs["image_grid_thw"] = inputs["image_grid_thw"][which]
            inputs["mm_token_type_ids"] = (row == IMAGE).int()
        else:
            inputs["pixel_values"] = inputs["pixel_values"][which]
    logits = model(row, **inputs).logits[0, len(request.ids) - 1 : -1]
    logits[:, IMAGE] = -torch.inf
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_tokens_behind_images_are_those_of_the_whole_forward(family: str) -> None:
    asked = requests(family)
    for request, (completion,) in zip(asked, written(family, asked), strict=True):
        found = read_anew(family, request, completion.ids)
        assert completion.logprobs == pytest.approx(found, abs=1e-4)
    # The image matters: the same ids with the other one are scored otherwise.
    request = asked[0]._replace(images=shown(family, 1))
    ids = written(family, asked)[0][0].ids
    assert read_anew(family, request, ids) != pytest.approx(read_anew(family, asked[0], ids), abs=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_rows_do_not_notice_one_another(family: str) -> None:
    """Several completions of each prompt, and each prompt by itself."""
    asked = requests(family, samples=3)
    together = written(family, asked, temperature=1.0)
    alone = [written(family, [request], temperature=1.0)[0] for request in asked]
    ids = [[one.ids for one in completions] for completions in together]
    assert ids == [[one.ids for one in completions] for completions in alone]
    assert len({tuple(one) for one in ids[0]}) > 1


def test_a_tower_runs_once_for_all_completions_of_a_prompt() -> None:
    model, asked, calls = vision_model("llava"), requests("llava", samples=4), []
    handle = model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    written("llava", asked, temperature=1.0)
    handle.remove()
    assert len(calls) == 2


def test_who_sees_nothing_is_shown_nothing() -> None:
    text = vision_model("llava").model.language_model
    with pytest.raises(
        ValueError, match="a prompt has images, and Qwen3Model makes nothing of them; expected a vision"
    ):
        InProcess(text).generate(requests("llava")[:1], Decoding(max_new_tokens=1), stop=lambda: False)
