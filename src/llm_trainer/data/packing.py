"""Packing: which documents share a row, and which rows share a micro-batch. Pure functions of lengths, and their rows.

Every packing is a list of rows, each a list of `Piece`s in the order in which they are laid out.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple, Protocol

import numpy as np

from llm_trainer.config.errors import counted
from llm_trainer.data.images import ImageRef
from llm_trainer.data.kinds import LanguageSample
from llm_trainer.data.ledger import Ledger
from llm_trainer.data.read.errors import DataError, Location

Lengths = Sequence[int] | np.ndarray
BlocksOf = Callable[[int], np.ndarray]


class Piece(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of one document."""

    document: int
    start: int
    stop: int


def pack_bfd(lengths: Lengths, capacity: int) -> list[list[Piece]]:
    """Best-fit decreasing; a document longer than `capacity` keeps its first `capacity` tokens.

    What is cut off is in no piece, so the caller can report it: `length - stop` of that document. Documents of length 0
    have no piece. At worst there are about 22 % more rows than needed (11/9; Johnson 1974). Rows are in the order in
    which they were opened: a longest document first.
    """
    _check_capacity(capacity)
    pieces = [Piece(i, 0, min(length, capacity)) for i, length in enumerate(_as_list(lengths)) if length]
    return _pack_pieces(pieces, capacity)


def pack_bfd_split(lengths: Lengths, capacity: int, blocks_of: BlocksOf | None = None) -> list[list[Piece]]:
    """Best-fit decreasing; a document longer than `capacity` is split, so that every token is in exactly one piece.

    Args:
        lengths: `[documents]`, tokens.
        capacity: tokens of a row.
        blocks_of: document -> `[images, 2]`, tokens that stay together, ascending, at most `capacity` each; None: none do.
    """
    _check_capacity(capacity)
    pieces = []
    for i, length in enumerate(_as_list(lengths)):
        if length > capacity and blocks_of is not None:
            pieces += _split_between(i, length, capacity, blocks_of(i).tolist())
        else:
            pieces += [Piece(i, start, min(start + capacity, length)) for start in range(0, length, capacity)]
    return _pack_pieces(pieces, capacity)


def _split_between(document: int, length: int, capacity: int, blocks: list[list[int]]) -> list[Piece]:
    """A document in pieces of at most `capacity` tokens, none of which ends inside a block."""
    pieces = []
    start = 0
    while start < length:
        stop = min(start + capacity, length)
        for first, last in blocks:
            if first < stop < last:
                stop = first
        pieces.append(Piece(document, start, stop))
        start = stop
    return pieces


