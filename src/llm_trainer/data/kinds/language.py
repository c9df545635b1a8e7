"""Rows of language modelling: plain text, whose every token is learnt, and conversations, whose answers are."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.from_ids import spans_from_ids
from llm_trainer.data.encode.pictured import IMAGE_COLUMNS, PLACES, find_places, image_columns
from llm_trainer.data.encode.plain import EncodedChat
from llm_trainer.data.encode.printed import UNPRINTED
from llm_trainer.data.encode.store import TokenStore, compact_ids
from llm_trainer.data.kinds import NO_WEIGHT, WEIGHT, Batch, DataOptions, Encoded, Kind, LanguageSample, Lay, Sample
from llm_trainer.data.packing import PACKERS, Blocks, Packed
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.formats import END_OF_TEXT
from llm_trainer.data.read.token_files import TokenFile
from llm_trainer.data.read.weights import row_weight, weight_as_a_whole
from llm_trainer.data.windows import IMAGE_TOO_LONG, Column, Rows, note_dropped, weight_column, weights_of


class Documents(Rows):
    """The rows of a store of conversations, `input_ids` and `trained`, or of texts, `input_ids` and `weight`."""

    def __init__(self, store: TokenStore, name: str, how: DataOptions, capacity: int | None = None) -> None:
        """`capacity`: tokens of the rows that documents are split for, which an image must fit into; None: not split."""
        trained = "trained" if "trained" in store.columns else None
        self.tokens = Column(store, "input_ids", trained, how)
        unusable = None
        if capacity is not None and self.tokens.images is not None:
            unusable = self.tokens.images.longer_than(capacity), IMAGE_TOO_LONG
        super().__init__(store, name, how, [self.tokens], unusable)

    @property
    def is_weighted(self) -> bool:
        """Whether some tokens count more or less than others."""
        return self.tokens.is_weighted or self.weights is not None

    def __getitem__(self, index: int) -> LanguageSample:
        return self.piece(index)

    def piece(self, index: int, start: int = 0, stop: int | None = None) -> LanguageSample:
        """A row, or its tokens `[start, stop)`."""
        sample = self.tokens.sample(index, start, stop)
        if self.weights is not None:
            sample["loss_weights"] = np.full(len(sample["input_ids"]), self.weights[index], dtype=np.float32)
        if "images" in sample:
            sample["place"] = self.place(index)
        return sample

    def is_trained(self, index: int, token: int) -> bool:
        """Whether a token of a row is trained on."""
        return self.tokens.is_trained(index, token)

    def blocks(self, index: int) -> np.ndarray:
        """`[images, 3]` tokens of a row that stay together, from one to another, and their patches."""
        return self.tokens.blocks(index)


def language_rows(store: TokenStore, name: str, how: DataOptions) -> Documents | Packed | Blocks:
    """Training rows of a store, in the packing that was asked for."""
    if how.packing == "wrapped":
        assert how.block_size is not None
        if len(store.columns.get(PLACES, ())) and len(store[PLACES].values):
            found = "rows with images, which packing 'wrapped' would cut anywhere"
            fix = "set data_loader_config.packing to bfd_split, bfd or none"
            raise DataError(Location(name), found, "a packing that keeps images whole", fix)
        column = store["input_ids"]
        blocks = Blocks(column.values, name, how.block_size, column.offsets, weights_of(store))
        note_dropped(blocks.ledger, store)
        return blocks
    if how.packing not in PACKERS:
        return Documents(store, name, how)
    assert how.block_size is not None
    if how.packing == "bfd_split":  # long documents are split, not cut
        documents = Documents(store, name, replace(how, block_size=None), how.block_size)
    else:
        documents = Documents(store, name, how)
    return Packed(documents, how.block_size, how.packing)


def collate_language(samples: Sequence[LanguageSample], lay: Lay) -> Batch:
    """Rows as `data.collate.LanguageBatch`."""
    return lay(samples)


def encode_text(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Texts -> ids, with the end token; every token is trained on, so no column says it, unless there are images."""
    texts = [sample.values["text"] for sample in samples]
    for sample, text, columns in zip(samples, texts, _columns_of_texts(chat, samples, texts), strict=True):
        weight = weight_as_a_whole(sample.row, sample.location)
        if weight == 0:
            yield NO_WEIGHT
            continue
        if END_OF_TEXT in text and not chat.parse_special_tokens:
            sample.location.note(
                f"text: it holds {END_OF_TEXT} as plain text; text_unit: endoftext ends documents there"
            )
        yield {**columns, WEIGHT: weight_column(weight)}


