"""Columns that a row has and that what it is learned as cannot use: an error, or counted; never silent."""

from typing import Any

from llm_trainer.data.kinds import Kind
from llm_trainer.data.read.errors import DataError, Location, show
from llm_trainer.data.read.pictures import IMAGE_KEYS
from llm_trainer.data.read.schemas import MEDIA


def refuse_unused(
    kind: Kind, row: Any, location: Location, image_columns: str = "error", takes_images: bool = False
) -> None:
    """Look for images, videos and sounds, that rows of `kind` have no use for.

    Args:
        kind: what the row is learned as.
        row: as the file has it.
        location: where it is; what is no error is noted there.
        image_columns: 'error', or 'ignore' to train on the text of rows with images, videos or sounds.
        takes_images: images are learned from.

    Raises:
        DataError: there is something to see or hear.
    """
    if not isinstance(row, dict):
        return
    for key in MEDIA:
        if not row.get(key) or (takes_images and key in IMAGE_KEYS):
            continue
        if image_columns == "ignore":
            location.note(f"row: its column {key!r} is left out, rows of {kind.name} are text")
            continue
        fix = "set data_loader_config.image_columns: ignore to train on the text alone, or remove the column"
        raise DataError(location.at(key), show(row[key]), f"text alone, for {kind.name}", fix, "images")
