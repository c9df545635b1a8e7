"""Rows that say the same: left out of token stores on request, and counted where evaluation repeats training.

Near duplicates are found by MinHash (Broder 1997, "On the resemblance and containment of documents"): the share of equal
minima of random hash functions estimates the share of common shingles (Jaccard similarity) of two rows. Rows are compared that
agree in a whole band of minima (Leskovec, Rajaraman & Ullman, "Mining of Massive Datasets", chapter 3).
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_trainer.data.encode.pictured import IMAGE_COLUMNS, PLACE_SIZE, PLACES, REFS
from llm_trainer.data.encode.store import Part, Ragged, TokenStore
from llm_trainer.data.encode.workers import build_store, found_store
from llm_trainer.data.kinds import HARDNESS
from llm_trainer.data.windows import row_blocks

CODE = Path(__file__)  # decides which rows are left out
SHINGLE = 5  # tokens
BANDS, MINIMA_PER_BAND = 16, 4  # rows of similarity s meet in a band with 1 - (1 - s^4)^16: 0.999 at 0.8, 0.32 at 0.4
EXACT, NEAR = "exact duplicate", "near duplicate"
_MIX = np.uint64(0xBF58476D1CE4E5B9)  # a multiplier of SplitMix64 (Steele et al. 2014)
_TRAINED = ("trained", "chosen_trained", "rejected_trained")
_BESIDE_IDS = (*_TRAINED, "facts", "margin", "desirable", "right", HARDNESS, *IMAGE_COLUMNS)


def without_duplicates(stores: Sequence[TokenStore], how: str, similarity: float, cache: Path) -> list[TokenStore]:
    """Stores without the rows that repeat an earlier one, in them or in a store before them.

    Args:
        stores: in the order of the files.
        how: 'exact' (equal in every column), or 'near' as well.
        similarity: of shingles, from which on rows are near duplicates.
        cache: where the smaller stores go; they are found again, as long as the code of this file is the same.
    """
    before = hashlib.sha256(f"{how} {similarity}".encode() + CODE.read_bytes())
    folders = []
    for store in stores:
        before.update(store.folder.name.encode())
        folders.append(cache / f"{store.folder.name}-{how}-{before.hexdigest()[:16]}")
    if how == "near" and any(PLACES in store.columns and len(store[PLACES].values) for store in stores):
        raise ValueError(
            "data_loader_config.duplicates: near, of rows with images: what differs may be in the images alone; expected "
            "exact, which compares these too, or keep"
        )
    if all(TokenStore.exists(folder) for folder in folders):
        return [found_store(folder) for folder in folders]
    reasons = _reasons(stores, how, similarity)
    ends = np.cumsum([len(store) for store in stores])
    of_each = np.split(reasons, ends[:-1])
    return [_smaller(*one) for one in zip(stores, folders, of_each, strict=True)]


def num_repeated(stores: Sequence[TokenStore], earlier: Sequence[TokenStore]) -> int:
    """Rows of some stores whose tokens are those of a row of earlier ones."""
    wanted = Counter[bytes]()
    for store in stores:
        wanted.update(_digests(store, _compared(store), np.ones(len(store), dtype=bool)))
    lengths = np.unique(np.concatenate([_lengths(store) for store in stores]))
    repeated = 0
    for store in earlier:
        for digest in _digests(store, _compared(store), np.isin(_lengths(store), lengths)):
            repeated += wanted.pop(digest, 0)
    return repeated


def _smaller(store: TokenStore, folder: Path, reasons: np.ndarray) -> TokenStore:
    """The rows of a store that have no reason to be left out, as a store at `folder`."""
    dropped, images = Counter(store.meta["dropped"]), Counter(store.meta.get("dropped_images", {}))
    for reason in (EXACT, NEAR):
        dropped[reason] += int((reasons == reason).sum())
        if PLACES in store.columns:
            images[reason] += int(np.diff(store[PLACES].offsets)[reasons == reason].sum()) // PLACE_SIZE
    kept = (reasons == "").nonzero()[0].tolist()
    facts = {name: value for name, value in store.meta.items() if name not in ("columns", "rows", "dropped")}
    if +images:
        facts["dropped_images"] = +images
    return build_store(folder, kept, partial(_copy, store), list(store.columns), meta=facts, unreadable=+dropped)


def _copy(store: TokenStore, rows: list[int]) -> Part:
    part = Part({})
    for name, column in store.columns.items():
        part.columns[name] = [column[row] for row in rows]
    return part


def _reasons(stores: Sequence[TokenStore], how: str, similarity: float) -> np.ndarray:
    """Why each row of all stores is left out; '' where it is kept."""
    digests: list[bytes] = []
    for store in stores:
        learned = [name for name in store.columns if name != HARDNESS]  # the order does not change what repeats
        digests += _digests(store, learned, np.ones(len(store), dtype=bool))
    reasons = np.full(len(digests), "", dtype=f"U{max(len(EXACT), len(NEAR))}")
    seen = set[bytes]()
    for row, digest in enumerate(digests):
        if digest in seen:
            reasons[row] = EXACT
        seen.add(digest)
    if how == "near":
        rows = (reasons == "").nonzero()[0]
        minima = np.concatenate([_minima(store) for store in stores])[rows]
        reasons[rows[_near(minima, similarity)]] = NEAR
    return reasons


def _id_columns(store: TokenStore) -> list[str]:
    return [name for name in store.columns if name not in _BESIDE_IDS]


def _compared(store: TokenStore) -> list[str]:
    """Columns of ids, and where there are images what these are."""
    return [*_id_columns(store), *(name for name in store.columns if name == REFS)]


def _lengths(store: TokenStore) -> np.ndarray:
    """Tokens of every row of a store `[rows]`, over its columns of ids."""
    total = np.zeros(len(store), dtype=np.int64)
    for name in _id_columns(store):
        total += np.diff(np.asarray(store[name].offsets))
    return total


def _digests(store: TokenStore, columns: Sequence[str], which: np.ndarray) -> Iterator[bytes]:
    """A hash of the content of each row where `which` `[rows]` is True."""
    for row in which.nonzero()[0].tolist():
        digest = hashlib.blake2b(digest_size=16)
        for name in columns:
            values = store[name][row]
            if values.dtype.kind in "iu":  # stores differ in how many bytes an id has
                values = values.astype(np.int64)
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
        yield digest.digest()


def _minima(store: TokenStore) -> np.ndarray:
    """The smallest value of each hash function over a row's shingles: uint32 `[rows, BANDS * MINIMA_PER_BAND]`."""
    random = np.random.default_rng(0)
    factors = random.integers(1, 1 << 63, BANDS * MINIMA_PER_BAND, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    found = np.full((len(store), len(factors)), np.iinfo(np.uint32).max, dtype=np.uint32)
    for name in _id_columns(store):
        column = store[name]
        for rows in row_blocks(np.diff(np.asarray(column.offsets))):
            shingles, firsts = _shingles(column, rows)
            for i, factor in enumerate(factors):
                hashed = ((shingles * factor) >> np.uint64(32)).astype(np.uint32)
                found[rows, i] = np.minimum(found[rows, i], np.minimum.reduceat(hashed, firsts))
    return found


def _shingles(column: Ragged, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Hashes `[n]` of all runs of `SHINGLE` tokens in some rows, and where each row begins among them `[rows]`.

    A row that is shorter is one shingle.
    """
    offsets = np.asarray(column.offsets[rows.start : rows.stop + 1]).astype(np.int64)
    ids = np.asarray(column.values[offsets[0] : offsets[-1]]).astype(np.uint64) + np.uint64(1)
    ids = np.append(ids, np.zeros(1, dtype=np.uint64))  # what stands behind the end of a row
    starts, ends = offsets[:-1] - offsets[0], offsets[1:] - offsets[0]
    counts = np.maximum(ends - starts - SHINGLE + 1, 1)
    firsts = np.cumsum(counts) - counts
    begins = np.arange(counts.sum()) + np.repeat(starts - firsts, counts)
    row_ends = np.repeat(ends, counts)
    hashed = np.zeros(len(begins), dtype=np.uint64)
    for k in range(SHINGLE):
        where = np.where(begins + k < row_ends, begins + k, len(ids) - 1)
        hashed = (hashed ^ ids[where]) * _MIX
        hashed ^= hashed >> np.uint64(29)
    return hashed, firsts


def _near(minima: np.ndarray, similarity: float) -> np.ndarray:
    """`[rows]` bool: an earlier row has at least this share of minima in common, and both agree in a band."""
    is_near = np.zeros(len(minima), dtype=bool)
    for band in range(BANDS):
        columns = minima[:, band * MINIMA_PER_BAND : (band + 1) * MINIMA_PER_BAND]
        keys = np.ascontiguousarray(columns).view(f"V{4 * MINIMA_PER_BAND}").reshape(-1)
        _, inverse = np.unique(keys, return_inverse=True)
        order = np.argsort(inverse, kind="stable")  # rows of a bucket together, the earliest first
        is_first = np.append(True, np.diff(inverse[order]) != 0)
        first_of_bucket = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
        # each with the first of its bucket, and with the one before it
        for partner in (first_of_bucket, np.roll(order, 1)):
            pairs = ~is_first
            share = (minima[order[pairs]] == minima[partner[pairs]]).mean(axis=1)
            is_near[order[pairs]] |= share >= similarity
    return is_near


def note_overlap(train: Any, evaluation: dict[str, Any]) -> None:
    """Note in the ledger of the training data how many rows of each evaluation set it holds."""
    for name, dataset in evaluation.items():
        repeated = num_repeated(dataset.stores, train.stores)
        if repeated:
            file = name or "the evaluation data"
            train.ledgers[0].notes[f"row: of {file} is in the training data too"] += repeated
