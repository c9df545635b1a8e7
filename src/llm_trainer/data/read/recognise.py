"""Which schema the rows of a file have, and what is said where they have none."""

from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from llm_trainer.config.errors import counted
from llm_trainer.config.options import Reading
from llm_trainer.data.read import schemas
from llm_trainer.data.read.conversions import is_exchanges
from llm_trainer.data.read.errors import DataError, Location, show
from llm_trainer.data.read.files import read_rows
from llm_trainer.data.read.messages import is_transcript, is_turns
from llm_trainer.data.read.renaming import Renaming
from llm_trainer.data.read.schemas import ROW, SCHEMAS, Schema, Test, get_schema

ROWS_LOOKED_AT = 50  # to recognise a schema
FIX_UNKNOWN = (
    "map columns with data_loader_config.columns (--column), or name a format with data_loader_config.schema (--schema)"
)
_MEANS: dict[Test, str] = {  # test -> what passes it
    schemas.is_present: "a value",
    schemas.is_text: "text",
    schemas.is_conversation: 'a list of turns such as {"role": "user", "content": "..."}',
    is_turns: 'a list of turns such as {"role": "user", "content": "..."}',
    schemas.is_prompt: "text or a list of turns",
    schemas.is_side: "text, a turn or a list of turns",
    schemas.is_label: "true or false",
    schemas.is_ids: "a list of token ids",
    schemas.is_instances: 'a list of {"input", "output"}',
    is_transcript: "a dialogue that begins with 'Human:'",
    is_exchanges: 'a list of {"human": "...", "assistant": "..."}',
}


def head_of(path: Path, reading: Reading) -> list[tuple[Location, Any]]:
    """The first rows of a file that can be read."""
    return list(islice(read_rows(path, reading.text_unit, on_error=lambda error: None), ROWS_LOOKED_AT))


def schema_of(path: Path, reading: Reading, accepts: Sequence[str] = (), takes_images: bool = False) -> Schema:
    """The schema that the options force, or that the first rows of a file have, under the names that they give.

    Raises:
        DataError: no format fits, or a column that is to be renamed is not there.
        ValueError: no such schema.
    """
    renaming = Renaming.of(reading)
    if renaming is not None:
        renaming.check(read_rows(path, reading.text_unit, on_error=lambda error: None))
    if reading.schema:
        known = get_schema(reading.schema)
    else:
        known = recognise(head_of(path, reading), accepts, renaming, takes_images)
    return replace(known, renaming=renaming)


def recognise(
    rows: Iterable[tuple[Location, Any]],
    accepts: Sequence[str] = (),
    renaming: Renaming | None = None,
    takes_images: bool = False,
) -> Schema:
    """The format of a sample of rows: the first of `SCHEMAS` that more than half of them fit.

    Half, so that a bad row is reported as a bad row of its format and does not change what the others are.

    Args:
        rows: a few rows from the start of the data, as `read_rows` yields them.
        accepts: canonical kinds that are wanted, the most wanted first: alpaca rows with a rendered `text` are text to
            whoever wants `text`. A format of another kind is returned where none of these fits, and for rows with
            images, which are nothing else without them.
        renaming: of the names in these rows.
        takes_images: whoever reads them takes images too, which then decide nothing about the format.

    Raises:
        DataError: no format fits (names the nearest).
        ValueError: no rows.
    """
    sample: list[tuple[Location, Any]] = []
    for location, row in rows:
        with suppress(DataError):  # what cannot be renamed is said when it is read
            if renaming is not None:
                row, location = renaming(row, location)
            sample.append((location, row))
    if not sample:
        raise ValueError("no rows to recognise a format by; give at least one")
    fitting = []
    for schema in SCHEMAS.values():
        if takes_images and schema.name == "vision":
            continue
        num_fitting = sum(schema.fits(row) for _, row in sample)
        if 2 * num_fitting > len(sample):
            fitting.append(schema)
    if not fitting:
        raise _unrecognised(sample)
    wanted = [schema for schema in fitting if schema.kind in accepts]
    if not wanted or fitting[0].kind == "vision":
        return fitting[0]
    return min(wanted, key=lambda schema: accepts.index(schema.kind))


# --- why none fits


def _unrecognised(sample: list[tuple[Location, Any]]) -> DataError:
    first_fits = [_first_that_fits(row) for _, row in sample]
    if "" not in first_fits:
        formats = [f"{name} ({counted(number, 'row')})" for name, number in Counter(first_fits).most_common()]
        fix = "put each format into a file of its own; a list may have files of several formats"
        found = f"rows of several formats: {', '.join(formats)}"
        return DataError(Location(sample[0][0].path), found, "one format per file", fix, "unknown_format")
    location, row = sample[first_fits.index("")]
    if not isinstance(row, dict):
        fix = "give every row the columns of a known format"
        return DataError(location, show(row), "an object, or a list of messages", fix, "unknown_format")
    wrong_value = value_that_does_not_fit(row, location)
    if wrong_value is not None:
        return wrong_value
    overlap = {}
    for name, schema in SCHEMAS.items():
        needed = _needed_columns(schema)
        if needed:
            overlap[name] = len(set(needed) & row.keys()) / len(needed)
    nearest = sorted(overlap, key=lambda name: -overlap[name])[:3]
    if not any(overlap.values()):
        nearest = ["text", "messages", "alpaca", "preference"]
    formats = [f"'{name}' ({', '.join(_needed_columns(SCHEMAS[name]))})" for name in nearest]
    found = f"the columns {', '.join(row) or '(none)'}"
    if location.names:
        renamed = [f"{ours} (the file's '{location.names[ours]}')" for ours in row]
        found = f"the columns {', '.join(renamed) or '(none)'}, the only ones that are mapped"
    return DataError(location, found, f"a known format, such as {'; '.join(formats)}", FIX_UNKNOWN, "unknown_format")


def _first_that_fits(row: Any) -> str:
    """Name of the first format that a row fits; '' where none does."""
    return next((name for name, schema in SCHEMAS.items() if schema.fits(row)), "")


def _needed_columns(schema: Schema) -> list[str]:
    """The columns that a row of a schema must have; not those that it must not have."""
    return [name for name, test in schema.columns.items() if name != ROW and test is not schemas.is_absent]


def value_that_does_not_fit(
    row: Any, location: Location, kinds: Sequence[str] = (), fits: Schema | None = None
) -> DataError | None:
    """The error for a row that has every column of a format, one of them with a value of another type.

    Args:
        kinds: of formats that count; none: all.
        fits: a format of another kind that the row does have: its columns are as they should be.
    """
    if not isinstance(row, dict):
        return None
    fewest, nearest = len(row) + 1, None
    for schema in SCHEMAS.values():
        needed = _needed_columns(schema)
        if not needed or not set(needed) <= row.keys() or (kinds and schema.kind not in kinds):
            continue
        wrong = [name for name in needed if not schema.columns[name](row[name])]
        if fits is not None and not fits.columns.keys().isdisjoint(wrong):
            continue
        if wrong and len(wrong) <= fewest:  # the plainest formats are the last
            fewest, nearest = len(wrong), (schema, wrong[0])
    if nearest is None:
        return None
    schema, name = nearest
    expected = f"{_MEANS.get(schema.columns[name], 'another value')}, as in rows of format '{schema.name}'"
    return DataError(location.at(name), show(row[name]), expected, f"repair the row; or {FIX_UNKNOWN}", "wrong_type")
