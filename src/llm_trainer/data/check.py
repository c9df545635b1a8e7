"""What a data file holds before anything is trained on it: its schema, lengths, duplicates, and what is wrong where."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.from_ids import spans_from_ids
from llm_trainer.data.encode.plain import EncodedChat
from llm_trainer.data.encode.printed import UNPRINTED, share_left_out
from llm_trainer.data.encode.row_images import RowImages
from llm_trainer.data.encode.rows import misfit
from llm_trainer.data.encode.templates import ChatTemplateError
from llm_trainer.data.ids import check_ids
from llm_trainer.data.images import ImageRef
from llm_trainer.data.kinds import KINDS, WEIGHT, DataOptions, Kind, get_kind, kinds_that_accept
from llm_trainer.data.kinds.pairs import refuse_weights
from llm_trainer.data.ledger import Ledger
from llm_trainer.data.load import find_schema
from llm_trainer.data.read.errors import DataError, DroppedRow, Location
from llm_trainer.data.read.files import data_files, read_rows
from llm_trainer.data.read.formats import Rows
from llm_trainer.data.read.messages import mute_empty_answers, read_only
from llm_trainer.data.read.pictures import all_images
from llm_trainer.data.read.recognise import ROWS_LOOKED_AT, recognise, schema_of
from llm_trainer.data.read.schemas import Schema
from llm_trainer.data.read.token_files import TOKEN_SUFFIXES, open_tokens
from llm_trainer.data.read.weights import row_weight, step_weights, weight_as_a_whole
from llm_trainer.data.unused import refuse_unused

Sample = dict[str, Any]
Piece = tuple[str, bool]  # some text, and whether it is trained on
NUM_EXAMPLES = 2
EXAMPLE_TOKENS = 400  # of an example that are shown


@dataclass
class FileReport:
    """What was found in one file."""

    path: Path
    schema: str = ""  # name of the schema of its rows; '' when it has none
    kind: str = ""  # canonical kind of its samples
    usable_as: Sequence[str] = ()  # names of the kinds of rows (`data.kinds`) that they can become
    unit: str = "characters"  # or 'tokens': what lengths are counted in
    unread: list[str] = field(default_factory=list)  # columns that are not read
    rows: int = 0  # that were read
    lengths: list[int] = field(default_factory=list)  # of each sample; of a pair, of its longer conversation
    trained: int = 0  # tokens that a loss would count (only with a tokenizer)
    untrained: int = 0  # samples without any such token, as far as `block_size` keeps them
    duplicates: int = 0  # samples that are exactly equal to an earlier one
    too_long: tuple[int, int] = (0, 0)  # samples longer than `block_size`, and the units truncation would cut from them
    dropped: Counter[str] = field(default_factory=Counter)  # well-formed rows that have nothing to teach, by reason
    account: Ledger = field(default_factory=Ledger)  # weights of trained tokens, and what was noted about rows
    problems: list[DataError] = field(default_factory=list)  # rows, or the file as a whole, that would stop training
    examples: list[list[Piece]] = field(default_factory=list)  # the first samples
    image_sizes: Counter[tuple[int, int]] = field(
        default_factory=Counter
    )  # (height, width) of every image that is shown
    image_tokens: list[int] = field(default_factory=list)  # of every image that is shown
    distinct_images: int = 0

    @property
    def stops_training(self) -> bool:
        """Whether a run on this file would end with an error."""
        left_out = share_left_out(self.account.notes) > DataOptions.max_left_out
        return bool(self.problems) or left_out or self.untrained >= len(self.lengths)

    def percentiles(self) -> dict[str, int]:
        """Shortest, median, 95 % and longest length."""
        values = np.percentile(self.lengths, [0, 50, 95, 100], method="lower")
        return dict(zip(("shortest", "median", "95 %", "longest"), values.astype(int).tolist(), strict=True))

    def histogram(self) -> list[tuple[int, int, int]]:
        """`(first, last, samples)` for lengths between powers of two, the empty ones at both ends left out."""
        bins = Counter(max(length - 1, 0).bit_length() for length in self.lengths)  # n: 2^(n-1) < length <= 2^n
        if not bins:
            return []
        return [((1 << n >> 1) + (n > 0), 1 << n, bins[n]) for n in range(min(bins), max(bins) + 1)]


def texts_of(sample: Sample) -> Iterator[str]:
    """Everything in a sample that a model reads or writes."""
    for key in ("text", "messages", "prompt", "completion", "chosen", "rejected"):
        found = sample.get(key, ())
        if isinstance(found, str):
            yield found
            continue
        for message in found:
            yield from (str(message[part]) for part in ("reasoning_content", "content") if message.get(part))


def read_texts(path: Path | str) -> Iterator[str]:
    """Everything that models read or write in a file or a folder of files, for training a tokenizer.

    Raises:
        DataError: a row cannot be read, or is of no known schema.
    """
    for file in data_files(path):
        rows = read_rows(file)
        head = list(islice(rows, ROWS_LOOKED_AT))
        schema = recognise(head)
        for location, row in chain(head, rows):
            with suppress(DroppedRow):
                for sample in schema.samples(row, location):
                    yield from texts_of(sample)


def check_file(
    path: Path | str,
    chat: ChatFormat | None = None,
    *,
    kind: str | None = None,
    block_size: int | None = None,
    image_columns: str = "error",
    image_tags: Path | str | None = None,
    **reading: Any,
) -> FileReport:
    """Read a whole file as training would and report instead of stopping.

    Args:
        path: a text file or a token file.
        chat: tokenizer and template, and for a model that sees what an image is in tokens: then every image is opened;
            None: lengths are in characters and nothing is said about what is trained on.
        kind: name of the kind of rows that is wanted of the file; None: any.
        block_size: tokens of the context, to count what truncation would do.
        image_columns: 'error', or 'ignore' to count rows with images that are trained as text.
        image_tags: the csv of the images of the rows, if they do not name them.
        **reading: options of `Reading`: a forced schema, names of columns and roles, the folder of images.

    Raises:
        ValueError: a schema, kind or option is unknown.
    """
    report = FileReport(Path(path))
    if chat is not None:
        report.unit = "tokens"
    options = DataOptions(**reading)
    try:
        images = None
        if chat is not None and chat.images is not None:
            csv = None if image_tags is None else str(image_tags)
            images = RowImages.beside(chat.images, report.path, options.image_root, "error", csv)
        inspector = _Inspector(report, chat, block_size, image_columns, images)
        if report.path.suffix in TOKEN_SUFFIXES:
            inspector.read_tokens(kind)
        else:
            inspector.read_text(options, kind)
    except DataError as error:
        report.problems.append(error)
    return report


class _Inspector:
    """Fills in the report of one file."""

    def __init__(
        self,
        report: FileReport,
        chat: ChatFormat | None,
        block_size: int | None,
        image_columns: str,
        images: RowImages | None,
    ) -> None:
        self.report, self.chat, self.block_size, self.image_columns = report, chat, block_size, image_columns
        self.images = images
        self._seen: set[bytes] = set()
        self._opened: set[str] = set()  # digests of images

    def read_text(self, options: DataOptions, wanted: str | None) -> None:
        report = self.report
        rows = read_rows(report.path, options.text_unit, on_error=report.problems.append)
        head = list(islice(rows, ROWS_LOOKED_AT))
        if not head:
            return  # every row is broken, and is reported as such
        if self.images is not None:
            rows = self.images.as_many(rows, report.path)
        sees = self.images is not None
        if wanted is not None:
            kind_of_rows = get_kind(wanted)
            accepts = None if self.chat is None else kind_of_rows.accepted(self.chat)
            found = find_schema(report.path, kind_of_rows, options, accepts, sees)
        else:
            found = schema_of(report.path, options, takes_images=sees)
        report.unread = found.unread([(replace(where, takes_images=sees), row) for where, row in head])
        report.schema, report.kind = found.name, found.kind
        accepted_as = found.kind
        if sees and accepted_as == "vision":  # images that are nothing but shown
            accepted_as = "chat"
        report.usable_as = kinds_that_accept(accepted_as)
        if found.kind == "text":
            self.block_size = None  # documents are laid end to end and cut into blocks: nothing is lost
        kind = None
        if wanted is not None or report.usable_as:
            kind = get_kind(wanted or report.usable_as[0])
        for location, row, sample in self._samples(found, kind, chain(head, rows)):
            if self.chat is None:
                report.lengths.append(sum(map(len, texts_of(sample))))
                continue
            weight = 1.0
            try:
                if kind is not None and kind.name != "prompts":  # rewards read every column of a prompt's row
                    weigh = weight_as_a_whole if WEIGHT in kind.columns else row_weight
                    weight = weigh(row, location)
                if found.kind == "process":
                    step_weights(row, len(sample["steps"]), location)
                encoded = _encode(self.chat, found.kind, sample, location)
                self._note_left_out(self.chat, location, sample)
                location.note(UNPRINTED, sum(one.num_unprinted for one in encoded))
                if found.kind in ("preference", "unpaired"):
                    refuse_weights(encoded, location)
            except ChatTemplateError as error:
                report.problems.append(misfit(location, error, in_ids=False))
            except DataError as error:
                report.problems.append(error)
            else:
                self._count(encoded, weight)

    def _note_left_out(self, chat: ChatFormat, location: Location, sample: Sample) -> None:
        """Note what the template does not print of each conversation of a sample."""
        turns = sample.get("messages") or sample.get("prompt")
        if not isinstance(turns, list):
            return  # text
        answers = [
            sample[key] for key in ("completion", "chosen", "rejected") if key in sample and "steps" not in sample
        ]
        for answer in answers or [[]]:
            location.note_all(chat.left_out(turns + answer, sample.get("tools")))

    def _samples(self, schema: Schema, kind: Kind | None, rows: Rows) -> Iterator[tuple[Location, Any, Sample]]:
        for where, row in rows:
            self.report.rows += 1
            takes = self.images is not None and (kind is None or bool(kind.columns_of_images))
            location = replace(where, notes=self.report.account.notes, takes_images=takes)
            try:
                samples = schema.samples(row, location)
                row = schema.known(row, location)
                if kind is not None:
                    refuse_unused(kind, row, location, self.image_columns, takes)
                if takes:
                    samples = [self._with_images(sample, row, location) for sample in samples]
            except DroppedRow as nothing_to_teach:
                self.report.dropped[nothing_to_teach.reason] += 1
                continue
            except DataError as error:
                self.report.problems.append(error)
                continue
            for sample in samples:
                self._note_duplicate(json.dumps(sample, sort_keys=True, default=repr).encode())
                yield location, row, sample

    def _with_images(self, sample: Sample, row: Any, location: Location) -> Sample:
        """A sample with its images counted, each distinct one opened.

        Raises:
            DataError: one cannot be used.
        """
        assert self.images is not None
        sample = self.images.counted(sample, row, location)
        refs: list[ImageRef] = all_images(sample)
        for ref in refs:
            if ref.digest not in self._opened:
                self.images.format.open(ref, location.at("images"))
                self._opened.add(ref.digest)
        for ref in refs:
            self.report.image_sizes[ref.height, ref.width] += 1
            self.report.image_tokens.append(len(self.images.format.ids(ref.height, ref.width)))
        self.report.distinct_images = len(self._opened)
        return sample

    def read_tokens(self, wanted: str | None) -> None:
        report, tokens = self.report, open_tokens(self.report.path)
        report.schema, report.kind, report.unit = "token_ids", "tokens", "tokens"
        report.usable_as = [name for name in KINDS if get_kind(name).token_kind == tokens.kind]
        if wanted is not None and get_kind(wanted).name not in report.usable_as:
            fits = " or ".join(report.usable_as)
            found = f"token rows of kind '{tokens.kind}'"
            raise DataError(Location(report.path), found, f"rows for {wanted}", f"use them for {fits}")
        if wanted != "conversations":
            self.block_size = None
        for row in range(len(tokens)):
            report.rows += 1
            try:
                columns = tokens[row]
                self._note_duplicate(b"|".join(ids.tobytes() for ids in columns.values()))
                encoded = [self._from_ids(ids, Location(report.path, row + 1), wanted) for ids in columns.values()]
            except DataError as error:
                report.problems.append(error)
            else:
                self._count(encoded)

    def _from_ids(self, ids: np.ndarray, location: Location, wanted: str | None) -> EncodedChat:
        """A row of ids as the wanted kind would train on it; without a tokenizer only its length is known."""
        if self.chat is None:
            return EncodedChat(range(len(ids)), [True] * len(ids), "")  # type: ignore[arg-type]
        check_ids(ids, self.chat, location)
        values = ids.tolist()
        if wanted != "conversations":
            return EncodedChat(values, [True] * len(values), "")
        try:
            return EncodedChat(values, spans_from_ids(values, self.chat), "")
        except ChatTemplateError as error:
            raise misfit(location, error, in_ids=True) from error

    def _note_duplicate(self, content: bytes) -> None:
        digest = hashlib.blake2b(content, digest_size=16).digest()
        self.report.duplicates += digest in self._seen
        self._seen.add(digest)

    def _count(self, encoded: list[EncodedChat], row_weight: float = 1.0) -> None:
        """Add a sample, which is several sequences when they are compared, of a row that weighs this much."""
        report = self.report
        length = max(len(one.input_ids) for one in encoded)
        report.lengths.append(length)
        if self.block_size is not None and length > self.block_size:
            report.too_long = (report.too_long[0] + 1, report.too_long[1] + length - self.block_size)
        trained = 0
        for one in encoded:
            weights = one.loss_weights(row_weight)[1 : self.block_size]  # nothing predicts the first token
            report.account.weigh(weights[weights != 0], np.ones(np.count_nonzero(weights), dtype=np.int64))
            trained += int((weights != 0).sum())
        report.trained += trained
        report.untrained += not trained and report.kind not in ("prompt", "vision")
        if self.chat is not None and len(report.examples) < NUM_EXAMPLES:
            report.examples.append(_pieces(self.chat, encoded[0]))


def _encode(chat: ChatFormat, kind: str, sample: Sample, location: Location) -> list[EncodedChat]:
    """The sequences that training would make of a sample, with what it would train on."""
    if kind == "text":
        return chat.encode_documents([sample["text"]], [sample.get("images", ())])
    if kind == "completion":
        return chat.encode_completions([(sample["prompt"], sample["completion"])], [sample.get("images", ())])
    if kind == "tokens":
        return [EncodedChat(sample["input_ids"], [True] * len(sample["input_ids"]), "")]
    if kind == "prompt":
        return chat.encode_pictured([sample["prompt"]], [sample.get("tools")])
    if "messages" in sample:
        return [chat.encode(sample["messages"], sample.get("tools"))]
    prompt = read_only(sample["prompt"])
    answers = [sample[key] for key in ("completion", "chosen", "rejected") if key in sample]
    if kind == "preference":
        answers = [mute_empty_answers(answer, location) for answer in answers]
    return [chat.encode(prompt + answer, sample.get("tools")) for answer in answers]


def _pieces(chat: ChatFormat, encoded: EncodedChat) -> list[Piece]:
    """The beginning of a sequence as text; of placeholders of images one and their number, or nothing else would be seen."""
    placeholder, placeholder_text = -1, ""
    if chat.images is not None:
        placeholder, placeholder_text = chat.images.image_token_id, chat.images.placeholder

    def kind_of(pair: tuple[int, bool]) -> tuple[bool, bool]:
        token, trained = pair
        return trained, token == placeholder

    pieces, left = [], EXAMPLE_TOKENS
    for (trained, is_image), run in groupby(zip(encoded.input_ids, encoded.trained, strict=True), key=kind_of):
        ids = [token for token, _ in run]
        if is_image:
            left -= 1
            text = f"{placeholder_text} x {len(ids):,} "
        else:
            ids = ids[:left]
            left -= len(ids)
            text = str(chat.tokenizer.decode(ids))
        pieces.append((text, trained))
        if left <= 0:
            break
    return pieces
