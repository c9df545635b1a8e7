"""Images that a function of the user's makes of their tags: its numbers are checked, and held to what they were before."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm_trainer.config.errors import ConfigError, counted
from llm_trainer.data.images import ImageRef
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.vision import ImageFormat

if TYPE_CHECKING:
    import torch

Provider = Callable[[list[str]], Any]
_NAME = "sft_config.pixel_values_provider"
_SIZES = ((64, 64), (64, 160), (200, 64))  # height and width of images that tokens must not tell apart


class Tagged(NamedTuple):
    """An image that only its tag is known of, and the size that its model sees all in."""

    tag: str
    height: int
    width: int


class ProvidedImages(ImageFormat):
    """Images as a user's function gives them: `provider(tags) -> pixel_values`, one row per tag, on the host.

    Args:
        processor: of a model that sees every image in one size.
        provider: called in the workers of loaders, once per micro-batch, with each distinct tag once; for the first one of
            every worker twice, to see whether it gives the same again.
        patch_size: as for `ImageFormat`.

    Raises:
        ConfigError: images of this processor take more than `pixel_values`, or a number of tokens that their size decides.
    """

    def __init__(self, processor: Any, provider: Provider, patch_size: int | None = None) -> None:
        super().__init__(processor, patch_size)
        self.provider = provider
        blank = self.blank()
        lengths = {self.num_placeholders(*size) for size in _SIZES}
        if len(lengths) > 1 or set(blank.inputs) != {"pixel_values"}:
            taken = " and ".join(blank.inputs)
            raise ConfigError(
                f"{_NAME}: {type(processor).__name__} makes {taken} of images, {sorted(lengths)} tokens by their "
                "size; expected a processor whose images are pixel_values of one size; name files instead, without a provider"
            )
        self._shape = tuple(blank.inputs["pixel_values"].shape[1:])
        self._digests: dict[str, bytes] = {}  # of the numbers of each tag, where they were made here before

    def facts(self) -> list[Any]:
        """As `ImageFormat.facts`; what the function makes of a tag decides no token."""
        return [*super().facts(), "provided"]

    def count(self, source: str | bytes, root: Path | None, location: Location) -> ImageRef:
        """An image of which the tag says all.

        Raises:
            DataError: it is no text.
        """
        if not isinstance(source, str):
            fix = "leave the provider out, which takes tags, or name the images in image_tags_file_dataset"
            raise DataError(location, "the bytes of an image", f"a tag for {_NAME}", fix, "image_tag")
        return ImageRef(source, *_SIZES[0], source)

    def open(self, ref: ImageRef, location: Location) -> Tagged:
        """What `batch` takes: the tag."""
        return Tagged(str(ref.source), ref.height, ref.width)

    def numbers(self, images: Sequence[Any]) -> dict[str, "torch.Tensor"]:
        """The `pixel_values` of some tags; of images that are there, as the processor makes them.

        Raises:
            ValueError: wrong in number, shape or dtype, not finite, or other ones than before.
        """
        tags = [image.tag for image in images if isinstance(image, Tagged)]
        if len(tags) < len(images):
            return super().numbers(images)
        is_first = not self._digests  # of this process: every epoch has workers of its own, which would forget
        values = self._asked(tags)
        if is_first:
            self._asked(tags)
        return {"pixel_values": values}

    def _asked(self, tags: Sequence[str]) -> "torch.Tensor":
        """What the function makes of some tags, which is what it made of them before."""
        values = self.provider(list(tags))
        self._check(values, tags)
        values = values.detach()  # nothing is learned behind a worker
        for tag, value in zip(tags, values, strict=True):
            digest = hashlib.blake2b(value.float().contiguous().numpy().tobytes(), digest_size=8).digest()
            if self._digests.setdefault(tag, digest) != digest:
                raise ValueError(
                    f"{_NAME}: other pixels for the tag {tag!r} than when it was asked before; expected the same at every "
                    "call, or a run that goes on is another run; draw nothing in it"
                )
        return values

    def _check(self, values: Any, tags: Sequence[str]) -> None:
        import torch

        expected = f"a float tensor {(len(tags), *self._shape)} on the host"
        if not isinstance(values, torch.Tensor):
            raise ValueError(
                f"{_NAME}: got {type(values).__name__} for {counted(len(tags), 'tag')}, expected {expected}"
            )
        found = f"{str(values.dtype).removeprefix('torch.')} {tuple(values.shape)} on {values.device}"
        is_right = tuple(values.shape) == (len(tags), *self._shape) and values.is_floating_point()
        if not is_right or values.device.type != "cpu":
            raise ValueError(f"{_NAME}: got {found} for {counted(len(tags), 'tag')}, expected {expected}")
        for tag, value in zip(tags, values, strict=True):
            if not value.isfinite().all():
                raise ValueError(f"{_NAME}: got numbers that are not finite for the tag {tag!r}; expected pixels")
