"""Reads prompts with images: the tower runs once for each image of a prompt, whatever the number of its completions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.generation.readers import CachedReader
from llm_trainer.image_batch import ImageBatch
from llm_trainer.models.vision import Features, Vision, joined_features, rope_positions


class SeeingReader(CachedReader):
    """A vision-language model of transformers; otherwise as `CachedReader`.

    Raises:
        ValueError: the model makes nothing of images.
    """

    def __init__(self, model: nn.Module, pad: int) -> None:
        super().__init__(model, pad)
        self.vision = Vision.of(model)
        if self.vision.model is None:
            raise ValueError(
                f"a prompt has images, and {type(model).__name__} makes nothing of them; expected a vision-language model of "
                "transformers, or prompts of text"
            )
        if pad == self.vision.image_token_id:  # what fills a row would ask for an image
            self.pad = 0 if pad else 1
        self.rope = torch.empty(0)  # [3, B, 1], the largest so far of each row, where the model counts so

    def enter(self, prompts: Sequence[Sequence[int]], images: Sequence[ImageBatch | None] = ()) -> Tensor:
        ids, positions = self._padded(prompts)
        features = self._seen(images)
        if self.vision.takes_rope_positions:
            shown = None if features is None else features.images
            self.rope = rope_positions(self.vision, ids, shown, self.mask)
        return self._forward(ids, positions, **self.vision.shown(ids, features))

    def _seen(self, images: Sequence[ImageBatch | None]) -> Features | None:
        """What the tower makes of the images of some prompts, one prompt after the other; None: they show none."""
        parts = []
        for one in images:
            if one is not None:
                parts.append(self.vision.encode(one.to(self.device)))
        return joined_features(parts) if parts else None

    def read(self, new: Tensor) -> Tensor:
        self.rope = self.rope + 1
        return super().read(new)

    def _select(self, order: Sequence[int]) -> None:
        super()._select(order)
        if self.vision.takes_rope_positions:
            self.rope = self.rope[:, torch.tensor(order, device=self.device)]

    def _forward(self, ids: Tensor, positions: Tensor, **inputs: Any) -> Tensor:
        if not self.vision.takes_rope_positions:
            return super()._forward(ids, positions, **inputs)
        logits = super()._forward(ids, torch.cat([positions[None], self.rope]), **inputs)
        self.positions = positions[:, -1:]
        # Text goes on behind the largest position of an image, in all three directions.
        self.rope = self.rope.amax((0, 2), keepdim=True).expand(3, -1, 1)
        return logits
