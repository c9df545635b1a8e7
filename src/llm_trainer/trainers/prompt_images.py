"""The images of prompts in reinforcement learning: opened for whoever draws completions, and kept in the rows of a rollout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from llm_trainer.data.encode.pictured import BYTES, Place, find_places, image_columns
from llm_trainer.data.encode.templates import ChatTemplateError
from llm_trainer.data.rollouts import Prompt
from llm_trainer.data.vision import ImageFormat
from llm_trainer.image_batch import ImageBatch
from llm_trainer.models.seeing import may_be_shown_images, placeholder_of
from llm_trainer.models.vision import Vision

Row = dict[str, np.ndarray]


@dataclass(frozen=True)
class PromptImages:
    """What becomes of the images of prompts.

    Args:
        images: what makes tokens and numbers of them.
        refused: who of the run takes none, and what to do; empty: everybody does.
    """

    images: ImageFormat
    refused: str = ""

    def opened(self, prompt: Prompt) -> ImageBatch | None:
        """The images of a prompt, as a sampler takes them; None: it shows none.

        Raises:
            ValueError: somebody takes none, or its ids have other placeholders than its images need.
            DataError: one is gone, or has changed since it was counted.
        """
        self._places(prompt)
        if not prompt.images:
            return None
        self.check()
        return self.images.opened([(prompt.images, prompt.place)])

    def check(self) -> None:
        """
        Raises:
            ValueError: somebody takes no images.
        """
        if self.refused:
            raise ValueError(f"prompts show images, and {self.refused}")

    def keep(self, prompt: Prompt, rows: Sequence[Row]) -> None:
        """Give the rows of a prompt their columns of images; bytes that are in no file are in the first of them alone."""
        columns = image_columns([(prompt.images, self._places(prompt))])
        for number, row in enumerate(rows):
            row |= columns
            if number:
                row[BYTES] = columns[BYTES][:0]

    def _places(self, prompt: Prompt) -> list[Place]:
        """Where its images stand among its ids."""
        try:
            return find_places(prompt.ids, prompt.images, self.images)
        except ChatTemplateError as error:
            raise ValueError(f"{prompt.place}, number {prompt.number} of a rollout: {error}") from error


def why_not_shown(reader: nn.Module, who: str, expected: str, images: ImageFormat) -> str:
    """Why a model beside the policy cannot be shown the images of prompts, and what to do; empty: it can.

    Args:
        reader: the model, as `models.seeing.may_be_shown_images` takes it.
        who: it is, for messages.
        expected: in place of one that reads text.
        images: what makes tokens and numbers of them.
    """
    if not may_be_shown_images(reader):
        return f"{who} reads text alone; expected {expected}, or prompts of text"
    theirs = placeholder_of(reader)
    if theirs is not None and theirs != images.image_token_id:
        return (
            f"the placeholder of an image is token {theirs} for {who}, and {images.image_token_id} for the policy; expected "
            f"models of one family"
        )
    return ""


def format_of(images: Any, processor: Any, model: nn.Module) -> ImageFormat | None:
    """What makes tokens and numbers of images for a model; None: it sees none, or nobody says how.

    Args:
        images: that is given; None: made of the processor.
        processor: of the model's folder; None: there is none.
    """
    if Vision.of(model).model is None:
        return None
    if images is None and processor is not None:
        images = ImageFormat(processor)
    found: ImageFormat | None = images
    return found


def never_drawn(model: nn.Module) -> tuple[int, ...]:
    """Ids that stand for images, which no policy writes."""
    vision = Vision.of(model)
    return () if vision.model is None else (vision.image_token_id,)