def cut_by_tokens(lengths: Lengths, max_tokens: int, flat: bool) -> list[list[int]]:
    """Split the rows of one optimizer step into micro-batches of at most `max_tokens`, every row exactly once.

    Rows of similar length come together. The micro-batch with the longest row is the first: if memory does not suffice,
    it shows at once. A row longer than `max_tokens` gets a micro-batch of its own.

    Args:
        lengths: tokens of each row.
        flat: rows are laid end to end (cost: the sum of lengths) instead of padded (cost: rows * longest row).

    Returns:
        Row indices of each micro-batch, in their original order inside it.
    """
    _check_capacity(max_tokens)
    sizes = _as_list(lengths)
    order = _longest_first(sizes)
    if flat:
        return [sorted(batch) for batch in _best_fit(sizes, order, max_tokens)]
    batches = []
    while order:
        # Padded rows all cost as much as the longest, so taking as many as fit is also the fewest micro-batches.
        num_rows = max(1, max_tokens // max(1, sizes[order[0]]))
        batches.append(sorted(order[:num_rows]))
        order = order[num_rows:]
    return batches


class SharedPrompts(NamedTuple):
    """Rows in groups that begin alike, which the trainer runs once per micro-batch.

    Attributes:
        groups: `[rows]`, equal for rows of a group.
        tokens: `[rows]` int64, with how many tokens every row of its group begins alike.
    """

    groups: np.ndarray
    tokens: np.ndarray

    def of(self, rows: np.ndarray) -> "SharedPrompts":
        """Those of some `rows [n]`."""
        return SharedPrompts(self.groups[rows], self.tokens[rows])


def cut_groups(lengths: Lengths, shared: SharedPrompts, max_tokens: int) -> list[list[int]]:
    """`cut_by_tokens` for flat rows in groups whose beginnings count once per micro-batch.

    A group comes together; one that is larger than `max_tokens` is cut into parts, each of which begins with that again.

    Args:
        lengths: tokens of each row.
        shared: what the rows have in common.
        max_tokens: of a micro-batch; a row longer than that gets one of its own.

    Returns:
        Row indices of each micro-batch, in their original order inside it.
    """
    _check_capacity(max_tokens)
    sizes = _as_list(lengths)
    members: dict[int, list[int]] = {}
    for row, group in enumerate(shared.groups.tolist()):
        members.setdefault(group, []).append(row)
    parts, costs = [], []
    for rows in members.values():
        prompt = int(shared.tokens[rows].min())
        own = [sizes[row] - prompt for row in rows]
        for part in _best_fit(own, _longest_first(own), max(1, max_tokens - prompt)):
            parts.append([rows[i] for i in part])
            costs.append(prompt + sum(own[i] for i in part))
    batches = []
    for batch in _best_fit(costs, _longest_first(costs), max_tokens):
        batches.append(sorted(chain.from_iterable(parts[i] for i in batch)))
    return batches


def shared_prompts(ids: np.ndarray, is_label: np.ndarray, lengths: np.ndarray, groups: np.ndarray) -> SharedPrompts:
    """How rows of groups begin alike, up to the token before the first label of each.

    Args:
        ids: `[N]` of all rows end to end.
        is_label: `[N]` bool, what is predicted.
        lengths: `[rows]`.
        groups: `[rows]`, equal for rows of a group.
    """
    import torch

    from llm_trainer.losses.pairs import MIN_SHARED, num_shared

    if not len(lengths):
        return SharedPrompts(groups, np.zeros(0, dtype=np.int64))
    # 1. each row against the first one of its group, also that one itself
    _, first, index = np.unique(groups, return_index=True, return_inverse=True)
    starts = np.cumsum(lengths) - lengths
    others = [ids[starts[row] : starts[row] + lengths[row]] for row in first[index]]
    compared = (np.concatenate(others).astype(np.int64), lengths[first[index]], ids.astype(np.int64), lengths, is_label)
    alike = num_shared(*(torch.from_numpy(np.ascontiguousarray(column)) for column in compared)).numpy()
    # 2. what all rows of a group have in common, where it pays for any two of them
    common, longest = np.full(len(first), np.iinfo(np.int64).max), np.zeros(len(first), dtype=np.int64)
    np.minimum.at(common, index, alike)
    np.maximum.at(longest, index, lengths)
    pays = common >= 2 * MIN_SHARED * longest
    return SharedPrompts(groups, np.where(pays, common, 0)[index])


def cut_by_length(lengths: Lengths, sizes: Sequence[int]) -> list[list[int]]:
    """Split the rows of one optimizer step into micro-batches of `sizes` rows, those of similar length together.

    Returns:
        Row indices of each micro-batch, in their original order inside it; the longest rows are in the first.
    """
    order = _longest_first(_as_list(lengths))
    bounds = np.cumsum([0, *sizes])
    return [sorted(order[start:stop]) for start, stop in pairwise(bounds.tolist())]


def _pack_pieces(pieces: list[Piece], capacity: int) -> list[list[Piece]]:
    sizes = [piece.stop - piece.start for piece in pieces]
    rows = _best_fit(sizes, _longest_first(sizes), capacity)
    packed = []
    for row in rows:
        packed.append([pieces[i] for i in row])
    return packed


def _best_fit(sizes: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Put each size, in the given order, into the fullest row that has room for it; rows of indices into `sizes`.

    Of equally full rows the one that became so first is taken (as TRL does, so rows are the same). Rows wait in one
    queue per remaining space, and a sorted list holds the spaces whose queue is not empty: a size costs one bisection.
    """
    rows: list[list[int]] = []
    waiting: dict[int, deque[int]] = {}
    spaces: list[int] = []
    for item in order:
        size = sizes[item]
        at = bisect_left(spaces, size)
        if at < len(spaces):
            space = spaces[at]
            row = waiting[space].popleft()
            if not waiting[space]:
                del spaces[at]
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        left = space - size
        if left > 0:
            queue = waiting.setdefault(left, deque())
            if not queue:
                insort(spaces, left)
            queue.append(row)
    return rows


def _longest_first(sizes: list[int]) -> list[int]:
    """Positions by falling size; equal sizes keep their order."""
    return np.argsort(-np.asarray(sizes, dtype=np.int64), kind="stable").tolist()


def _as_list(lengths: Lengths) -> list[int]:
    return np.asarray(lengths, dtype=np.int64).tolist()  # Python integers: the loops run several times faster


def _check_capacity(capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"the token limit of a row is {capacity}, expected at least 1")


# --- rows

PACKERS = {"bfd": pack_bfd, "bfd_split": pack_bfd_split}


class Pieces(Protocol):
    """Documents of which parts can be taken."""

    lengths: np.ndarray  # [documents], tokens
    ledger: Ledger

    @property
    def is_weighted(self) -> bool:
        """Whether some tokens count more or less than others."""

    def piece(self, index: int, start: int, stop: int) -> LanguageSample:
        """Tokens `[start, stop)` of a document."""

    def blocks(self, index: int) -> np.ndarray:
        """`[images, 3]` tokens of a document that stay together, from one to another, and their patches."""

    def is_trained(self, index: int, token: int) -> bool:
        """Whether a token of a document is trained on."""

    @property
    def tower_tokens(self) -> np.ndarray | None:
        """`[documents]` patches that the tower sees of their images; None: there are no images."""

    def place(self, index: int) -> str:
        """Where a document comes from, for messages."""


class Packed:
    """Documents, each one column of tokens, several in a row of up to `capacity` tokens ('bfd', 'bfd_split')."""

    def __init__(self, documents: Pieces, capacity: int, strategy: str) -> None:
        self.documents = documents
        has_images = documents.tower_tokens is not None
        if strategy == "bfd_split" and has_images:
            self.rows = pack_bfd_split(documents.lengths, capacity, lambda index: documents.blocks(index)[:, :2])
        else:
            self.rows = PACKERS[strategy](documents.lengths, capacity)
        self.lengths = np.zeros(len(self.rows), dtype=np.int64)
        num_continued = (
            0  # pieces that begin inside a document, where their first token would be trained on: it is context
        )
        for number, row in enumerate(self.rows):
            self.lengths[number] = sum(piece.stop - piece.start for piece in row)
            continued = [piece for piece in row if piece.start > 0]
            num_continued += sum(documents.is_trained(piece.document, piece.start) for piece in continued)
        self.tower_tokens = self._tower_tokens(documents.tower_tokens)
        self.file_sizes = [len(self.rows)]
        self.ledger = documents.ledger
        self.ledger.rows = len(self.rows)
        self.ledger.trained -= num_continued
        self.ledger.context += num_continued

    def __getitem__(self, index: int) -> LanguageSample:
        pieces = [self.documents.piece(*piece) for piece in self.rows[index]]
        sample = LanguageSample(
            input_ids=np.concatenate([p["input_ids"] for p in pieces]),
            trained=np.concatenate([p["trained"] for p in pieces]),
            document_lengths=[len(p["input_ids"]) for p in pieces],
        )
        if self.documents.is_weighted:
            sample["loss_weights"] = np.concatenate([p["loss_weights"] for p in pieces])
        if self.tower_tokens is not None:
            add_images(sample, pieces)
            sample["place"] = self.place(index)
        return sample

    def _tower_tokens(self, of_documents: np.ndarray | None) -> np.ndarray | None:
        """`[rows]` patches that the tower sees of a row's images; of a document in pieces, those of the images in each."""
        if of_documents is None:
            return None
        total = np.zeros(len(self.rows), dtype=np.int64)
        lengths = self.documents.lengths
        for number, row in enumerate(self.rows):
            for document, start, stop in row:
                if stop - start == lengths[document]:
                    total[number] += of_documents[document]
                    continue
                blocks = self.documents.blocks(document)
                is_inside = (blocks[:, 0] >= start) & (blocks[:, 1] <= stop)
                total[number] += blocks[is_inside, 2].sum()
        return total

    def place(self, index: int) -> str:
        """Where the documents of a row come from, for messages."""
        pieces = self.rows[index]
        more = f" and {len(pieces) - 1} more" if len(pieces) > 1 else ""
        return f"{self.documents.place(pieces[0].document)}{more}, packed into one row"


def add_images(sample: LanguageSample, pieces: Sequence[LanguageSample]) -> None:
    """Give a sample that pieces were laid end to end in the images of these, where they have any."""
    images: list[ImageRef] = []
    places: list[np.ndarray] = []
    done = 0
    for piece in pieces:
        if "images" in piece:
            images += piece["images"]
            places.append(piece["image_places"] + done)
        done += len(piece["input_ids"])
    if images:
        sample["images"], sample["image_places"] = images, np.concatenate(places)


class Blocks:
    """A flat array of ids, memory mapped perhaps, in consecutive rows of `block_size`; the last row may be shorter.

    Where documents weigh differently, `offsets [documents + 1]` says where they begin and end, `weights [documents]` how much
    the tokens of each count.
    """

    def __init__(
        self,
        ids: np.ndarray,
        name: str,
        block_size: int,
        offsets: np.ndarray | None = None,
        weights: np.ndarray | None = None,
    ) -> None:
        self.ids, self.block_size = ids, block_size
        self.offsets, self.weights = offsets, weights
        full, rest = divmod(len(ids), block_size)
        self.count = full + (rest > 1)
        self.lengths: np.ndarray = np.full(self.count, block_size, dtype=np.int64)
        if rest > 1:
            self.lengths[-1] = rest
        self.file_sizes = [self.count]
        self.ledger = Ledger(name=name, rows=self.count, read=int(self.lengths.sum()), context=self.count)
        self.ledger.trained = self.ledger.read - self.count
        if rest == 1:
            self.ledger.drop("a last block of one token", 1)
        if weights is not None:
            self.ledger.weigh(weights, self._tokens_that_count())
        self.ledger.check()
        if not self.count:
            raise DataError(Location(name), counted(len(ids), "token"), "at least two, to predict one from", "add text")

    def __getitem__(self, index: int) -> LanguageSample:
        ids = self.ids[index * self.block_size : (index + 1) * self.block_size]
        sample = LanguageSample(input_ids=ids, trained=np.ones(len(ids), dtype=bool), document_lengths=[len(ids)])
        if self.weights is not None:
            sample["loss_weights"] = self._weights_between(index * self.block_size, len(ids))
        return sample

    def _weights_between(self, start: int, length: int) -> np.ndarray:
        """`[length]` what the tokens from `start` on weigh: each as much as its document."""
        assert self.offsets is not None and self.weights is not None
        first = int(np.searchsorted(self.offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.offsets, start + length))
        edges = np.clip(self.offsets[first : last + 1], start, start + length)
        return np.repeat(self.weights[first:last], np.diff(edges))

    def _tokens_that_count(self) -> np.ndarray:
        """`[documents]` tokens of each that are used and that another one predicts."""
        assert self.offsets is not None
        used = int(self.lengths.sum())
        counts = np.diff(np.minimum(self.offsets, used))
        starts = np.arange(self.count) * self.block_size  # nothing predicts the first token of a block
        np.subtract.at(counts, np.searchsorted(self.offsets, starts, side="right") - 1, 1)
        return counts

    def place(self, index: int) -> str:
        """Where a row comes from, for messages."""
        return f"{self.ledger.name}, tokens from {index * self.block_size:,} on"
