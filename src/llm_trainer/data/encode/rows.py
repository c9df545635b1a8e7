"""Rows of a file -> a part of its token store: what becomes of each row is decided here, and in the rooms beside.

The code of these rooms is in the key of every store (`data/cache.py`).
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.pictured import PLACE_SIZE, PLACES, no_images
from llm_trainer.data.encode.row_images import ImageError, RowImages
from llm_trainer.data.encode.store import Part
from llm_trainer.data.encode.templates import ChatTemplateError
from llm_trainer.data.ids import check_ids
from llm_trainer.data.kinds import HARDNESS, WEIGHT, Encoded, Kind, Sample
from llm_trainer.data.read.errors import DataError, DroppedRow, Location
from llm_trainer.data.read.formats import split_documents
from llm_trainer.data.read.messages import IMAGE
from llm_trainer.data.read.pictures import num_shown
from llm_trainer.data.read.renaming import Renaming, number_at
from llm_trainer.data.read.schemas import Schema, get_schema
from llm_trainer.data.unused import refuse_unused


@dataclass
class RowEncoder:
    """Rows of one schema, or (schema None) of token ids, -> a part of a store. Picklable: several processes can encode."""

    kind: Kind
    schema: str | None
    chat: ChatFormat
    bad_rows: str
    image_columns: str = "error"
    text_unit: str = "auto"
    renaming: Renaming | None = None
    hardness_column: str | None = None
    images: RowImages | None = None  # where the images of the rows are; None: they show none

    def __call__(self, rows: list[tuple[Location, Any]]) -> Part:
        columns = self.kind.all_columns(self.chat)
        if self.hardness_column is not None:
            columns = (*columns, HARDNESS)
        part = Part({name: [] for name in columns})
        takes = self.images is not None
        noted = [(replace(location, notes=part.notes, takes_images=takes), row) for location, row in rows]
        # A kind may make several rows of a sample, or none: only equally hard samples are encoded together.
        for hardness, samples in groupby(self._samples(noted, part), key=attrgetter("hardness")):
            for encoded in self._encode(list(samples), part):
                if isinstance(encoded, str):  # the reason why there is nothing to learn
                    part.dropped[encoded] += 1
                    continue
                row = {WEIGHT: np.ones(1, dtype=np.float32), **encoded}  # a user's kind made of ours may not say it
                if takes:
                    row = {**no_images(), **row}
                if hardness is not None:
                    row[HARDNESS] = np.array([hardness])
                for name, column in part.columns.items():
                    column.append(row[name])
        return part

    def _samples(self, rows: list[tuple[Location, Any]], part: Part) -> list[Sample]:
        """What the schema makes of the rows; rows of token ids are samples already."""
        samples: list[Sample] = []
        if self.schema is None:
            for location, columns in rows:
                values: dict[str, Any] = dict(columns)
                try:
                    for ids in columns.values():
                        check_ids(ids, self.chat, location)
                    if self.images is not None:
                        values["images"] = self.images.of_ids(location)
                except DataError as error:
                    self._drop(error, part, self._num_named(columns, location))
                else:
                    samples.append(Sample("tokens", values, columns, location))
            return samples
        schema = replace(get_schema(self.schema), renaming=self.renaming)
        for location, row in rows:
            try:
                found = schema.samples(row, location)
                hardness = None if self.hardness_column is None else number_at(row, self.hardness_column, location)
                row = schema.known(row, location)
                refuse_unused(self.kind, row, location, self.image_columns, takes_images=self.images is not None)
                if self.images is not None:
                    found = [self.images.counted(values, row, location) for values in found]
            except DroppedRow as nothing_to_teach:
                self._note_dropped(nothing_to_teach.reason, part, self._num_named(row, location))
            except DataError as error:
                self._drop(error, part, self._num_named(row, location))
            else:
                for values in self._documents(schema, found):
                    samples.append(Sample(schema.kind, values, row, location, hardness))
        return samples

    def _documents(self, schema: Schema, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The samples of a row, its text cut where documents end, if that is asked for."""
        if schema.kind != "text" or self.text_unit != "endoftext":
            return found
        documents = []
        for values in found:
            shown = list(values.get("images", ()))
            for text in split_documents(values["text"]):
                document = {**values, "text": text}
                if shown:
                    number = text.count(IMAGE)
                    document["images"], shown = shown[:number], shown[number:]
                documents.append(document)
        return documents

    def _encode(self, samples: list[Sample], part: Part) -> list[Encoded]:
        """The rows of all samples, and reasons; a sample that does not fit the chat template is dropped, or an error."""
        if not samples:
            return []
        noted = Counter(part.notes)
        encode = self.kind.encode
        if self.schema is None:
            assert self.kind.encode_ids is not None
            encode = self.kind.encode_ids
        try:
            rows = list(encode(self.chat, samples))
        except (ChatTemplateError, DataError):
            pass  # one among these does not fit: find it, and name its row
        else:
            reasons = {one for one in rows if isinstance(one, str)}
            if self.images is None or len(reasons) < 2:
                self._count_images(samples, rows, part)
                return rows
            # which images were left out for which reason is found one by one
        part.notes.clear()  # and note everything once
        part.notes.update(noted)
        encoded: list[Encoded] = []
        for sample in samples:
            num_images = 0 if self.images is None else num_shown(sample.values)
            try:
                rows = list(encode(self.chat, [sample]))
            except ChatTemplateError as error:
                self._drop(misfit(sample.location, error, in_ids=self.schema is None), part, num_images)
            except DataError as error:
                self._drop(error, part, num_images)
            else:
                self._count_images([sample], rows, part)
                encoded += rows
        return encoded

    def _num_named(self, row: Any, location: Location) -> int:
        """Images of a row that nothing was made of."""
        return 0 if self.images is None else self.images.named(row, location)

    def _count_images(self, samples: list[Sample], rows: list[Encoded], part: Part) -> None:
        """Note the images of samples that are in none of their rows, for the reason why some have none."""
        reason = next((one for one in rows if isinstance(one, str)), None)
        if self.images is None or reason is None:
            return
        number = sum(num_shown(sample.values) for sample in samples)
        for row in rows:
            if not isinstance(row, str):
                number -= len(row.get(PLACES, ())) // PLACE_SIZE
        part.dropped_images += Counter({reason: number})

    def _note_dropped(self, reason: str, part: Part, num_images: int) -> None:
        part.dropped[reason] += 1
        part.dropped_images += Counter({reason: num_images})

    def _drop(self, error: DataError, part: Part, num_images: int) -> None:
        policy = self.bad_rows
        if isinstance(error, ImageError):
            assert self.images is not None
            policy = self.images.bad
            num_images = error.num_images
        if policy == "error":
            raise error
        self._note_dropped(error.reason, part, num_images)


def misfit(location: Location, error: ChatTemplateError, in_ids: bool) -> DataError:
    """A conversation that does not fit the chat template, as text or (`in_ids`) as token ids."""
    if in_ids:
        expected = "ids of a conversation in the chat template"
        fix = "store text, or set sft_config.mask_prompt: false to train on every token"
        return DataError(location, str(error), expected, fix, "no answer found in the ids")
    found = f"a conversation the chat template cannot render ({error})"
    fix = "repair the row, choose another chat template, or set data_loader_config.bad_rows: drop"
    return DataError(location, found, "turns that the template knows", fix, "template")
