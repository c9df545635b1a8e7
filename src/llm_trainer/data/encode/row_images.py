"""The images of a file's rows: those that the rows name, or a csv beside them, counted before anything is encoded."""

import csv
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_trainer.config.errors import counted
from llm_trainer.data.images import ImageRef
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.pictures import images_of, num_named, num_shown, resolved, with_images

if TYPE_CHECKING:
    from llm_trainer.data.vision import ImageFormat

Rows = Iterator[tuple[Location, Any]]


class ImageError(DataError):
    """A row with an image that cannot be used.

    Attributes:
        num_images: of the row.
    """

    num_images = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return *super().__reduce__(), {"num_images": self.num_images}


@dataclass
class RowImages:
    """Where the images of a file's rows are, and what becomes of bad ones.

    Attributes:
        format: what an image is in tokens; a processor may refuse some sizes.
        root: the folder that paths begin in, and do not lead out of.
        bad: 'error' or 'drop'.
        tags: of a csv, for each row of the file the paths of its images; None: the rows have them.
        tags_path: of that csv.
    """

    format: "ImageFormat"
    root: Path
    bad: str = "error"
    tags: list[list[str]] | None = None
    tags_path: Path | None = None

    @classmethod
    def beside(
        cls, images: "ImageFormat", path: Path, root: str | None, bad: str, tags_path: str | None
    ) -> "RowImages":
        """Those of the file at `path`; paths begin in its folder where no other root is named."""
        found = cls(images, Path(root or path.parent), bad)
        if tags_path is not None:
            found.tags_path = Path(tags_path)
            found.tags = read_tags(found.tags_path)
        return found

    def as_many(self, rows: Rows, path: Path) -> Rows:
        """The rows of the file at `path`, of which there must be as many as lines of the csv.

        Raises:
            DataError: there are fewer; that there are more is said of the first row without a line.
        """
        if self.tags is None or self.tags_path is None:
            return rows
        return _as_many(rows, len(self.tags), path, self.tags_path)

    def counted(self, sample: dict[str, Any], row: Any, location: Location) -> dict[str, Any]:
        """A sample with its images counted, `ImageRef`s in the place of their sources.

        Raises:
            DataError: not as many markers as images.
            ImageError: an image cannot be used.
        """
        listed: list[Any] = self._tags_of(location) if self.tags is not None else images_of(row, location)
        sample = with_images(sample, listed, location)
        num_images = num_shown(sample)

        def look(source: Any) -> ImageRef:
            return self._count(source, location.at("images"), num_images)

        return resolved(sample, look)

    def of_ids(self, location: Location) -> list[ImageRef]:
        """The images of a row of token ids, which only a csv can name."""
        tags = self._tags_of(location) if self.tags is not None else []
        return [self._count(tag, location, len(tags)) for tag in tags]

    def named(self, row: Any, location: Location) -> int:
        """How many images belong to a row that nothing was made of."""
        if self.tags is None:
            return num_named(row, location)
        with suppress(DataError):
            return len(self._tags_of(location))
        return 0

    def _tags_of(self, location: Location) -> list[str]:
        assert self.tags is not None and location.row is not None
        if location.row > len(self.tags):
            found = f"no line {location.row} in the csv of its images, which has {len(self.tags)}"
            raise DataError(location, found, "a line per row", "repair image_tags_file_dataset", "image_tags")
        return self.tags[location.row - 1]

    def _count(self, source: Any, location: Location, num_images: int) -> ImageRef:
        try:
            return self.format.count(source, self.root, location)
        except DataError as error:
            bad = ImageError(*error.said)
            bad.num_images = num_images
            raise bad from error


def read_tags(path: Path) -> list[list[str]]:
    """The lines of a csv of images: a line per row of the data, a column per image; nothing in a column: none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = []
            for line in csv.reader(file):
                lines.append([tag.strip() for tag in line if tag.strip()])
            return lines
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        expected = "a csv: a line per row of the data, a column per image"
        raise DataError(Location(path), str(error), expected, "check image_tags_file_dataset", "image_tags") from error


def _as_many(rows: Rows, num_lines: int, path: Path, csv_path: Path) -> Iterator[tuple[Location, Any]]:
    last: Location | None = None
    for location, row in rows:
        last = location
        yield location, row
    number = 0 if last is None or last.row is None else last.row
    if number < num_lines:
        found = f"{counted(num_lines, 'line')} for {counted(number, 'row')} of {path}"
        raise DataError(Location(csv_path), found, "a line per row", "repair image_tags_file_dataset", "image_tags")
