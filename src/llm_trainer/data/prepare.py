"""Files -> token stores -> one dataset of training rows. Everything that reads text for training goes through here."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llm_trainer.data.datasets import Blocks, Documents, Joined, Packed, note_dropped
from llm_trainer.data.encode.chat import ChatFormat, EncodedChat, spans_from_ids
from llm_trainer.data.encode.store import Part, TokenStore, build_store
from llm_trainer.data.encode.templates import ChatTemplateError
from llm_trainer.data.read.errors import DataError, DroppedRow, Location
from llm_trainer.data.read.files import TOKEN_SUFFIXES, TokenFile, data_files, open_tokens, read_rows
from llm_trainer.data.read.messages import Message
from llm_trainer.data.read.schemas import STAGES, Schema, get_schema, recognise

VERSION = 1  # part of every cache key: raise it when the same rows are encoded differently
ROWS_LOOKED_AT = 50  # to recognise a schema
PARALLEL_FROM = 32 << 20  # bytes of a file from which several processes encode it

Located = tuple[Location, dict[str, Any]]  # a sample and where it stands

KINDS = {"pretrain": ("text",), "sft": ("chat", "completion")}


@dataclass(frozen=True)
class DataOptions:
    """How files become rows.

    Attributes:
        stage: 'pretrain' or 'sft' here; 'preference', 'unpaired' or 'steps' in `pairs`.
        schema: forced schema name; None: recognised from the rows.
        block_size: tokens of the context.
        packing: 'none', 'flat', 'bfd', 'bfd_split' or 'wrapped'.
        truncation: what happens to longer rows: 'error', 'drop', 'keep_start' or 'keep_end'.
        bad_rows: 'error', or 'drop' to count and leave out rows that cannot be read.
        text_unit: what one document of a .txt is: 'auto', 'file', 'line' or 'paragraph'.
        workers: processes that encode large files.
    """

    stage: str
    schema: str | None = None
    block_size: int | None = None
    packing: str = "none"
    truncation: str = "keep_start"
    bad_rows: str = "error"
    text_unit: str = "auto"
    workers: int = 1


@dataclass
class RowEncoder:
    """Rows of one schema -> ids and which of them are trained on. Picklable, so that several processes can encode."""

    columns: ClassVar[tuple[str, ...]] = ("input_ids", "trained")

    schema: str
    chat: ChatFormat
    bad_rows: str

    def __call__(self, rows: list[tuple[Location, Any]]) -> Part:
        part = Part({name: [] for name in self.columns})
        schema = get_schema(self.schema)
        samples: list[Located] = []
        for location, row in rows:
            try:
                samples += [(location, sample) for sample in schema.samples(row, location)]
            except DroppedRow as nothing_to_teach:
                part.dropped[nothing_to_teach.reason] += 1
            except DataError as error:
                self._drop(error, part)
        self._add(schema.kind, samples, part)
        return part

    def _add(self, kind: str, samples: list[Located], part: Part) -> None:
        """Encode samples of a kind and append them to the columns of `part`."""
        for encoded in self._encode(kind, samples, part):
            part.columns["input_ids"].append(self.ids(encoded.input_ids))
            part.columns["trained"].append(np.asarray(encoded.trained, dtype=np.uint8))

    def ids(self, ids: Sequence[int]) -> np.ndarray:
        """Ids in the smallest type that holds the vocabulary."""
        return np.asarray(ids, dtype=np.uint16 if len(self.chat.tokenizer) <= 1 << 16 else np.uint32)

    def _drop(self, error: DataError, part: Part) -> None:
        if self.bad_rows == "error":
            raise error
        part.dropped[error.reason] += 1

    def _encode(self, kind: str, samples: list[Located], part: Part) -> Iterable[EncodedChat]:
        if kind == "text":
            return [self.chat.encode_text(sample["text"]) for _, sample in samples]
        if kind == "completion":
            return [self.chat.encode_completion(sample["prompt"], sample["completion"]) for _, sample in samples]
        groups = self.encode_groups(samples, lambda sample: [sample["messages"]], part)
        return [encoded for _, group in groups for encoded in group]

    def encode_groups(
        self, samples: list[Located], conversations: Callable[[dict[str, Any]], list[list[Message]]], part: Part
    ) -> list[tuple[dict[str, Any], list[EncodedChat]]]:
        """Each sample with its conversations encoded; those that the template cannot render are dropped or an error."""

        def encode(some: list[Located]) -> list[tuple[dict[str, Any], list[EncodedChat]]]:
            groups = [conversations(sample) for _, sample in some]
            tools = [sample.get("tools") for (_, sample), group in zip(some, groups, strict=True) for _ in group]
            encoded = iter(self.chat.encode_many([one for group in groups for one in group], tools))
            return [(sample, [next(encoded) for _ in g]) for (_, sample), g in zip(some, groups, strict=True)]

        try:
            return encode(samples)
        except ChatTemplateError:
            pass  # a conversation among these does not fit the template: find it, and name its row
        found = []
        for location, sample in samples:
            try:
                found += encode([(location, sample)])
            except ChatTemplateError as error:
                what = f"a conversation the chat template cannot render ({error})"
                fix = "mend the row, choose another chat template, or set data_loader_config.bad_rows: drop"
                self._drop(DataError(location, what, "turns that the template knows", fix, "template"), part)
        return found


def find_schema(path: Path, options: DataOptions) -> Schema:
    """The schema that was forced, or the one that the first rows of a file have, checked against the stage.

    Raises:
        DataError: no known schema, or one that this stage cannot train on.
    """
    rows = islice(read_rows(path, options.text_unit, on_error=lambda error: None), ROWS_LOOKED_AT)
    schema = get_schema(options.schema) if options.schema else recognise(list(rows), options.stage)
    usable = KINDS.get(options.stage, STAGES[options.stage])
    if schema.kind not in usable:
        stages = [stage for stage, kinds in KINDS.items() if schema.kind in kinds]
        raise DataError(
            Location(path),
            f"schema '{schema.name}' with rows of kind '{schema.kind}'",
            f"rows of kind {' or '.join(usable)}",
            f"train on it with {stages[0]}_config" if stages else "force another schema with data_loader_config.schema",
        )
    return schema


def cache_key(path: Path, facts: list[Any], chat: ChatFormat) -> str:
    """Hash of everything that the encoding of a file depends on."""
    stat = path.stat()
    tokenizer = hashlib.sha256(chat.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    how = [chat.template, chat.tokenizer.chat_template, chat.train_on, chat.thinking, chat.parse_special_tokens]
    everything = [VERSION, str(path.resolve()), stat.st_size, stat.st_mtime_ns, tokenizer, how, facts]
    return hashlib.sha256(json.dumps(everything).encode()).hexdigest()[:16]


def store_of(
    path: Path, chat: ChatFormat, options: DataOptions, cache: Path, encoder: type[RowEncoder] = RowEncoder
) -> TokenStore:
    """The token store of a text file, made by `encoder` now or found in `cache`."""
    schema = find_schema(path, options)
    facts = [schema.name, options.stage, options.bad_rows, options.text_unit]
    folder = cache / f"{path.stem}-{cache_key(path, facts, chat)}"
    if TokenStore.exists(folder):
        return TokenStore(folder)
    unreadable: Counter[str] = Counter()

    def note(error: DataError) -> None:
        if options.bad_rows == "error":
            raise error
        unreadable[error.reason] += 1

    return build_store(
        folder,
        read_rows(path, options.text_unit, on_error=note),
        encoder(schema.name, chat, options.bad_rows),
        encoder.columns,
        workers=options.workers if path.stat().st_size >= PARALLEL_FROM else 1,
        meta={"source": str(path), "schema": schema.name},
        unreadable=unreadable,
    )


class _TokenRows:
    """A token file of id lists, encoded like text: the spans that are trained on are found from the ids."""

    def __init__(self, chat: ChatFormat, bad_rows: str) -> None:
        self.chat, self.bad_rows = chat, bad_rows

    def __call__(self, rows: list[tuple[Location, np.ndarray]]) -> Part:
        part = Part({"input_ids": [], "trained": []})
        for location, ids in rows:
            try:
                trained = spans_from_ids(ids.tolist(), self.chat)
            except ChatTemplateError as error:
                if self.bad_rows == "drop":
                    part.dropped["no answer found in the ids"] += 1
                    continue
                fix = "store text, or set sft_config.mask_prompt: false to train on every token"
                raise DataError(location, str(error), "ids of a conversation in the chat template", fix) from error
            part.columns["input_ids"].append(np.asarray(ids, dtype=np.uint32))
            part.columns["trained"].append(np.asarray(trained, dtype=np.uint8))
        return part


def _token_rows(tokens: TokenFile) -> Iterator[tuple[Location, np.ndarray]]:
    for i in range(len(tokens)):
        yield Location(tokens.path, i + 1), tokens[i]["input_ids"]


def check_ids(tokens: TokenFile, vocab_size: int) -> None:
    """Look at the first and last million ids: ids outside the vocabulary come from another tokenizer."""
    for row in (*tokens[0].values(), *tokens[len(tokens) - 1].values()):
        for piece in (row[: 1 << 20], row[-(1 << 20) :]):
            if len(piece) and int(piece.max()) >= vocab_size:
                raise DataError(
                    Location(tokens.path),
                    f"token id {int(piece.max())}",
                    f"ids below {vocab_size}, the size of the vocabulary",
                    "use the tokenizer that made the file, or make the file again",
                )


def _from_tokens(path: Path, chat: ChatFormat, options: DataOptions, cache: Path) -> Documents | Packed | Blocks:
    tokens = open_tokens(path)
    check_ids(tokens, len(chat.tokenizer))
    if tokens.kind != "sequences":
        found = f"token rows of kind '{tokens.kind}'"
        raise DataError(Location(path), found, f"id lists for {options.stage}", "use the matching trainer")
    if options.stage == "pretrain" and isinstance(tokens.rows, np.ndarray) and options.block_size:
        return Blocks(tokens.rows.reshape(-1), str(path), options.block_size)
    folder = cache / f"{path.stem}-{cache_key(path, ['tokens', options.stage, options.bad_rows], chat)}"
    everything = options.stage == "pretrain"
    encode = _TokenRows(ChatFormat(chat.tokenizer, train_on="all") if everything else chat, options.bad_rows)
    store = build_store(folder, _token_rows(tokens), encode, ("input_ids", "trained"), meta={"source": str(path)})
    return _rows_of(store, path, options)


def _rows_of(store: TokenStore, path: Path, options: DataOptions) -> Documents | Packed | Blocks:
    """Training rows of a store, in the packing that was asked for."""
    if options.packing == "wrapped":
        assert options.block_size is not None
        blocks = Blocks(store["input_ids"].values, str(path), options.block_size)
        note_dropped(blocks.ledger, store)
        return blocks
    limit = None if options.packing == "bfd_split" else options.block_size
    documents = Documents(store, str(path), limit, options.truncation)
    if options.packing in ("bfd", "bfd_split"):
        assert options.block_size is not None
        return Packed(documents, options.block_size, options.packing)
    return documents


def load_language_data(paths: Iterable[str], chat: ChatFormat, options: DataOptions, cache: Path) -> Joined:
    """All files as one dataset, in the order given; text is encoded once and found again in `cache`.

    Raises:
        DataError: a file, a row, or what is asked of them cannot be used; the message says where and how to mend it.
        ValueError: 'wrapped' packing was asked for conversations, whose prompts it would train on.
    """
    if options.packing == "wrapped" and options.stage == "sft":
        raise ValueError(
            "data_loader_config.packing: 'wrapped' cuts rows anywhere and would train on prompts; use 'flat', 'bfd' or "
            "'bfd_split' for fine-tuning"
        )
    parts = []
    for path in (file for given in paths for file in files_of(Path(given))):
        if path.suffix in TOKEN_SUFFIXES:
            parts.append(_from_tokens(path, chat, options, cache))
        else:
            parts.append(_rows_of(store_of(path, chat, options, cache), path, options))
    if not parts:
        raise ValueError("file_dataset: no file was given, expected at least one path")
    return Joined(parts)


def files_of(path: Path) -> list[Path]:
    return [path] if path.suffix in TOKEN_SUFFIXES else data_files(path)
