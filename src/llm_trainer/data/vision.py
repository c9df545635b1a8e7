"""What an image is in tokens and in numbers, as the processor of a model's folder says.

How many tokens an image takes depends on its size alone. The processor is asked once per size, of a blank image, so that
every length is known before a pixel is decoded, whatever a family of models does with its images.
"""

import json
from collections.abc import Sequence
from copy import copy, deepcopy
from functools import cached_property
from itertools import groupby
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llm_trainer.config.errors import ConfigError
from llm_trainer.data.images import REPAIR, ImageRef, count_image, open_image
from llm_trainer.data.read.errors import DataError, Location

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from llm_trainer.image_batch import ImageBatch

OF_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")  # what a processor makes of text
_ASKING = Lock()
_BLANK = (64, 64)  # height and width of an image that every processor takes
_FIX = "use the tokenizer in the folder of the model (tokenizer: null takes it)"
_COMPARED = (_BLANK, (48, 80))  # height and width of pictures by which two formats are compared
_PATCH = 14  # pixels of a patch's side where nobody says it: that of CLIP's and SigLIP's towers


class ImageTokens(NamedTuple):
    """What stands for an image of some size.

    Attributes:
        text: in the text before it is tokenised; a run of placeholders is one there.
        runs: how many placeholders each of these is.
        ids: all of it, tokenised by itself.
        tower: patches that the tower sees.
    """

    text: str
    runs: tuple[int, ...]
    ids: list[int]
    tower: int


