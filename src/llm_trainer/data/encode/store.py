"""Token stores: ragged columns on disk, memory mapped, so that memory stays flat and every length is known.

A store is a folder: `meta.json`, and for each column `<name>.values.npy` (all rows end to end) with
`<name>.offsets.npy` (row i is values[offsets[i]:offsets[i + 1]]). It is built in parts that survive a kill.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

ROWS_PER_PART = 2000


@dataclass
class Part:
    """Some consecutive rows, encoded.

    Attributes:
        columns: name -> one array `[T_i]` per row; every column has the same number of rows.
        dropped: rows left out, by reason.
        dropped_tokens: their tokens, by reason (0 where they could not be tokenised).
    """

    columns: dict[str, list[np.ndarray]]
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_tokens: Counter[str] = field(default_factory=Counter)


class Ragged:
    """A column: `column[i]` is row i's array."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def lengths(self) -> np.ndarray:
        """`[rows]` number of values in each row."""
        return np.diff(self.offsets)


class TokenStore:
    """An opened store; columns are memory mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.columns = {name: self._open(name) for name in self.meta["columns"]}

    def _open(self, name: str) -> Ragged:
        values = np.load(self.folder / f"{name}.values.npy", mmap_mode="r")
        return Ragged(values, np.load(self.folder / f"{name}.offsets.npy", mmap_mode="r"))

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, column: str) -> Ragged:
        return self.columns[column]

    @staticmethod
    def exists(folder: Path) -> bool:
        """True if `folder` holds a finished store (`meta.json` is written last)."""
        return (folder / "meta.json").exists()


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, ROWS_PER_PART)):
        yield chunk


def _save_part(folder: Path, part: Part) -> None:
    """Write a part under a temporary name and rename it: it is there whole or not at all."""
    arrays: dict[str, Any] = {}
    for name, rows in part.columns.items():
        arrays[f"{name}.lengths"] = np.array([len(row) for row in rows], dtype=np.int64)
        arrays[f"{name}.values"] = np.concatenate(rows) if rows else np.empty(0, dtype=np.uint16)
    arrays["dropped"] = np.frombuffer(json.dumps([part.dropped, part.dropped_tokens]).encode(), dtype=np.uint8)
    partial = folder.with_suffix(".tmp.npz")
    np.savez(partial, **arrays)
    partial.rename(folder)


_encode: Callable[[list[Any]], Part]


def _start_worker(encode: Callable[[list[Any]], Part]) -> None:
    global _encode
    _encode = encode


def _encode_and_save(path: Path, chunk: list[Any]) -> None:
    _save_part(path, _encode(chunk))


def _encode_parts(folder: Path, rows: Iterable[Any], encode: Callable[[list[Any]], Part], workers: int) -> list[Path]:
    """Encode all rows into part files, several processes at once; finished parts of a killed build are kept."""
    paths: list[Path] = []
    missing = []
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encode,))
    try:
        for number, chunk in enumerate(_chunks(rows)):
            paths.append(folder / f"part-{number:06d}.npz")
            if paths[-1].exists():
                continue
            if pool is None:
                _save_part(paths[-1], encode(chunk))
                continue
            missing.append(pool.submit(_encode_and_save, paths[-1], chunk))
            if len(missing) > 2 * workers:  # bounds the rows held in memory
                missing.pop(0).result()
        for future in missing:
            future.result()
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return paths


def _join_column(folder: Path, name: str, parts: Sequence[Path]) -> int:
    """Join one column of all parts without holding it in memory; returns its number of rows."""
    lengths, total, dtype = [], 0, np.dtype(np.uint16)
    for path in parts:
        with np.load(path) as part:
            lengths.append(part[f"{name}.lengths"])
            total += int(lengths[-1].sum())
            if len(part[f"{name}.values"]):
                dtype = part[f"{name}.values"].dtype
    all_lengths = np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64)
    np.save(folder / f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(all_lengths)]).astype(np.int64))
    if total == 0:
        np.save(folder / f"{name}.values.npy", np.empty(0, dtype=dtype))
        return len(all_lengths)
    values = np.lib.format.open_memmap(folder / f"{name}.values.npy", mode="w+", dtype=dtype, shape=(total,))
    start = 0
    for path in parts:
        with np.load(path) as part:
            piece = part[f"{name}.values"]
            values[start : start + len(piece)] = piece
            start += len(piece)
    values.flush()
    return len(all_lengths)


def build_store(
    folder: Path,
    rows: Iterable[Any],
    encode: Callable[[list[Any]], Part],
    columns: Sequence[str],
    *,
    workers: int = 1,
    meta: dict[str, Any] | None = None,
    unreadable: Counter[str] | None = None,
) -> TokenStore:
    """Encode `rows` into a store at `folder`, or open the finished one that is already there.

    A build that was killed goes on from its last finished part when it is started again.

    Args:
        folder: where the store goes; its name should hold a key of everything the encoding depends on.
        rows: all rows, in an order that is the same at every call.
        encode: rows -> part; picklable when `workers` > 1.
        columns: names of the columns that `encode` makes.
        workers: processes that encode.
        meta: further facts to keep in meta.json.
        unreadable: rows that `rows` itself left out, by reason; read after its end.
    """
    if TokenStore.exists(folder):
        return TokenStore(folder)
    parts_folder = folder / "parts"
    parts_folder.mkdir(parents=True, exist_ok=True)
    parts = _encode_parts(parts_folder, rows, encode, workers)
    counts = {name: _join_column(folder, name, parts) for name in columns}
    assert len(set(counts.values())) <= 1, f"columns of different numbers of rows: {counts}"
    dropped, dropped_tokens = Counter[str](unreadable or {}), Counter[str]()
    for path in parts:
        with np.load(path) as part:
            rows_left_out, tokens_left_out = json.loads(part["dropped"].tobytes())
            dropped.update(rows_left_out)
            dropped_tokens.update(tokens_left_out)
    facts = {"columns": list(columns), "rows": counts[columns[0]], "dropped": dropped, "dropped_tokens": dropped_tokens}
    partial = folder / "meta.json.tmp"
    partial.write_text(json.dumps(facts | (meta or {}), indent=1), encoding="utf-8")
    partial.rename(folder / "meta.json")
    shutil.rmtree(parts_folder)
    return TokenStore(folder)
