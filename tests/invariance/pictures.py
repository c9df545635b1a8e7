"""Rows of the table that show images, and the model that sees them."""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from llm_trainer.data.vision import ImageFormat

IMAGE, PER_IMAGE = 2, 4  # the id of a placeholder, and how many an image has
SIDE, DISTINCT = 8, 5  # pixels, images


class Shown(NamedTuple):
    """What a row says of an image."""

    digest: str


class Shades(ImageFormat):
    """Images that are noise, each by its number, without a processor."""

    def __init__(self) -> None:
        self.image_token_id = IMAGE

    def open(self, ref: Shown, _: Any) -> int:
        return int(ref.digest)

    def batch(self, images: list[int], uses: list[list[int]]) -> Any:
        from llm_trainer.image_batch import ImageBatch

        noise = np.random.default_rng(5).standard_normal((DISTINCT, 3, SIDE, SIDE)).astype(np.float32)
        order = [which for row in uses for which in row]
        counts = torch.tensor([len(row) for row in uses])
        lengths = torch.full((len(images),), PER_IMAGE)
        return ImageBatch({"pixel_values": torch.from_numpy(noise[images])}, torch.tensor(order), counts, lengths)


class Decoded(Shades):
    """The same with pictures of bytes, which are decoded when they are shown.

    Attributes:
        refs: of the pictures.
    """

    def __init__(self) -> None:
        from llm_trainer.data.images import count_image
        from llm_trainer.data.read.errors import Location
        from vision_data import file_of, picture

        super().__init__()
        self.refs = [count_image(file_of(picture(SIDE, SIDE, n)), None, Location("here")) for n in range(DISTINCT)]

    def open(self, ref: Any, location: Any) -> Any:
        from llm_trainer.data.images import open_image

        return open_image(ref, location)

    def batch(self, images: list[Any], uses: list[list[int]]) -> Any:
        made = super().batch([0] * len(images), uses)
        shades = [np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 128 - 1 for image in images]
        return replace(made, inputs={"pixel_values": torch.from_numpy(np.stack(shades))})


class Pictured:
    """Rows with one image or two, and rows of text alone.

    In the second step those of the first of two ranks show images and have no term; in the third it has text alone.
    """

    def __init__(self, rows: Any, per_step: int, refs: Any = None) -> None:
        self.rows, self.file_sizes = rows, rows.file_sizes
        self.refs = refs or [Shown(str(number)) for number in range(DISTINCT)]
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
            found["images"] = [self.refs[(index + use) % DISTINCT] for use in range(count)]
        return found


def vision_model(seed: int = 0, **changes: Any) -> Any:
    """A LLaVA of a tower with one layer and the table's language model; `changes` of this one's shape."""
    from llm_trainer.config.model import VisionConfig, VLMConfig
    from llm_trainer.models.build import build_model

    tower = VisionConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=SIDE, patch_size=4)
    text: dict[str, Any] = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = VLMConfig(**text | changes, num_key_value_heads=2, vision=tower, image_token_id=IMAGE)
    torch.manual_seed(seed)
    return build_model(shape, attention="sdpa")
