"""Images of rows: where they are, how large, whether they are still the same, and their pixels, upright and in RGB.

While rows are encoded, an image's bytes are read and hashed, and its header says how large it is; nothing is decoded. Its
pixels are decoded where a micro-batch is collated, of the same bytes or not at all.
"""

import hashlib
import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llm_trainer.config.errors import counted
from llm_trainer.data.read.errors import DataError, Location

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 89_478_485  # as Pillow warns from: a quarter of a GiB in RGB
MOST_ELONGATED = 200  # of the longer side to the shorter one; Qwen's processors refuse from there too
SMALLEST_SIDE = 2  # pixels
_ORIENTATION = 0x0112  # EXIF 2.3, table 4
_UPRIGHT_BY = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation -> Pillow's Transpose that undoes it
_ON_THEIR_SIDE = (5, 6, 7, 8)  # orientations that swap height and width
_SCHEME = re.compile(r"(?i)(data:|[a-z][a-z0-9+.-]*://)")
_SET_ROOT = "set data_loader_config.image_root (of a command: --image-root)"
_END_OF_JPEG, _SCAN_OF_JPEG = b"\xff\xd9", b"\xff\xda"
# Counting asks this; what only decoding finds is found in the middle of a run, where no row can be left out any more.
REPAIR = "repair or remove the row, or set data_loader_config.bad_images: drop"
REPAIR_OPENED = (
    "repair or remove the row; `llm-trainer data check FILE --tokenizer FOLDER` opens every image and names all such rows, "
    "where bad_images looks at headers alone"
)
# What Pillow's readers raise of damaged files, each its own.
_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    RuntimeError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
)


class ImageRef(NamedTuple):
    """An image that was counted.

    Attributes:
        source: an absolute path, or the bytes of a file.
        height: pixels, as it stands upright.
        width: pixels.
        digest: of the bytes of the file.
    """

    source: str | bytes
    height: int
    width: int
    digest: str


def is_address(source: str) -> bool:
    """Whether it is a URL or a `data:` URI, and no path."""
    return _SCHEME.match(source) is not None


