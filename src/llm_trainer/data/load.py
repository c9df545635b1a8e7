"""Files -> token stores -> one dataset of a kind of rows. Everything that reads text for training goes through here."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_trainer.data.cache import key_of
from llm_trainer.data.duplicates import EXACT, NEAR, without_duplicates
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.printed import share_left_out
from llm_trainer.data.encode.row_images import RowImages
from llm_trainer.data.encode.rows import RowEncoder
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.encode.workers import build_store
from llm_trainer.data.ids import check_all_ids, open_tokens_of
from llm_trainer.data.kinds import HARDNESS, DataOptions, Kind, get_kind, kinds_that_accept
from llm_trainer.data.ledger import Ledger, note_lines
from llm_trainer.data.packing import PACKERS
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.files import files_of, read_rows
from llm_trainer.data.read.hub import is_streamed
from llm_trainer.data.read.recognise import head_of, schema_of, value_that_does_not_fit
from llm_trainer.data.read.renaming import Renaming, reading_of
from llm_trainer.data.read.schemas import Schema
from llm_trainer.data.read.token_files import TOKEN_SUFFIXES, open_tokens
from llm_trainer.data.windows import Rows, note_dropped

if TYPE_CHECKING:
    from llm_trainer.data.stream import SampleStream
    from llm_trainer.data.vision import ImageFormat
    from llm_trainer.layout import Layout

PARALLEL_FROM = 32 << 20  # bytes of a file from which several processes encode it


@dataclass
class Joined:
    """Several datasets, one after another."""

    parts: Sequence[Any]
    stores: Sequence[TokenStore] = ()  # that they were made of; not of files that are used in place
    images: "ImageFormat | None" = None  # how their images become numbers

    def __post_init__(self) -> None:
        self.file_sizes = list(chain.from_iterable(part.file_sizes for part in self.parts))
        self.lengths = np.concatenate([part.lengths for part in self.parts])
        self._firsts = np.cumsum([0, *(len(part.lengths) for part in self.parts)])
        self.ledgers = [part.ledger for part in self.parts]

    @property
    def hardness(self) -> np.ndarray:
        """What a curriculum by a column of the files sorts by, `[rows]`."""
        return np.concatenate([part.hardness for part in self.parts])

    @property
    def num_tokens(self) -> np.ndarray:
        """Tokens of every row `[rows]`, whatever the layout."""
        counts = []
        for part in self.parts:
            of_part = part.num_tokens if isinstance(part, Rows) else part.lengths
            counts.append(of_part)
        return np.concatenate(counts)

    @property
    def costs(self) -> np.ndarray:
        """What each row takes of a token budget, `[rows]`: its tokens, and those that the tower sees of its images."""
        towers = [getattr(part, "tower_tokens", None) for part in self.parts]  # a kind of the user's own need not know
        if all(tower is None for tower in towers):
            return self.lengths
        costs = [
            part.lengths if tower is None else part.lengths + tower
            for part, tower in zip(self.parts, towers, strict=True)
        ]
        return np.concatenate(costs)

    def __getitem__(self, index: int) -> Any:
        part = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.parts[part][index - int(self._firsts[part])]

    def place(self, index: int) -> str:
        """Where a row comes from, for messages."""
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        part, row = self.parts[number], index - int(self._firsts[number])
        # A kind of the user's own need not know.
        return part.place(row) if hasattr(part, "place") else f"{part.ledger.name}, sample {row + 1}"


def load(paths: Iterable[str], kind: Kind, chat: ChatFormat, options: DataOptions, cache: Path) -> Joined:
    """All files as one dataset of rows of `kind`, in the order given.

    Args:
        paths: files or folders.
        kind: what the rows are (`data.kinds.get_kind`).
        chat: how conversations become ids.
        options: schema, context, packing and truncation.
        cache: folder of the token stores: a file is encoded once and found again.

    Raises:
        DataError: a file, a row, or what is asked of them cannot be used; the message says where, and the fix.
        ValueError: no file, or a packing that makes no sense for these rows.
    """
    if options.packing not in kind.packings:
        known = " or ".join(map(repr, kind.packings))
        raise ValueError(f"data_loader_config.packing: got {options.packing!r}, expected {known} for {kind.name}")
    files = _files(paths, options)
    if not files:
        raise ValueError("file_dataset: no file was given, expected at least one path")
    if options.hardness_column:
        _refuse_hardness([file for file, _ in files], options)
    joined = _datasets(files, kind, chat, options, cache)
    refuse_left_out(joined.ledgers, options.max_left_out)
    return joined


def _refuse_hardness(files: Sequence[Path], options: DataOptions) -> None:
    """A curriculum by a column needs rows of which each is from one row of its file.

    Raises:
        ValueError: several documents are packed into a row.
        DataError: a file of token ids has no columns.
    """
    wanted = f"data_loader_config.curriculum: {options.hardness_column!r}"
    if options.packing not in ("none", "flat"):
        raise ValueError(
            f"{wanted} is a column of single rows, but packing {options.packing!r} puts several into one; expected packing "
            "none or flat, or curriculum: length"
        )
    for file in files:
        if file.suffix in TOKEN_SUFFIXES:
            fix = "give the text, or set data_loader_config.curriculum: length"
            raise DataError(Location(file), "token ids, which have no columns", f"a column for {wanted}", fix)


def refuse_left_out(ledgers: Sequence[Ledger], most: float) -> None:
    """A template must print most of what the conversations say.

    Raises:
        DataError: more than the share `most` of all their characters is left out.
    """
    notes = Counter[str]()
    for ledger in ledgers:
        notes.update(ledger.notes)
    if share_left_out(notes) <= most:
        return
    found = "; ".join(line for line in note_lines(notes) if "chat template" in line)
    fix = (
        "use a chat template that prints it; for reasoning set sft_config.thinking to all, or to last or none to leave it out; "
        "or raise data_loader_config.max_left_out"
    )
    names = ", ".join(ledger.name for ledger in ledgers)
    raise DataError(Location(names), found, f"at most {most:.0%}", fix, "left_out")


def _files(paths: Iterable[str], options: DataOptions) -> list[tuple[Path, DataOptions]]:
    """All files of some paths, each with its options."""
    files = []
    for path in map(Path, paths):
        files += [(file, reading_of(options, path, file)) for file in files_of(path)]
    return files


@dataclass
class _NoRows:
    """What is left of a file all of whose rows repeat others."""

    ledger: Ledger

    def __post_init__(self) -> None:
        self.file_sizes, self.lengths, self.hardness = [0], np.empty(0, dtype=np.int64), np.empty(0)


def _datasets(
    files: Sequence[tuple[Path, DataOptions]], kind: Kind, chat: ChatFormat, options: DataOptions, cache: Path
) -> Joined:
    """The rows of all files, without those that repeat others where this was asked for."""
    # 1. the stores of all files that are not used where they lie
    in_place = [_in_place(file, kind, chat, how, cache) for file, how in files]
    others = [pair for pair, rows in zip(files, in_place, strict=True) if rows is None]
    stores = [store_of(file, kind, chat, how, cache) for file, how in others]
    if options.duplicates != "keep":
        if len(others) < len(files):
            raise ValueError(
                "data_loader_config.duplicates: an array of ids has no documents to compare; give the text"
            )
        stores = without_duplicates(stores, options.duplicates, options.duplicate_similarity, cache)
    # 2. their rows
    parts = []
    remaining = iter(stores)
    for (file, _), rows in zip(files, in_place, strict=True):
        if rows is None:
            store = next(remaining)
            rows = kind.rows(store, str(file), options) if _has_rows(store) else _NoRows(_ledger(store, str(file)))
            how = "made now" if store.is_new else "found there"
            rows.ledger.kept_in = f"{store.folder} ({how})"
            if options.hardness_column and not isinstance(rows, Rows | _NoRows):
                expected = "a subclass of llm_trainer.data.windows.Rows, for a curriculum by a column"
                raise ValueError(f"rows of kind {kind.name!r}: got {type(rows).__name__}, expected {expected}")
        parts.append(rows)
    return Joined(parts, stores, chat.images)


def _in_place(path: Path, kind: Kind, chat: ChatFormat, options: DataOptions, cache: Path) -> Any:
    """The rows of a token file whose ids are used where they lie; None: a store is made of the file."""
    if path.suffix not in TOKEN_SUFFIXES or kind.in_place is None or str(path) in (options.image_tags or {}):
        return None
    tokens = open_tokens_of(path, kind, chat)
    rows = kind.in_place(tokens, options)
    if rows is not None:
        key = key_of(path, ["ids"], [], chat)
        check_all_ids(tokens, chat, cache / f"{path.stem}-{key}.checked")
    return rows


def _has_rows(store: TokenStore) -> bool:
    """False where only repetitions were in it; a file without rows for another reason is an error of `kind.rows`."""
    dropped = store.meta["dropped"]
    return len(store) > 0 or not {EXACT, NEAR} & dropped.keys()


def _ledger(store: TokenStore, name: str) -> Ledger:
    ledger = Ledger(name=name)
    note_dropped(ledger, store)
    return ledger


def open_stream(dataset: Joined, kind: Kind, options: DataOptions, pad_id: int, **how: Any) -> "SampleStream":
    """A dataset as a stream of micro-batches, laid out as its kind and the packing say.

    Args:
        dataset: what `load` gave for `kind` and `options`.
        pad_id: token that pads rows.
        **how: batch size, ranks, order and the like, of `SampleStream`.
    """
    from llm_trainer.data.collate import collate_cheaper, collate_flat, collate_padded, lay_with_images
    from llm_trainer.data.stream import SampleStream

    flat = options.packing == "flat" or options.packing in PACKERS
    layout: Layout | None = how.get("layout")
    lay: Any = collate_flat if flat else partial(collate_padded, pad_id=pad_id)
    if layout is not None and layout.flat and layout.dense_width:
        lay = partial(collate_cheaper, pad_id=pad_id, pays=layout.pays)
    if dataset.images is not None:
        lay = partial(lay_with_images, lay=lay, images=dataset.images)
    collate: Any = kind.collate
    return SampleStream(dataset, partial(collate, lay=lay), flat=flat or options.share_prompts, **how)


# --- what a file holds


def find_schema(
    path: Path, kind: Kind, options: DataOptions, accepts: Sequence[str] | None = None, takes_images: bool = False
) -> Schema:
    """The schema that was forced, or the one that the first rows of a file have, checked against the kind.

    Args:
        path: the file.
        kind: what its rows are learned as.
        options: how they are read.
        accepts: canonical kinds of samples that will do; None: those of the kind.
        takes_images: rows may show images.

    Raises:
        DataError: no known schema, or one whose samples cannot become rows of this kind.
    """
    wanted = kind.accepts if accepts is None else accepts
    # Images that are left out on purpose decide as little about the format as those that are learned from.
    schema = schema_of(path, options, wanted, takes_images or options.image_columns == "ignore")
    if schema.kind not in wanted:
        shows_images = schema.kind == "vision"
        read_as = "chat" if shows_images else schema.kind
        sections = [get_kind(name).section for name in kinds_that_accept(read_as)]
        fix = "name another format in data_loader_config.schema (--schema)"
        if sections:
            fix = f"train on it with {' or '.join(sections)}"
        if shows_images and not takes_images:
            fix = "train a model that sees (model_config.vision, or the folder of one)"
            if options.image_columns != "ignore":
                fix += ", or set data_loader_config.image_columns: ignore to train on the text alone"
        found = f"rows of kind '{schema.kind}' (format '{schema.name}')"
        expected = f"rows of kind {' or '.join(kind.accepts)} for {kind.name}"
        location, row = next(iter(head_of(path, options)), (Location(path), None))
        if schema.renaming is not None:
            row, location = schema.renaming(row, location)
        wrong_value = value_that_does_not_fit(row, location, kind.accepts, fits=schema)
        raise wrong_value or DataError(location, found, expected, fix)
    return schema


def choose_kind(names: Sequence[str], paths: Iterable[str], options: DataOptions) -> Kind:
    """The first of several kinds that the first file's rows fit; the first kind where none does.

    Of a single kind no file is read.
    """
    kinds = [get_kind(name) for name in names]
    files = _files(islice(paths, 1), options) if len(kinds) > 1 else []
    if not files:
        return kinds[0]
    file, how = files[0]
    return next((kind for kind in kinds if _fits(file, kind, how)), kinds[0])


def _fits(path: Path, kind: Kind, options: DataOptions) -> bool:
    if path.suffix in TOKEN_SUFFIXES:
        return open_tokens(path).kind == kind.token_kind
    try:
        find_schema(path, kind, options)
    except DataError:  # what is wrong with it is said when it is loaded
        return False
    return True


# --- files -> token stores


def store_of(path: Path, kind: Kind, chat: ChatFormat, options: DataOptions, cache: Path) -> TokenStore:
    """The token store of a file, made now or found in `cache`."""
    is_tokens = path.suffix in TOKEN_SUFFIXES
    takes_images = kind.takes_images(chat)
    schema = None if is_tokens else find_schema(path, kind, options, kind.accepted(chat), takes_images)
    name = None if schema is None else schema.name
    size = 0 if is_streamed(path) else path.stat().st_size  # 0: not known
    workers = options.workers if size >= PARALLEL_FROM or is_streamed(path) else 1
    how: list[Any] = [options.bad_rows, options.image_columns, options.text_unit, options.columns, options.roles]
    columns = kind.all_columns(chat)
    images: RowImages | None = None
    if takes_images:
        assert chat.images is not None
        csv = (options.image_tags or {}).get(str(path))
        images = RowImages.beside(chat.images, path, options.image_root, options.bad_images, csv)
        how += [str(images.root.resolve()), images.bad, images.tags]
    if options.hardness_column:
        how.append(options.hardness_column)
        columns = (*columns, HARDNESS)
    functions: list[Any] = [kind.encode_ids] if schema is None else [kind.encode, schema.convert]
    key = key_of(path, [name or "tokens", kind.name, *how], functions, chat)
    unreadable: Counter[str] = Counter()

    def note(error: DataError) -> None:
        if options.bad_rows == "error":
            raise error
        unreadable[error.reason] += 1

    foreseen_from = size
    if is_tokens:
        foreseen_from = 0  # a row may be the whole file
        tokens = open_tokens_of(path, kind, chat)
        rows: Any = ((Location(path, i + 1), tokens[i]) for i in range(len(tokens)))
    else:
        rows = read_rows(path, options.text_unit, on_error=note)
    if images is not None:
        rows = images.as_many(rows, path)
    folder = cache / f"{path.stem.replace(':', '-')}-{key}"
    renaming = Renaming.of(options)
    encode = RowEncoder(
        kind,
        name,
        chat,
        options.bad_rows,
        options.image_columns,
        options.text_unit,
        renaming,
        options.hardness_column,
        images,
    )
    meta: dict[str, Any] = {"source": str(path), "schema": name}
    if schema is not None and schema.kind != "prompt":  # prompts keep all columns, for rewards
        head = [(replace(where, takes_images=takes_images), row) for where, row in head_of(path, options)]
        meta["unread"] = schema.unread(head)
        if sorted_by := options.hardness_column:
            read = (sorted_by, sorted_by.partition(".")[0])
            meta["unread"] = [name for name in meta["unread"] if name not in read]
    return build_store(
        folder,
        rows,
        encode,
        columns,
        workers=workers,
        meta=meta,
        unreadable=unreadable,
        source_bytes=foreseen_from,
    )
