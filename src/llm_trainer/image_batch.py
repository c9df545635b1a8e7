"""The images of a micro-batch: what the collation of rows makes, models read and every device gets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree

ON_HOST = ("document_lengths",)  # what the host reads of a batch
# How the keys of what belongs to images begin: a model says itself which images are whose.
OF_IMAGES = ("pixel_", "image", "video_")


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """The key `images` of a batch; absent where no row has an image.

    Each distinct image is there once, whatever the number of rows that show it. Only `inputs` go to a device: the host
    reads the others.

    Attributes:
        inputs: what the model takes of the distinct images, `pixel_values` and whatever its processor puts beside it.
        order: `[uses]` which distinct image each use shows, in the order of the placeholders, row after row.
        counts: `[rows]` uses of each sample.
        lengths: `[distinct]` placeholder tokens of each.
    """

    inputs: dict[str, torch.Tensor]
    order: torch.Tensor
    counts: torch.Tensor
    lengths: torch.Tensor

    @property
    def num_placeholders(self) -> int:
        """Placeholder tokens of all uses."""
        return int(self.lengths[self.order].sum())

    def of_rows(self, rows: Sequence[int]) -> "ImageBatch":
        """The uses of some rows, in that order; the images are all there still."""
        uses = self.order.split(self.counts.tolist())
        order = torch.cat([self.order[:0], *(uses[row] for row in rows)])
        return replace(self, order=order, counts=self.counts[torch.tensor(list(rows), dtype=torch.long)])

    def to(self, device: torch.device | str) -> "ImageBatch":
        """The same images on a device."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs)

    def pin_memory(self) -> "ImageBatch":
        """The same images in page-locked memory; a loader calls this."""
        inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        return replace(self, inputs=inputs)


def _taken_apart(batch: ImageBatch) -> tuple[list[Any], None]:
    return [batch.inputs, batch.order, batch.counts, batch.lengths], None


def _put_together(parts: Iterable[Any], _: None) -> ImageBatch:
    return ImageBatch(*parts)


# Whoever walks through the inputs of a forward, to bring them to another process, finds the tensors inside.
_pytree.register_pytree_node(ImageBatch, _taken_apart, _put_together)


def moved(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """A batch on `device`, images included; what the host reads of it (`ON_HOST`) and what is no tensor stay."""
    found = dict(batch)
    for name, value in batch.items():
        if isinstance(value, ImageBatch):
            found[name] = value.to(device)
        elif isinstance(value, torch.Tensor) and name not in ON_HOST:
            found[name] = value.to(device, non_blocking=True)
    return found


def of_images(batch: Mapping[str, Any]) -> list[str]:
    """The keys of a batch that belong to images."""
    return [name for name in batch if name.startswith(OF_IMAGES)]


def num_pixels(batch: Any) -> int:
    """Numbers that the pixels of a batch are, each distinct image once; 0 where it shows none."""
    if not isinstance(batch, Mapping):
        return 0
    images = batch.get("images")
    pixels = batch.get("pixel_values")
    if isinstance(images, ImageBatch):
        pixels = images.inputs.get("pixel_values")
    return pixels.numel() if isinstance(pixels, torch.Tensor) else 0


def require_text(batch: Mapping[str, Any], who: str) -> None:
    """
    Args:
        batch: that images would be lost of.
        who: takes no images, and why.

    Raises:
        ValueError: it has images.
    """
    images = of_images(batch)
    if images:
        raise ValueError(
            f"{who}; found a batch with {', '.join(images)}, expected batches of text. SFTTrainer, Trainer, DPOTrainer, "
            "KTOTrainer, RewardTrainer, GRPOTrainer and PPOTrainer take images"
        )