def image_file(source: str, root: Path | None, location: Location) -> Path:
    """Where an image lies.

    Args:
        source: a path, absolute or below `root`.
        root: folder that no path may lead out of; None: any path.
        location: of the row, for messages.

    Raises:
        DataError: a URL, a path out of the folder, or nothing there.
    """
    if is_address(source):
        found = f"the address {source[:60]!r}"
        fix = "fetch the images first and name files; nothing is downloaded in training"
        raise DataError(location, found, "a path, or bytes", fix, "image_address")
    path = Path(source) if root is None else root / source
    try:
        target, is_file = path.resolve(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # longer than names are, a circle of links, a zero in it
        why = getattr(error, "strerror", None) or error
        found = f"{source[:60]!r} ({counted(len(source), 'character')}), which names no file ({why})"
        fix = 'name files, or store their bytes as {"bytes": ...}'
        raise DataError(location, found, "a path", fix, "image_missing") from error
    if root is not None and not target.is_relative_to(root.resolve()):
        found = f"the path {source!r}, which leads to {target}"
        fix = f"{_SET_ROOT} to a folder above all images"
        raise DataError(location, found, f"a file in {root.resolve()}", fix, "image_outside")
    if not is_file:
        found = f"no file at {path}"
        fix = f"{_SET_ROOT} to the folder that paths begin in; or {REPAIR}"
        raise DataError(location, found, "an image", fix, "image_missing")
    return path


def count_image(source: str | bytes, root: Path | None, location: Location) -> ImageRef:
    """Read how large an image is, and what its bytes are; its pixels are not decoded.

    Args:
        source: a path, absolute or below `root`; or the bytes of a file.
        root: as for `image_file`.
        location: of the row, for messages.

    Returns:
        It, a path being absolute.

    Raises:
        DataError: it is missing, damaged, or no single picture of a size that can be used.
    """
    if isinstance(source, str):
        source = str(image_file(source, root, location).absolute())
    with _about(source):
        data = _bytes_of(source, location)
        with _opened(data, location) as image:
            width, height = image.size
            if _orientation(image) in _ON_THEIR_SIDE:
                width, height = height, width
            _check_shape(image, height, width, location)
            _check_whole(image, data, location)
    return ImageRef(source, height, width, _digest(data))


def open_image(ref: ImageRef, location: Location) -> "Image":
    """The pixels of an image that was counted: RGB, upright, on white where it is transparent.

    Raises:
        DataError: it is gone, has changed since it was counted, or cannot be decoded.
    """
    with _about(ref.source, REPAIR_OPENED):
        data = _bytes_of(ref.source, location)
    if _digest(data) != ref.digest:
        found = f"another image than the one that was counted ({ref.height} x {ref.width} pixels)"
        fix = "put it back, or count again: `llm-trainer data cache` shows the folder to remove"
        with _about(ref.source):
            raise DataError(location, found, "the same bytes as then", fix, "image_changed")
    with _about(ref.source, REPAIR_OPENED), _opened(data, location) as image:
        return _upright(image)


def in_bytes(value: Any, location: Location) -> Any:
    """An image in memory (Pillow's), as `datasets` makes of a column of images, as a file's bytes; other values as they are.

    Raises:
        DataError: it cannot be decoded, or is no single picture of a size that can be used.
    """
    if type(value).__module__.partition(".")[0] != "PIL":
        return value
    file = io.BytesIO()
    with _decoding(location):
        _check_shape(value, value.height, value.width, location)
        _upright(value).save(file, format="PNG")
    return file.getvalue()


def _bytes_of(source: str | bytes, location: Location) -> bytes:
    data = source
    if isinstance(data, str):
        try:
            data = image_file(data, None, location).read_bytes()
        except OSError as error:
            found = f"what cannot be read ({error.strerror})"
            raise DataError(location, found, "an image", REPAIR, "image_missing") from error
    if not data:
        raise DataError(location, "an empty file", "an image", REPAIR, "image_empty")
    return data


@contextmanager
def _about(source: str | bytes, fix: str | None = None) -> Iterator[None]:
    """Errors about an image also name its file, and perhaps another fix: of several images a row does not tell which."""
    try:
        yield
    except DataError as error:
        location, found, expected, usual_fix, reason = error.said
        if isinstance(source, str) and source not in found:
            found += f", in {source}"
        raise DataError(location, found, expected, fix or usual_fix, reason) from error.__cause__


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


@contextmanager
def _opened(data: bytes, location: Location) -> "Iterator[Image]":
    """An image of which the header is read; what its readers raise is an error that says where it is."""
    from PIL import Image, UnidentifiedImageError

    with _decoding(location):
        try:
            image = Image.open(io.BytesIO(data))
        except UnidentifiedImageError as error:
            found = f"no image (it begins with {data[:16]!r})"
            raise DataError(location, found, "an image", REPAIR, "image_unknown") from error
        with image:
            yield image


@contextmanager
def _decoding(location: Location) -> Iterator[None]:
    from PIL import Image

    try:
        yield
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(str(error), location) from error
    except _FAULTS as error:
        found = f"a damaged image ({error})"
        raise DataError(location, found, "one that can be decoded", REPAIR, "image_damaged") from error


def _too_large(found: str, location: Location) -> DataError:
    expected = f"at most {MOST_PIXELS:,} pixels"
    return DataError(location, f"an image that would fill the memory ({found})", expected, REPAIR, "image_too_large")


def _check_shape(image: "Image", height: int, width: int, location: Location) -> None:
    """Refuse what is no single picture, or none that has anything to see.

    Raises:
        DataError: it is.
    """
    if height * width > MOST_PIXELS:
        raise _too_large(f"{height:,} x {width:,} pixels", location)
    if min(height, width) < SMALLEST_SIDE or max(height, width) > MOST_ELONGATED * min(height, width):
        found = f"an image of {height:,} x {width:,} pixels (height x width)"
        expected = f"sides of at least {SMALLEST_SIDE} pixels, the longer at most {MOST_ELONGATED} times the shorter"
        raise DataError(location, found, expected, REPAIR, "image_shape")
    frames = getattr(image, "n_frames", 1)  # formats without frames do not say
    if frames > 1 and image.format != "MPO":  # a camera's JPEG, with a preview or a second eye behind the picture
        found = f"an animated image, or one of several pages ({counted(frames, 'frame')})"
        raise DataError(location, found, "a single picture", "store one frame; or " + REPAIR, "image_animated")
    if image.mode in ("I", "F"):
        found = f"an image of numbers without a largest one (mode {image.mode})"
        raise DataError(location, found, "8 or 16 bits a channel", "convert it; or " + REPAIR, "image_mode")


def _check_whole(image: "Image", data: bytes, location: Location) -> None:
    """Refuse a file that was cut off, as far as this can be seen without decoding.

    Raises:
        DataError: it was.
    """
    is_whole = True
    if image.format in ("JPEG", "MPO"):
        # Inside a scan the byte 255 is followed by 0, so the last mark of a scan is that of the last scan.
        is_whole = data.rfind(_END_OF_JPEG) > data.rfind(_SCAN_OF_JPEG)
    elif image.format == "PNG":
        is_whole = b"IEND" in data[-64:]
    if not is_whole:
        found = f"a {image.format} file that was cut off ({counted(len(data), 'byte')})"
        raise DataError(location, found, "a whole file", "fetch it again; or " + REPAIR, "image_damaged")


def _orientation(image: "Image") -> int:
    """How a camera was held (EXIF), 1 where it was upright or nothing is said."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # NOTE: Pillow would decode all of it to look behind the pixels
    return int(image.getexif().get(_ORIENTATION, 1))


def _upright(image: "Image") -> "Image":
    """The pixels of an opened image, as its camera was held, three channels of 8 bits."""
    orientation = _orientation(image)
    image.load()
    upright = _as_rgb(image)
    if orientation in _UPRIGHT_BY:
        upright = upright.transpose(_UPRIGHT_BY[orientation])  # type: ignore[arg-type]
    return upright


def _as_rgb(image: "Image") -> "Image":
    """Three channels of 8 bits; what is transparent shows white behind it, as on a page."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        wide = np.asarray(image, dtype=np.uint32)
        image = Image.fromarray((wide * 255 // 65535).astype(np.uint8))  # Pillow would clip at 255
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        page = Image.new("RGBA", pixels.size, "white")
        image = Image.alpha_composite(page, pixels)
    return image.convert("RGB")
