"""The rows of a token store as they are trained on: cut to the context, counted, and accounted for in a ledger.

A row has one or several sequences of tokens (a text; both conversations of a pair). Of each, a window is used.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from llm_trainer.config.errors import counted
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.kinds import HARDNESS, WEIGHT, DataOptions, LanguageSample
from llm_trainer.data.ledger import ImageLedger, Ledger
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.shown import Images

TOKENS_AT_ONCE = 1 << 18  # of what is computed for all rows: bounds the memory, and fits a cache

EMPTY = "nothing to train on"
EMPTY_AFTER_CUT = "nothing to train on after truncation"
TOO_LONG = "longer than the context"
IMAGE_TOO_LONG = "an image longer than the context"
FIX_TOO_LONG = "raise dataset_block_size, or set data_loader_config.truncation to keep_start, keep_end or drop"
FIX_EMPTY = "`llm-trainer data check FILE` shows what each row holds; a longer dataset_block_size keeps more of it"


def row_blocks(sizes: np.ndarray) -> Iterator[slice]:
    """Consecutive rows, of `sizes [rows]` tokens, that have at most `TOKENS_AT_ONCE` together, or one that has more."""
    ends = np.cumsum(sizes)
    first = 0
    while first < len(sizes):
        before = int(ends[first - 1]) if first else 0
        stop = int(np.searchsorted(ends, before + TOKENS_AT_ONCE, side="right"))
        stop = max(stop, first + 1)
        yield slice(first, stop)
        first = stop


def count_trained(trained: np.ndarray | None, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """Tokens that the loss counts in each window; nothing predicts a window's first token, so it is never among them.

    Args:
        trained: `[N]` nonzero where trained on, all rows end to end; None: everywhere.
        starts: `[rows]` first tokens of the windows, ascending.
        stops: `[rows]` their ends, exclusive.

    Returns:
        `[rows]` int64.
    """
    counts = np.maximum(stops - starts - 1, 0)
    if trained is None or not len(starts):
        return counts
    for rows in row_blocks(np.diff(starts, append=stops[-1])):
        base, end = starts[rows.start], stops[rows.stop - 1]
        sums = np.concatenate([[0], np.cumsum(trained[base:end] != 0)])
        firsts = np.minimum(starts[rows] + 1, stops[rows])
        counts[rows] = sums[stops[rows] - base] - sums[firsts - base]
    return counts


def lay_flat(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """`values` of the windows `[starts, stops)`, end to end."""
    if np.array_equal(starts[1:], stops[:-1]):  # nothing lies between them
        return values[starts[0] : stops[-1]]
    lengths = stops - starts
    firsts = np.cumsum(lengths) - lengths  # of each window in the result
    index = np.arange(lengths.sum()) + np.repeat(starts - firsts, lengths)
    return values[index]


class Column:
    """One sequence of tokens per row of a store, and the window `[starts, stops)` of each that is used.

    Args:
        store: has the columns.
        ids: name of the column of token ids.
        trained: name of the column that says which of them are trained on, or how much each weighs; None: all, alike.
        how: the context, and which end of a longer row is cut.
        number: which of the sequences of a row this is, as its images count them.

    Attributes:
        images: that stand in it, which no end of a window cuts; None: there are none.
        full: `[rows of the store]` tokens before truncation.
        too_long: `[rows of the store]` bool.
        counts: `[rows]` tokens of the window that the loss counts.
        is_weighted: whether some of them weigh neither 0 nor 1.
    """

    def __init__(self, store: TokenStore, ids: str, trained: str | None, how: DataOptions, number: int = 0) -> None:
        self.ids = store[ids].values
        self.images = Images.of(store, number)
        self.trained = None if trained is None else store[trained].values
        self.is_weighted = self.trained is not None and self.trained.dtype.kind == "f"
        offsets = np.asarray(store[ids].offsets)
        self.starts, self.stops = offsets[:-1].copy(), offsets[1:].copy()
        self.full = self.stops - self.starts
        self.too_long = np.zeros(len(self.full), dtype=bool)
        if how.block_size is not None:
            self.too_long = self.full > how.block_size
            if how.truncation == "keep_end":
                self.starts[self.too_long] = self.stops[self.too_long] - how.block_size
            elif how.truncation == "keep_start":
                self.stops[self.too_long] = self.starts[self.too_long] + how.block_size
        self._firsts = offsets[:-1]  # of the whole sequence of each row
        self._stored = np.arange(len(self.full))
        if self.images is not None:
            starts, stops = self.starts - self._firsts, self.stops - self._firsts
            self.images.cut_between(starts, stops)
            self.starts, self.stops = starts + self._firsts, stops + self._firsts
            self.is_used = self.images.inside(starts, stops)
        self.counts = count_trained(self.trained, self.starts, self.stops)

    def select(self, keep: np.ndarray) -> None:
        """Keep the rows where `keep [rows]` is True."""
        self.starts, self.stops, self.counts = self.starts[keep], self.stops[keep], self.counts[keep]
        self._firsts, self._stored = self._firsts[keep], self._stored[keep]

    @property
    def lengths(self) -> np.ndarray:
        """`[rows]` tokens that are used."""
        return self.stops - self.starts

    def flat_ids(self, rows: np.ndarray | slice) -> np.ndarray:
        """Ids of several windows, end to end."""
        return lay_flat(self.ids, self.starts[rows], self.stops[rows])

    def tokens(self, row: int, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Ids `[T]` of a row, or the part `[start, stop)` of its window; and which of them are trained on."""
        first = int(self.starts[row])
        last = int(self.stops[row]) if stop is None else first + stop
        where = slice(first + start, last)
        ids = self.ids[where]
        trained = np.ones(len(ids), dtype=bool) if self.trained is None else self.trained[where] != 0
        return ids, trained

    def is_trained(self, row: int, token: int) -> bool:
        """Whether a token of a row's window is trained on."""
        return self.trained is None or bool(self.trained[int(self.starts[row]) + token] != 0)

    def sample(self, row: int, start: int = 0, stop: int | None = None) -> LanguageSample:
        """A row, or a part of it, as language data."""
        ids, trained = self.tokens(row, start, stop)
        sample = LanguageSample(input_ids=ids, trained=trained, document_lengths=[len(ids)])
        if self.is_weighted:
            first = int(self.starts[row]) + start
            assert self.trained is not None
            sample["loss_weights"] = self.trained[first : first + len(ids)]
        if self.images is not None:
            first = int(self.starts[row] - self._firsts[row]) + start
            shown = self.images.shown(int(self._stored[row]), first, first + len(ids))
            if shown is not None:
                sample["images"], sample["image_places"] = shown
        return sample

    def blocks(self, row: int) -> np.ndarray:
        """`[images, 3]` tokens `[start, stop)` of the images in a window, none of which may be cut, and their patches."""
        if self.images is None:
            return np.zeros((0, 3), dtype=np.int64)
        first = int(self.starts[row] - self._firsts[row])
        blocks = self.images.blocks(int(self._stored[row])) - np.array([first, first, 0])
        return blocks[(blocks[:, 0] >= 0) & (blocks[:, 1] <= self.lengths[row])]

    def weights(self) -> np.ndarray:
        """`[N]` what the tokens that the loss counts weigh, of all windows."""
        assert self.trained is not None
        weights = [np.empty(0, dtype=np.float32)]
        for rows in row_blocks(self.lengths):
            starts = np.minimum(self.starts[rows] + 1, self.stops[rows])  # nothing predicts a window's first token
            weights.append(lay_flat(self.trained, starts, self.stops[rows]))
        every = np.concatenate(weights)
        return every[every != 0]


