"""Views of token stores as training rows: truncated, packed or cut into blocks, with a ledger that balances."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_trainer.data.collate import LanguageSample
from llm_trainer.data.encode.store import Ragged, TokenStore
from llm_trainer.data.ledger import Ledger
from llm_trainer.data.packing import Piece, pack_bfd, pack_bfd_split
from llm_trainer.data.read.errors import DataError, Location

_ROWS_AT_ONCE = 65536  # bounds the memory of counting trained tokens

TRUNCATION = ("keep_start", "keep_end", "drop", "error")
EMPTY = "nothing to train on"
EMPTY_AFTER_CUT = "nothing to train on after truncation"
TOO_LONG = "longer than the context"
FIX_EMPTY = "`llm-trainer data check FILE` shows what each row holds; a longer dataset_block_size keeps more of it"


def _trained_counts(trained: Ragged | None, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """`[rows]` tokens that the loss counts in `[starts, stops)` (absolute), the first token of a row never among them."""
    counts = np.maximum(stops - starts - 1, 0)
    if trained is None:
        return counts
    for first in range(0, len(starts), _ROWS_AT_ONCE):
        rows = slice(first, first + _ROWS_AT_ONCE)
        base, end = starts[rows].min(initial=0), stops[rows].max(initial=0)
        sums = np.concatenate([[0], np.cumsum(trained.values[base:end] != 0)])
        counts[rows] = sums[stops[rows] - base] - sums[np.minimum(starts[rows] + 1, stops[rows]) - base]
    return counts


def note_dropped(ledger: Ledger, store: TokenStore) -> None:
    """Enter the rows that were left out when `store` was made."""
    for reason, rows in store.meta["dropped"].items():
        ledger.drop(reason, store.meta["dropped_tokens"].get(reason, 0), rows)


class Documents:
    """The rows of a store, at most `max_length` tokens each; a row without a trained token is never used.

    Args:
        store: columns `input_ids` and, unless everything is trained on, `trained`.
        max_length: tokens of the context; None: no limit.
        truncation: what happens to longer rows: 'keep_start', 'keep_end', 'drop', or 'error'.

    Raises:
        DataError: no row is left, or a row is too long and `truncation` is 'error'.
    """

    def __init__(self, store: TokenStore, name: str, max_length: int | None, truncation: str = "keep_start") -> None:
        self.ids = store["input_ids"]
        self.trained = store.columns.get("trained")
        offsets = np.asarray(self.ids.offsets)
        starts, stops = offsets[:-1].copy(), offsets[1:].copy()
        self.ledger = ledger = Ledger(name=name)
        note_dropped(ledger, store)
        too_long = stops - starts > max_length if max_length is not None else np.zeros(len(starts), dtype=bool)
        if too_long.any() and truncation == "error":
            row = int(too_long.argmax())
            raise DataError(
                Location(name, row + 1),
                f"{stops[row] - starts[row]:,} tokens",
                f"at most {max_length:,}, the context",
                "raise dataset_block_size, or set data_loader_config.truncation to keep_start, keep_end or drop",
            )
        keep = np.ones(len(starts), dtype=bool)
        if truncation == "drop":
            keep = ~too_long
            ledger.drop(TOO_LONG, int((stops - starts)[too_long].sum()), int(too_long.sum()))
        cut = too_long & keep
        full = stops - starts
        if max_length is not None and truncation == "keep_end":
            starts[cut] = stops[cut] - max_length
        elif max_length is not None:
            stops[cut] = starts[cut] + max_length
        counts = _trained_counts(self.trained, starts, stops)
        for mask, reason in ((keep & (counts == 0) & cut, EMPTY_AFTER_CUT), (keep & (counts == 0) & ~cut, EMPTY)):
            if mask.any():
                ledger.drop(reason, int(full[mask].sum()), int(mask.sum()))
        keep &= counts > 0
        self.starts, self.stops = starts[keep], stops[keep]
        self.lengths = self.stops - self.starts
        ledger.rows = int(keep.sum())
        ledger.read += int(full[keep].sum())
        ledger.trained = int(counts[keep].sum())
        ledger.context = int(self.lengths.sum()) - ledger.trained
        ledger.truncated = int((full[keep] - self.lengths).sum())
        ledger.truncated_rows = int((cut & keep).sum())
        ledger.dropped_rows = +ledger.dropped_rows
        ledger.check()
        self.file_sizes = [len(self.lengths)]
        if not ledger.rows:
            found = "; ".join(ledger.lines()[1:]) or "an empty file"
            raise DataError(Location(name), f"no row to train on ({found})", "rows with answers that fit", FIX_EMPTY)

    def __getitem__(self, index: int) -> LanguageSample:
        return self.piece(index, 0, int(self.lengths[index]))

    def piece(self, index: int, start: int, stop: int) -> LanguageSample:
        """The tokens `[start, stop)` of row `index`."""
        where = slice(int(self.starts[index]) + start, int(self.starts[index]) + stop)
        ids = self.ids.values[where]
        trained = np.ones(len(ids), dtype=bool) if self.trained is None else self.trained.values[where] != 0
        return LanguageSample(input_ids=ids, trained=trained, document_lengths=[len(ids)])


class Packed:
    """Rows of up to `capacity` tokens that hold several documents each, by best-fit decreasing ('bfd', 'bfd_split')."""

    def __init__(self, documents: Documents, capacity: int, strategy: str) -> None:
        pack = {"bfd": pack_bfd, "bfd_split": pack_bfd_split}[strategy]
        self.documents = documents
        self.rows: Sequence[Sequence[Piece]] = pack(documents.lengths.tolist(), capacity)
        self.lengths = np.array([sum(p.stop - p.start for p in row) for row in self.rows], dtype=np.int64)
        self.file_sizes = [len(self.rows)]
        self.ledger = documents.ledger
        self.ledger.rows = len(self.rows)
        split = sum(p.start > 0 for row in self.rows for p in row)
        self.ledger.trained -= split  # the first token of a split-off piece is context
        self.ledger.context += split

    def __getitem__(self, index: int) -> LanguageSample:
        pieces = [self.documents.piece(p.document, p.start, p.stop) for p in self.rows[index]]
        return LanguageSample(
            input_ids=np.concatenate([p["input_ids"] for p in pieces]),
            trained=np.concatenate([p["trained"] for p in pieces]),
            document_lengths=[len(p["input_ids"]) for p in pieces],
        )


class Blocks:
    """A flat array of ids cut into consecutive rows of `block_size`; the last row may be shorter.

    Nothing is computed per row, so a memory-mapped array of any size costs no memory.
    """

    def __init__(self, ids: np.ndarray, name: str, block_size: int) -> None:
        self.ids, self.block_size = ids, block_size
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
        self.ledger.check()
        if not self.count:
            raise DataError(Location(name), f"{len(ids)} tokens", "at least two, to predict one from", "add text")

    def __getitem__(self, index: int) -> LanguageSample:
        ids = self.ids[index * self.block_size : (index + 1) * self.block_size]
        return LanguageSample(input_ids=ids, trained=np.ones(len(ids), dtype=bool), document_lengths=[len(ids)])


@dataclass
class Joined:
    """Several datasets, one after another."""

    parts: Sequence[Documents | Packed | Blocks]

    def __post_init__(self) -> None:
        self.file_sizes = [size for part in self.parts for size in part.file_sizes]
        self.lengths = np.concatenate([part.lengths for part in self.parts])
        self._firsts = np.cumsum([0, *(len(part.lengths) for part in self.parts)])
        self.ledgers = [part.ledger for part in self.parts]

    def __getitem__(self, index: int) -> LanguageSample:
        part = int(np.searchsorted(self._firsts, index, side="right")) - 1
        return self.parts[part][index - int(self._firsts[part])]
