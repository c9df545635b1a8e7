"""Images of rows: counted by their headers, opened upright and in RGB, and what cannot be used named."""

import io
import struct
import zlib
from pathlib import Path

import pytest

pytest.importorskip("PIL")
import numpy as np
from PIL import Image

from llm_trainer.data.images import count_image, in_bytes, open_image
from llm_trainer.data.read.errors import DataError, Location
from vision_data import file_of, picture

HERE = Location("rows.jsonl", 3)
SQUARE = Image.new("RGB", (8, 8), "red")


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says this size, and nothing else."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def animated(kind: str = "GIF") -> bytes:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:])


def icon(picture: bytes) -> bytes:
    """An ICO of 8 x 8 pixels that holds this file, as it says."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 8, 8, 0, 0, 1, 32, len(picture), 22) + picture


BAD = {
    "empty": (b"", "rows.jsonl:3: found an empty file; expected an image", "image_empty"),
    "text": (b"this is no image at all", "no image \\(it begins with b'this is no image", "image_unknown"),
    "cut jpeg": (file_of(picture(64, 64), "JPEG")[:900], "a JPEG file that was cut off", "image_damaged"),
    "cut png": (file_of(picture(64, 64))[:900], "a PNG file that was cut off", "image_damaged"),
    "1 x 1": (file_of(Image.new("RGB", (1, 1))), "an image of 1 x 1 pixels", "image_shape"),
    "a line": (file_of(Image.new("RGB", (20_000, 1))), r"an image of 1 x 20,000 pixels", "image_shape"),
    "bomb": (png_of(20_000, 20_000), "an image that would fill the memory", "image_too_large"),
    "large": (png_of(10_000, 9_000), "an image that would fill the memory", "image_too_large"),
    "bomb in an icon": (icon(png_of(20_000, 20_000)), "an image that would fill the memory", "image_too_large"),
    "animated": (animated(), r"an animated image, or one of several pages \(3 frames\)", "image_animated"),
    "animated png": (animated("PNG"), r"an animated image, or one of several pages \(3 frames\)", "image_animated"),
    "strange pixels": (b"DDS " + struct.pack("<7I", 124, 0, 8, 8, 0, 0, 0) + bytes(200), "a damaged", "image_damaged"),
    "floats": (file_of(Image.new("F", (8, 8)), "TIFF"), "numbers without a largest one", "image_mode"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_found_while_counting(name: str) -> None:
    data, message, reason = BAD[name]
    with pytest.raises(DataError, match=message) as found:
        count_image(data, None, HERE)
    assert found.value.reason == reason and str(found.value).startswith("rows.jsonl:3")


def test_a_path_stays_in_its_folder_and_nothing_is_downloaded(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data", tmp_path / "other.png"
    inside.mkdir()
    outside.write_bytes(file_of(SQUARE))
    (inside / "link.png").symlink_to(outside)
    (inside / "circle.png").symlink_to(inside / "circle.png")
    (inside / "good.png").write_bytes(file_of(SQUARE))
    (inside / "text.png").write_text("not a picture")
    assert count_image("good.png", inside, HERE) == count_image(str(inside / "good.png"), inside, HERE)
    for source, message in {
        "../other.png": "which leads to .*other.png; expected a file in .*data",
        str(outside): "expected a file in",
        "link.png": "which leads to .*other.png",
        "https://example.org/a.png": "the address 'https://example.org/a.png'; expected a path, or bytes",
        "file:///etc/a.png": "the address",
        "data:image/png;base64,AAAA": "the address 'data:image/png",
        "none.png": "no file at .*none.png; .* fix: set data_loader_config.image_root",
        "circle.png": "names no file|no file at",
        "a\0.png": r"'a\\x00.png' \(6 characters\), which names no file .*embedded null",
        "iVBORw0KGgo" * 400: r"\(4,400 characters\), which names no file .*; fix: name files, or store their bytes",
        "text.png": r"no image \(it begins with b'not a picture'\), in .*text.png",
    }.items():
        with pytest.raises(DataError, match=message):
            count_image(source, inside, HERE)


def pixels(image: Image.Image, kind: str = "PNG", **how: object) -> np.ndarray:
    data = file_of(image, kind, **how)
    opened = open_image(count_image(data, None, HERE), HERE)
    assert opened.mode == "RGB"
    return np.asarray(opened)


def test_every_kind_of_image_becomes_rgb() -> None:
    grey = Image.new("L", (8, 8), 100)
    assert (pixels(grey) == 100).all()
    wide = Image.fromarray(np.full((8, 8), 100 * 257, dtype=np.uint16))
    assert wide.mode == "I;16" and (pixels(wide) == 100).all()  # 16 bits: scaled, not clipped
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixels(ink, "JPEG", quality=95)[4, 4]
    assert red[0] > 200 and max(red[1], red[2]) < 60
    hole = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (pixels(hole) == 255).all()  # as on a page, not what is hidden below
    half = Image.new("LA", (8, 8), (0, 127))
    assert (pixels(half) == 128).all()
    colors = Image.new("P", (8, 8), 1)
    colors.putpalette([255, 0, 0, 0, 0, 255])
    assert (pixels(colors) == [0, 0, 255]).all()
    assert (pixels(colors, transparency=1) == 255).all()
    assert (pixels(Image.new("1", (8, 8), 1)) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_upright_as_its_camera_says(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file_of(picture(16, 24), "JPEG", exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    ref = count_image(data, None, HERE)
    assert (ref.width, ref.height) == expected.size
    assert np.array_equal(np.asarray(open_image(ref, HERE)), np.asarray(expected))
    assert np.array_equal(
        pixels(picture(16, 24), exif=exif.tobytes()),
        np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file_of(picture(16, 24), exif=exif.tobytes()))))),
    )


def test_an_image_that_changed_since_it_was_counted_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(file_of(picture(seed=1)))
    ref = count_image("a.png", tmp_path, HERE)
    assert open_image(ref, HERE).size == (30, 20)
    path.write_bytes(file_of(picture(seed=2)))
    with pytest.raises(DataError, match="rows.jsonl:3: found another image than the one that was counted"):
        open_image(ref, HERE)
    path.unlink()
    with pytest.raises(DataError, match="no file at"):
        open_image(ref, HERE)


def test_damage_behind_the_header_is_found_when_it_is_decoded() -> None:
    data = bytearray(file_of(picture(64, 64)))
    middle = len(data) // 2
    data[middle : middle + 64] = bytes(64)
    ref = count_image(bytes(data), None, HERE)
    # where it is opened no row is dropped any more, and the fix is another one
    with pytest.raises(
        DataError, match="a damaged image .*; fix: .*`llm-trainer data check FILE .*` opens every image"
    ):
        open_image(ref, HERE)


def test_a_file_that_may_not_be_read_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(file_of(SQUARE))

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"found what cannot be read \(Permission denied\), in .*a.png"):
        count_image("a.png", tmp_path, HERE)


def test_counting_decodes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageFile

    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert count_image(file_of(SQUARE), None, HERE)[1:3] == (8, 8)
    assert count_image(file_of(SQUARE, "JPEG"), None, HERE)[1:3] == (8, 8)


def test_a_cameras_jpeg_with_a_preview_behind_it_is_one_picture() -> None:
    data = file_of(picture(), "MPO", save_all=True, append_images=[picture(seed=1)], quality=95)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    ref = count_image(data, None, HERE)
    assert open_image(ref, HERE).size == (30, 20) and (ref.height, ref.width) == (20, 30)


def in_memory(image: Image.Image) -> np.ndarray:
    return np.asarray(open_image(count_image(in_bytes(image, HERE), None, HERE), HERE))


def test_an_image_in_memory_is_a_file() -> None:
    assert np.array_equal(in_memory(picture()), np.asarray(picture()))
    assert in_bytes("a.png", HERE) == "a.png"
    # a format may have no place for what is in memory: inks, how the camera was held
    assert (in_memory(Image.new("CMYK", (8, 8), (0, 255, 255, 0))) == [255, 0, 0]).all()
    exif = Image.Exif()
    exif[0x0112] = 6
    held = Image.open(io.BytesIO(file_of(picture(16, 24), "JPEG", exif=exif.tobytes())))
    assert in_memory(held).shape == (24, 16, 3)


IN_MEMORY = {
    "animated": (lambda: Image.open(io.BytesIO(animated())), "image_animated"),
    "numbers": (lambda: Image.fromarray(np.full((8, 8), 70_000, dtype=np.int32)), "image_mode"),
    "1 x 1": (lambda: Image.new("RGB", (1, 1)), "image_shape"),
    "cut off": (lambda: Image.open(io.BytesIO(file_of(picture(64, 64))[:900])), "image_damaged"),
}


@pytest.mark.parametrize("name", IN_MEMORY)
def test_what_cannot_be_used_in_memory_is_found_too(name: str) -> None:
    make, reason = IN_MEMORY[name]
    with pytest.raises(DataError) as found:
        in_bytes(make(), HERE)
    assert found.value.reason == reason
