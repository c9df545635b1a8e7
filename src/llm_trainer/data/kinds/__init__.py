"""Kinds of rows: what trainers learn from. A kind is one value in one file, and one line of `KINDS`.

A row goes one way whatever its kind (`data/load.py`): file -> samples of a schema -> `Kind.encode` -> token store ->
`Kind.rows` -> `Kind.collate` -> micro-batch. Torch is imported in functions that make tensors: files are encoded without it,
and it would take 170 MB and two seconds of every process that does.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict

from llm_trainer.config.options import Reading
from llm_trainer.config.section import config_section
from llm_trainer.data.read.schemas import known_name

if TYPE_CHECKING:
    import numpy as np

    from llm_trainer.data.encode.chat import ChatFormat
    from llm_trainer.data.encode.store import TokenStore
    from llm_trainer.data.images import ImageRef
    from llm_trainer.data.read.errors import Location
    from llm_trainer.data.read.token_files import TokenFile

# name -> module and value. A kind of your own, anywhere: KINDS["mine"] = "my_package.my_module:MINE"
KINDS = {
    "text": "llm_trainer.data.kinds.language:TEXT",
    "conversations": "llm_trainer.data.kinds.language:CONVERSATIONS",
    "pairs": "llm_trainer.data.kinds.pairs:PAIRS",
    "unpaired": "llm_trainer.data.kinds.unpaired:UNPAIRED",
    "process": "llm_trainer.data.kinds.process:PROCESS",
    "prompts": "llm_trainer.data.kinds.prompts:PROMPTS",
}


WEIGHT = "weight"  # column of a store of kinds whose rows count as wholes: how much each does
NO_WEIGHT = "a row of weight 0"  # why one is not used
HARDNESS = "_hardness"  # column of a store beside those of its kind: the number that a curriculum sorts by


@config_section
class DataOptions(Reading):
    """How files become rows that fit a model."""

    block_size: int | None = None  # tokens of the context; None: no limit
    packing: str = "none"  # 'none', 'flat', 'bfd', 'bfd_split' or 'wrapped'
    truncation: str = "keep_start"  # of longer rows: 'error', 'drop', 'keep_start' or 'keep_end'
    max_left_out: float = (
        0.1  # of the conversations' characters that the chat template may leave out, before it is an error
    )
    image_columns: str = "error"  # or 'ignore': rows with images are trained as text, and counted
    image_tags: Mapping[str, str] | None = (
        None  # data file -> the csv of its images: a line per row, a column per image
    )
    workers: int = 1  # processes that encode large files
    share_prompts: bool = False  # the trainer runs what both answers of a pair begin with once, and it counts once


class Sample(NamedTuple):
    """What a schema made of a row."""

    kind: str  # the schema's canonical kind (`data/read/schemas.py`)
    values: dict[str, Any]  # the fields of that kind
    row: Any  # as the file has it
    location: "Location"
    hardness: float | None = None  # what the row has in the column of a curriculum, if there is one


class LanguageSample(TypedDict):
    """One row of language modelling."""

    input_ids: "np.ndarray"  # [T]
    trained: "np.ndarray"  # [T] True where the token is to be predicted
    document_lengths: Sequence[int]  # of the documents that the row consists of, in order; their sum is T
    loss_weights: NotRequired["np.ndarray"]  # [T] how much each trained token counts; absent: all alike
    images: NotRequired[Sequence["ImageRef"]]  # that it shows, in the order of their tokens; absent: none
    image_places: NotRequired["np.ndarray"]  # [images] the first placeholder of each
    place: NotRequired[str]  # where the row comes from, for messages about its images


Encoded = Mapping[str, "np.ndarray"] | str  # column -> values `[T]` of a row; or why it has nothing to teach
Lay = Callable[[Sequence[LanguageSample]], Any]  # samples -> batch: collate_flat, or collate_padded with its pad_id
Batch = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """One kind of rows.

    Attributes:
        name: its key in `KINDS`.
        accepts: canonical kinds of samples that become such rows; where a file can be read in several ways, the first.
        columns: of the token store.
        encode: samples of one schema, at least one -> their rows. It may raise `ChatTemplateError`: then the samples
            come again one by one, to name the row.
        rows: a store, the name of its file and the options -> an object with `__getitem__`, `lengths`, `file_sizes` and
            `ledger`; most kinds subclass `windows.Rows`.
        collate: samples of `rows`, and how language rows are laid out -> micro-batch.
        packings: values of `DataOptions.packing` that make sense; the first is the default.
        section: the section of a configuration that learns from such rows, for messages.
        token_kind: kind of the token files (`TokenFile.kind`) that can be used; '': none.
        encode_ids: as `encode`, for the rows of such a file: column -> ids.
        in_place: such a file whose ids are used where they lie -> rows; None from it: a store is made.
        may_share: whether `DataOptions.share_prompts` applies.
        columns_of_images: further columns of the store where a model sees images; none: such rows show none.
    """

    name: str
    accepts: tuple[str, ...]
    columns: tuple[str, ...]
    encode: Callable[["ChatFormat", Sequence[Sample]], Iterable[Encoded]]
    rows: Callable[["TokenStore", str, DataOptions], Any]
    collate: Callable[[Sequence[Any], Lay], Batch]
    packings: tuple[str, ...] = ("none", "flat")
    section: str = ""
    token_kind: str = ""
    encode_ids: Callable[["ChatFormat", Sequence[Sample]], Iterable[Encoded]] | None = None
    in_place: Callable[["TokenFile", DataOptions], Any] | None = None
    may_share: bool = False
    columns_of_images: tuple[str, ...] = ()

    def takes_images(self, chat: "ChatFormat") -> bool:
        """Whether rows may show images: for a model that sees, and of a kind that can say where they stand."""
        return chat.images is not None and bool(self.columns_of_images)

    def all_columns(self, chat: "ChatFormat") -> tuple[str, ...]:
        """Columns of the store, those of images included where there are any."""
        return (*self.columns, *self.columns_of_images) if self.takes_images(chat) else self.columns

    def accepted(self, chat: "ChatFormat") -> tuple[str, ...]:
        """Canonical kinds of samples that become such rows; images that are nothing but shown are conversations too."""
        return (*self.accepts, "vision") if self.takes_images(chat) and "chat" in self.accepts else self.accepts


def get_kind(name: str) -> Kind:
    """The kind of that name.

    Raises:
        ValueError: there is none; names the nearest.
    """
    module, value = KINDS[known_name(name, KINDS, "kind of rows")].split(":")
    return getattr(import_module(module), value)


def kinds_that_accept(sample_kind: str) -> list[str]:
    """Names of the kinds that samples of a schema's kind can become."""
    return [name for name in KINDS if sample_kind in get_kind(name).accepts]