def _columns_of_texts(
    chat: ChatFormat, samples: Sequence[Sample], texts: Sequence[str]
) -> Iterator[dict[str, np.ndarray]]:
    if not TEXT.takes_images(chat):
        for ids in chat.encode_texts(texts):
            yield {"input_ids": compact_ids(ids, chat.vocab_size)}
        return
    for one in chat.encode_documents(texts, [sample.values.get("images", ()) for sample in samples]):
        row = {"input_ids": compact_ids(one.input_ids, chat.vocab_size), "trained": one.loss_weights()}
        yield row | image_columns([(one.images, one.places)])


def encode_text_ids(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Ids as they are."""
    for sample in samples:
        ids = sample.values["input_ids"]
        row = {"input_ids": ids.astype(np.uint32), WEIGHT: weight_column(1.0)}
        if TEXT.takes_images(chat):
            trained, columns = _images_in_ids(chat, sample, np.ones(len(ids), dtype=np.uint8))
            row |= {"trained": trained, **columns}
        yield row


def _images_in_ids(chat: ChatFormat, sample: Sample, trained: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What is trained on of ids whose placeholders are there already, and the columns of their images."""
    assert chat.images is not None
    refs = sample.values.get("images", ())
    places = find_places(sample.values["input_ids"], refs, chat.images)
    for place in places:
        trained[place.start : place.stop] = 0
    return trained, image_columns([(refs, places)])


def flat_array(tokens: TokenFile, how: DataOptions) -> Blocks | None:
    """Blocks of a memory-mapped array of ids, where it lies; None: the file holds lists."""
    if not isinstance(tokens.rows, np.ndarray) or not how.block_size:
        return None
    return Blocks(tokens.rows.reshape(-1), str(tokens.path), how.block_size)


def encode_conversations(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Conversations, or plain prompts with their completions -> ids, and which of them are trained on."""
    encoded: Iterable[EncodedChat]
    if samples[0].kind == "completion":
        pairs = [(sample.values["prompt"], sample.values["completion"]) for sample in samples]
        encoded = chat.encode_completions(pairs, [sample.values.get("images", ()) for sample in samples])
    else:
        conversations = [sample.values["messages"] for sample in samples]
        encoded = chat.encode_each(conversations, [sample.values.get("tools") for sample in samples])
    for sample, one in zip(samples, encoded, strict=True):
        if sample.kind != "completion":
            sample.location.note_all(chat.left_out(sample.values["messages"], sample.values.get("tools")))
        sample.location.note(UNPRINTED, one.num_unprinted)
        weight = row_weight(sample.row, sample.location)
        if weight == 0:
            yield NO_WEIGHT
        else:
            row = {"input_ids": compact_ids(one.input_ids, chat.vocab_size), "trained": one.loss_weights(weight)}
            yield row | image_columns([(one.images, one.places)]) if one.images else row


def encode_conversation_ids(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Conversations in ids; what is trained on is found again from the marks of the chat template."""
    for sample in samples:
        ids = sample.values["input_ids"]
        trained = np.asarray(spans_from_ids(ids.tolist(), chat), dtype=np.uint8)
        row = {"input_ids": ids.astype(np.uint32), "trained": trained}
        if CONVERSATIONS.takes_images(chat):
            row["trained"], columns = _images_in_ids(chat, sample, trained)
            row |= columns
        yield row


TEXT = Kind(
    name="text",
    accepts=("text",),
    columns=("input_ids", WEIGHT),
    encode=encode_text,
    rows=language_rows,
    collate=collate_language,
    packings=("wrapped", "none", "flat", "bfd", "bfd_split"),
    section="pretrain_config",
    token_kind="sequences",
    encode_ids=encode_text_ids,
    in_place=flat_array,
    columns_of_images=("trained", *IMAGE_COLUMNS),
)
CONVERSATIONS = Kind(
    name="conversations",
    accepts=("chat", "completion"),
    columns=("input_ids", "trained"),
    encode=encode_conversations,
    rows=language_rows,
    collate=collate_language,
    packings=("none", "flat", "bfd", "bfd_split"),  # 'wrapped' cuts anywhere, and would train on prompts
    section="sft_config",
    token_kind="sequences",
    encode_ids=encode_conversation_ids,
    columns_of_images=IMAGE_COLUMNS,
)
