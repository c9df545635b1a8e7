"""Rows of the table that show images, and the model that sees them."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

IMAGE, PER_IMAGE = 2, 4  # the id of a placeholder, and how many an image has
SIDE, DISTINCT = 8, 5  # pixels, images


class Shown(NamedTuple):
    """What a row says of an image."""

    digest: str


class Shades:
    """Images that are noise, each by its number: what `data.vision.ImageFormat` is to collation."""

    image_token_id = IMAGE

    def open(self, ref: Shown, _: Any) -> int:
        return int(ref.digest)

    def batch(self, images: list[int], uses: list[list[int]]) -> Any:
        from llm_trainer.image_batch import ImageBatch

        noise = np.random.default_rng(5).standard_normal((DISTINCT, 3, SIDE, SIDE)).astype(np.float32)
        order = [which for row in uses for which in row]
        counts = torch.tensor([len(row) for row in uses])
        lengths = torch.full((len(images),), PER_IMAGE)
        return ImageBatch({"pixel_values": torch.from_numpy(noise[images])}, torch.tensor(order), counts, lengths)


class Pictured:
    """Rows with one image or two, and rows of text alone.

    In the second step those of the first of two ranks show images and have no term; in the third it has text alone.
    """

    def __init__(self, rows: Any, per_step: int) -> None:
        self.rows, self.file_sizes = rows, rows.file_sizes
        numbers = np.arange(len(rows.lengths))
        self.counts = 1 + numbers // 2 % 2
        step, is_even = numbers // per_step, numbers % 2 == 0
        self.counts[(step == 0) & (numbers % 3 == 0)] = 0
        self.counts[(step == 1) & ~is_even] = 0
        self.counts[(step == 2) & is_even] = 0
        self.lengths = rows.lengths + PER_IMAGE * self.counts

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, count = self.rows[index], int(self.counts[index])
        added = np.full(count * PER_IMAGE, IMAGE)
        found = row | {"document_lengths": [int(self.lengths[index])], "place": f"row {index}"}
        found["input_ids"] = np.insert(row["input_ids"], 1, added)  # behind the first token
        for name in ("trained", "loss_weights"):
            if name in row:
                found[name] = np.insert(row[name], 1, np.zeros(len(added), dtype=row[name].dtype))
        if count:
            found["images"] = [Shown(str((index + use) % DISTINCT)) for use in range(count)]
        return found


@cache
def _shape() -> Any:
    from llm_trainer.config.schema import VisionConfig, VLMConfig

    tower = VisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=4)
    text: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return VLMConfig(**text, num_key_value_heads=2, vision=tower, image_token_id=IMAGE)


def vision_model(seed: int = 0) -> Any:
    """A LLaVA of a tower with one layer and the table's language model."""
    from llm_trainer.models.build import build_model

    torch.manual_seed(seed)
    return build_model(_shape(), attention="sdpa")
