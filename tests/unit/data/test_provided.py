"""Pixels that a function of the user's makes of tags."""

from typing import Any

import pytest

pytest.importorskip("PIL")
import torch

from llm_trainer.config.errors import ConfigError
from llm_trainer.data.images import ImageRef
from llm_trainer.data.provided import ProvidedImages
from llm_trainer.data.read.errors import DataError, Location
from vision_data import PATCH, SIDE, llava_processor

HERE = Location("rows.jsonl", 1)


def provide(tags: list[str]) -> torch.Tensor:
    return torch.stack([torch.full((3, SIDE, SIDE), float(len(tag))) for tag in tags])


def numbers(provider: Any, tags: tuple[str, ...] = ("a", "bcd")) -> Any:
    images = ProvidedImages(llava_processor(), provider)
    refs = [images.count(tag, None, HERE) for tag in tags]
    return images.batch([images.open(ref, HERE) for ref in refs], [list(range(len(tags)))])


def test_tags_become_images() -> None:
    batch = numbers(provide)
    assert torch.equal(batch.inputs["pixel_values"], provide(["a", "bcd"]))
    assert batch.num_placeholders == 2 * (SIDE // PATCH) ** 2
    images = ProvidedImages(llava_processor(), provide)
    assert images.blank().inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert images.count("x", None, HERE) == ImageRef("x", 64, 64, "x")
    with pytest.raises(DataError, match="found the bytes of an image; expected a tag"):
        images.count(b"x", None, HERE)


WRONG = {
    "number": (
        lambda tags: provide(tags)[:1],
        r"got float32 \(1, 3, 16, 16\) on cpu for 2 tags, expected a float tensor \(2,",
    ),
    "shape": (lambda tags: provide(tags)[..., 1:], r"got float32 \(2, 3, 16, 15\)"),
    "dtype": (lambda tags: provide(tags).to(torch.uint8), "got uint8"),
    "type": (lambda tags: provide(tags).numpy(), "got ndarray for 2 tags"),
    "nan": (
        lambda tags: provide(tags) * torch.tensor([1.0, torch.nan])[:, None, None, None],
        "not finite for the tag 'bcd'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_provider_may_not_return(name: str) -> None:
    provider, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        numbers(provider)


@pytest.mark.parametrize("calls_before", [0, 2])
def test_other_pixels_at_the_second_call_are_an_error(calls_before: int) -> None:
    """Found at the first micro-batch already: a worker of the next epoch would know nothing of this one's."""
    calls: list[int] = []

    def drifting(tags: list[str]) -> torch.Tensor:
        calls.append(1)
        return provide(tags) + max(len(calls) - calls_before, 0)

    images = ProvidedImages(llava_processor(), drifting)
    shown = [images.open(images.count("a", None, HERE), HERE)]
    for _ in range(calls_before // 2):
        images.numbers(shown)
    with pytest.raises(ValueError, match="other pixels for the tag 'a' than when it was asked before"):
        images.numbers(shown)


def test_what_a_model_of_the_users_makes_teaches_it_nothing() -> None:
    weight = torch.ones(1, requires_grad=True)
    batch = numbers(lambda tags: weight * provide(tags))
    assert not batch.inputs["pixel_values"].requires_grad


def test_tokens_that_depend_on_a_size_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ProvidedImages, "num_placeholders", lambda self, height, width: height * width)
    with pytest.raises(ConfigError, match="expected a processor whose images are pixel_values of one size"):
        ProvidedImages(llava_processor(), provide)