class ImageFormat:
    """How images become tokens and numbers, for training and for generation alike.

    Args:
        processor: of a vision-language model's folder (`AutoProcessor`).
        patch_size: pixels of the side of what the tower sees as one token; None: as the processor says, where it does.
        max_pixels: larger images are made smaller, to at most this many.

    Attributes:
        marker: what stands for an image in the text of the chat template.
        image_token_id: the placeholder in ids, once per feature of the tower.

    Raises:
        ConfigError: the processor takes no images, or its tokenizer lacks the tokens that stand for them.
    """

    def __init__(self, processor: Any, patch_size: int | None = None, max_pixels: int | None = None) -> None:
        marker = getattr(processor, "image_token", None)
        if marker is None or getattr(processor, "image_processor", None) is None:
            raise ConfigError(
                f"processor: {type(processor).__name__} makes nothing of images; expected that of a vision-language model"
            )
        # Its tokenizer is its own: it leaves its padding in it, and no other thread may use it meanwhile.
        self.processor = copy(processor)
        self.processor.tokenizer = deepcopy(processor.tokenizer)
        self.marker, self.max_pixels = str(marker), max_pixels
        said = [getattr(part, "patch_size", None) for part in (processor, processor.image_processor)]
        self.patch_size: int = next(size for size in (patch_size, *said, _PATCH) if size)
        self.image_token_id = int(processor.image_token_ids[0])
        self._of_size: dict[tuple[int, int], ImageTokens] = {}
        self._check_tokens()

    def _check_tokens(self) -> None:
        tokenizer = self.processor.tokenizer
        for name, token in {"image_token": self.marker, "placeholder": self.placeholder}.items():
            ids = tokenizer.encode(token, add_special_tokens=False)
            if len(ids) != 1 or tokenizer.convert_tokens_to_ids(token) == tokenizer.unk_token_id is not None:
                raise ConfigError(
                    f"{name} {token!r}: the tokenizer writes it as {len(ids)} tokens; expected one, which no text is; {_FIX}"
                )
        try:
            is_known = bool(self.tokens(*_BLANK).runs)
        except ValueError:  # a processor that counts its placeholders
            is_known = False
        if not is_known:
            raise ConfigError(
                f"image_token {self.marker!r}: the tokenizer has it as id {tokenizer.convert_tokens_to_ids(self.marker)}, and "
                f"{type(self.processor).__name__} makes placeholders of id {self.image_token_id}; expected the ids of the "
                f"model; {_FIX}"
            )

    @cached_property
    def placeholder(self) -> str:
        """The text of the placeholder."""
        return str(self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id))

    def for_a_thread(self) -> "ImageFormat":
        """The same for a thread beside others: no two may use a tokenizer at once."""
        found = copy(self)
        found.processor = copy(self.processor)
        found.processor.tokenizer = deepcopy(self.processor.tokenizer)
        return found

    def tokens(self, height: int, width: int) -> ImageTokens:
        """All that is known of images of a size; a processor that refuses it raises what it raises."""
        size = self.limited(height, width)
        if size not in self._of_size:
            with _ASKING:  # of the threads that encode, one at a time: the tokenizer inside is no two threads' at once
                self._of_size[size] = self._ask(*size)
        return self._of_size[size]

    def count(self, source: str | bytes, root: Path | None, location: Location) -> ImageRef:
        """Read how large an image is, and that the processor takes it.

        Raises:
            DataError: it is missing or damaged, or has a size that the processor refuses.
        """
        ref = count_image(source, root, location)
        try:
            self.tokens(ref.height, ref.width)
        except ValueError as error:  # what processors raise
            found = f"an image of {ref.height:,} x {ref.width:,} pixels (height x width)"
            expected = f"a size that {type(self.processor).__name__} takes ({error})"
            raise DataError(location, found, expected, REPAIR, "image_refused") from error
        return ref

    def open(self, ref: ImageRef, location: Location) -> Any:
        """An image that was counted, as `batch` takes it: its pixels.

        Raises:
            DataError: it is gone, damaged, or another one than when it was counted.
        """
        return open_image(ref, location)

    def ids(self, height: int, width: int) -> list[int]:
        """The tokens of an image, all that the processor puts in the marker's place."""
        return self.tokens(height, width).ids

    def num_placeholders(self, height: int, width: int) -> int:
        """Placeholder tokens of an image: features of the tower."""
        return sum(self.tokens(height, width).runs)

    def tower_tokens(self, height: int, width: int) -> int:
        """Patches of an image that the tower sees, for token budgets."""
        return self.tokens(height, width).tower

    def limited(self, height: int, width: int) -> tuple[int, int]:
        """The size that an image is made smaller to, or its own."""
        if self.max_pixels is None or height * width <= self.max_pixels:
            return height, width
        scale = (self.max_pixels / (height * width)) ** 0.5
        return max(1, int(height * scale)), max(1, int(width * scale))

    def numbers(self, images: Sequence["Image"]) -> dict[str, "torch.Tensor"]:
        """What the model takes of some images, in the layout of its processor: `pixel_values` and what belongs to it."""
        shown = []
        for image in images:
            height, width = self.limited(image.height, image.width)
            if (width, height) != image.size:
                image = image.resize((width, height))
            shown.append(image)
        return self._processed(shown)

    def batch(self, images: Sequence["Image"], uses: Sequence[Sequence[int]]) -> "ImageBatch":
        """The images of a micro-batch.

        Args:
            images: each distinct one once.
            uses: of each row, which of these it shows, in the order of its placeholders.
        """
        import torch

        from llm_trainer.image_batch import ImageBatch

        order = np.concatenate([np.asarray(row, dtype=np.int64) for row in uses])
        lengths = [self.num_placeholders(image.height, image.width) for image in images]
        counts = [len(row) for row in uses]
        return ImageBatch(self.numbers(images), torch.from_numpy(order), torch.tensor(counts), torch.tensor(lengths))

    def opened(self, rows: Sequence[tuple[Sequence[ImageRef], str]]) -> "ImageBatch | None":
        """The images of a micro-batch, each distinct one opened once; None: there are none.

        Args:
            rows: of each row the images that it shows, in the order of their placeholders, and where it comes from.

        Raises:
            DataError: an image is gone, damaged, or another one than when it was counted.
        """
        numbers: dict[str, int] = {}  # digest -> which distinct image
        images, uses = [], []
        for refs, where in rows:
            shown = []
            for ref in refs:
                if ref.digest not in numbers:
                    numbers[ref.digest] = len(numbers)
                    images.append(self.open(ref, Location(where)))
                shown.append(numbers[ref.digest])
            uses.append(shown)
        return self.batch(images, uses) if images else None

    def blank(self) -> "ImageBatch":
        """One white image, which no row shows: what a tower is run on where a micro-batch has none."""
        import torch
        from PIL import Image

        from llm_trainer.image_batch import ImageBatch

        image = Image.new("RGB", _BLANK[::-1], "white")
        lengths = torch.tensor([self.num_placeholders(*_BLANK)])
        nothing = torch.zeros(0, dtype=torch.long)
        return ImageBatch(self.numbers([image]), nothing, torch.zeros(0, dtype=torch.long), lengths)

    def facts(self) -> list[Any]:
        """Everything that the tokens of an image depend on, but for its size: plain values."""
        described = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        return [type(self.processor).__name__, described, self.max_pixels]

    def difference(self, other: "ImageFormat") -> str:
        """What `other` makes otherwise of a picture, in words; empty: nothing."""
        import torch

        for height, width in _COMPARED:
            where = f"of {height} x {width} pixels"
            ours, theirs = self.ids(height, width), other.ids(height, width)
            if ours != theirs:
                return f"an image {where} becomes {len(theirs)} tokens, which are not the {len(ours)} of the run"
            picture = _picture(height, width)
            numbers, others = self.numbers([picture]), other.numbers([picture])
            if numbers.keys() != others.keys():
                return f"an image becomes {', '.join(sorted(others))} and not {', '.join(sorted(numbers))}"
            for name, values in numbers.items():
                found = others[name]
                if found.shape != values.shape:
                    return f"the {name} of an image {where} have the shape {list(found.shape)} and not {list(values.shape)}"
                if not torch.allclose(found.float(), values.float(), atol=1e-4):
                    return f"the {name} of an image {where} are other numbers"
        return ""

    def _processed(self, images: Sequence["Image"]) -> dict[str, Any]:
        """What the processor makes of some images, each in a text of its own."""
        how = {"return_tensors": "pt", "padding": True, "add_special_tokens": False}
        made = self.processor(text=[self.marker] * len(images), images=[[image] for image in images], **how)
        return {name: value for name, value in made.items() if name not in OF_TEXT}

    def _ask(self, height: int, width: int) -> ImageTokens:
        from PIL import Image

        image = Image.new("RGB", (width, height), "white")
        made = self.processor(text=[self.marker], images=[[image]], return_tensors="np", add_special_tokens=False)
        ids = np.asarray(made["input_ids"])[0].tolist()
        # 1. runs of placeholders, each cut down to one, which merges with nothing beside it
        runs, short = [], []
        for token, run in groupby(ids):
            here = list(run)
            if token == self.image_token_id:
                runs.append(len(here))
                here = here[:1]
            short += here
        # 2. as text, so that newlines around an image meet the words beside them as they do in transformers
        text = self.processor.tokenizer.decode(short, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # 3. what the tower sees: patches already, or pixels that it cuts into patches
        pixels = made["pixel_values"]
        tower = len(pixels)
        if pixels.ndim > 2:
            tower = pixels.size // (3 * self.patch_size**2)
        return ImageTokens(text, tuple(runs), ids, tower)


def _picture(height: int, width: int) -> "Image":
    """A picture whose pixels differ, the same at every call."""
    from PIL import Image

    values = np.arange(height * width * 3) * 7919 % 251
    return Image.fromarray(values.astype(np.uint8).reshape(height, width, 3))