class Rows:
    """The rows of a store that are used; a subclass says what a sample of them is (`__getitem__`).

    Args:
        name: the file, for messages.
        columns: the sequences of a row; one whose window has nothing to learn from is never used.
        unusable: `[rows of the store]` bool, rows that are left out besides, and the reason.
        learns: False: nothing is trained on in these rows, they are only read.

    Attributes:
        stored: `[rows]` where each row is in the store.
        lengths: `[rows]` tokens, as a token budget counts them, which depends on how rows are laid out.
        num_tokens: `[rows]` tokens; orders and shares follow from them.
        weights: `[rows]` how much each row counts as a whole; None: all alike.
        hardness: `[rows]` what a curriculum by a column of the file sorts by; empty where there is none.

    Raises:
        DataError: no row is left, or one is too long and `how.truncation` is 'error'.
    """

    def __init__(
        self,
        store: TokenStore,
        name: str,
        how: DataOptions,
        columns: Sequence[Column],
        unusable: tuple[np.ndarray, str] | None = None,
        learns: bool = True,
    ) -> None:
        self.store, self.how, self.columns = store, how, columns
        self.ledger = Ledger(name=name)
        note_dropped(self.ledger, store)
        self.stored = self._select(unusable, learns).nonzero()[0]
        self.lengths: np.ndarray = np.sum([column.lengths for column in columns], axis=0)
        self.num_tokens = self.lengths
        self.tower_tokens = self._tower_tokens()
        self.file_sizes = [len(self.lengths)]
        self.weights = weights_of(store)
        if self.weights is not None:
            self.weights = self.weights[self.stored]
            self.ledger.weigh(self.weights, np.sum([column.counts for column in columns], axis=0))
        self.hardness = np.asarray(store[HARDNESS].values)[self.stored] if how.hardness_column else np.empty(0)

    def _select(self, unusable: tuple[np.ndarray, str] | None, learns: bool) -> np.ndarray:
        """Leave out the rows that cannot be used, and account for every token in the ledger.

        Returns:
            `[rows of the store]` bool: the rows that are kept, also in the columns.
        """
        columns, ledger = self.columns, self.ledger
        too_long = np.any([column.too_long for column in columns], axis=0)
        full = np.sum([column.full for column in columns], axis=0)
        if self.how.truncation == "error" and too_long.any():
            row = int(too_long.argmax())
            longest = max(int(column.full[row]) for column in columns)
            expected = f"at most {self.how.block_size:,}, the context"
            raise DataError(Location(ledger.name, row + 1), counted(longest, "token"), expected, FIX_TOO_LONG)
        # 1. which rows are left out, each for its first reason
        counts = [column.counts if learns else column.lengths for column in columns]
        empty = np.any([count == 0 for count in counts], axis=0)
        truncated = too_long & (self.how.truncation != "drop")
        reasons = [(self._with_too_long_image(), IMAGE_TOO_LONG)]
        reasons += [
            (too_long & ~truncated, TOO_LONG),
            (empty & truncated, EMPTY_AFTER_CUT),
            (empty & ~truncated, EMPTY),
        ]
        if unusable is not None:
            reasons.append(unusable)
        keep = np.ones(len(full), dtype=bool)
        num_images = self._num_images()
        for mask, reason in reasons:
            dropped = mask & keep
            if dropped.any():
                ledger.drop(reason, int(full[dropped].sum()), int(dropped.sum()))
                ledger.drop_images(reason, int(num_images[dropped].sum()))
                keep &= ~dropped
        self._count_images(keep, num_images)
        for column in columns:
            column.select(keep)
        # 2. where the tokens of the others go
        num_read, num_used = int(full[keep].sum()), sum(int(column.lengths.sum()) for column in columns)
        if learns:
            ledger.trained = sum(int(column.counts.sum()) for column in columns)
        ledger.rows = int(keep.sum())
        ledger.read += num_read
        ledger.context = num_used - ledger.trained
        ledger.truncated = num_read - num_used
        ledger.truncated_rows = int((truncated & keep).sum())
        for column in columns:
            if learns and column.is_weighted:
                weights = column.weights()
                ledger.weigh(weights, np.ones(len(weights), dtype=np.int64))
        ledger.dropped_rows = +ledger.dropped_rows
        ledger.check()
        if not ledger.rows:
            why = "; ".join(ledger.lines()[1:]) or "an empty file"
            raise DataError(
                Location(ledger.name), f"no row to train on ({why})", "rows with answers that fit", FIX_EMPTY
            )
        return keep

    def _with_too_long_image(self) -> np.ndarray:
        """`[rows of the store]` bool: a row has an image that fits into no window."""
        found = np.zeros(len(self.store), dtype=bool)
        for column in self.columns:
            if column.images is not None and self.how.block_size is not None:
                found |= column.images.longer_than(self.how.block_size)
        return found

    def _num_images(self) -> np.ndarray:
        """`[rows of the store]` images of a row, in all its sequences."""
        counts = np.zeros(len(self.store), dtype=np.int64)
        for column in self.columns:
            if column.images is not None:
                counts += column.images.per_row()
        return counts

    def _count_images(self, keep: np.ndarray, num_images: np.ndarray) -> None:
        """Account for the images of the rows that are kept."""
        read = int(num_images[keep].sum())
        if not read:
            return
        used = 0
        for column in self.columns:
            if column.images is not None:
                used += int(column.images.per_row(column.is_used)[keep].sum())
        account = self.ledger.images = self.ledger.images or ImageLedger()
        account.read += read
        account.used += used
        account.cut += read - used

    def _tower_tokens(self) -> np.ndarray | None:
        """`[rows]` patches that the tower sees of a row's images; None: there are no images."""
        total, is_any = np.zeros(len(self.stored), dtype=np.int64), False
        for column in self.columns:
            if column.images is not None:
                total += column.images.per_row(column.is_used, column.images.towers)[self.stored]
                is_any = True
        return total if is_any else None

    def place(self, index: int) -> str:
        """Where a row comes from, for messages: its number in the file, or among those that were kept of it."""
        is_whole = not self.store.meta["dropped"]
        kept = "" if is_whole else " of those that were kept"
        return f"{Location(self.ledger.name, int(self.stored[index]) + 1)}{kept}"


def weight_column(weight: float) -> np.ndarray:
    """What a row has in the column `WEIGHT`, `[1]`."""
    return np.array([weight], dtype=np.float32)


def weights_of(store: TokenStore) -> np.ndarray | None:
    """`[rows of the store]` how much each row counts as a whole; None: all alike."""
    if WEIGHT not in store.columns:
        return None
    weights = np.asarray(store[WEIGHT].values)
    return None if (weights == 1).all() else weights


def note_dropped(ledger: Ledger, store: TokenStore) -> None:
    """Count the rows that were left out when `store` was made, and what was noted about the others."""
    ledger.unread = list(store.meta.get("unread", ()))
    ledger.notes.update(store.meta["notes"])
    for reason, rows in store.meta["dropped"].items():
        ledger.drop(reason, rows=rows)
    for reason, images in store.meta.get("dropped_images", {}).items():
        ledger.drop_images(reason, images)
