"""Columns that a row has and that what it is learned as cannot use: an error, or counted; never silent."""

from typing import Any

from llm_trainer.data.kinds import Kind
from llm_trainer.data.read.errors import DataError, Location, show
from llm_trainer.data.read.messages import row_weight
from llm_trainer.data.read.schemas import MEDIA


def refuse_unused(kind: Kind, row: Any, location: Location, image_columns: str = "error") -> None:
    """Look for weights of a row, and for images, that rows of `kind` have no use for.

    Args:
        kind: what the row is learned as.
        row: as the file has it.
        location: where it is; what is no error is noted there.
        image_columns: 'error', or 'ignore' to train on the text of rows with images, videos or sounds.

    Raises:
        DataError: a `loss_weight` other than 1 where all rows weigh the same, or something to see or hear.
    """
    if not isinstance(row, dict):
        return
    _weight(kind, row, location)
    for key in MEDIA:
        if not row.get(key):
            continue
        if image_columns == "ignore":
            location.note(f"row: its column {key!r} is left out, rows of {kind.name} are text")
            continue
        fix = "set data_loader_config.image_columns: ignore to train on the text alone, or remove the column"
        raise DataError(location.at(key), show(row[key]), f"text alone, for {kind.name}", fix, "images")


def _weight(kind: Kind, row: dict[str, Any], location: Location) -> None:
    if kind.weighs_rows or kind.name == "prompts":  # rewards read every column of a prompt's row
        return
    if "loss_weight" not in row and "weight" not in row:
        return
    if row.get("loss_weight") is None:  # a column `weight` may be about anything
        location.note(f"row: its column 'weight' is not used, rows of {kind.name} all weigh the same")
    elif row_weight(row, location) != 1:
        found, expected = f"a weight of {row['loss_weight']}", f"none: rows of {kind.name} all weigh the same"
        fix = "remove or rename the column; data_loader_config.file_weights visits files more or less often"
        raise DataError(location.at("loss_weight"), found, expected, fix, "loss_weight")
