"""Token stores: ragged columns on disk, memory mapped, so that memory stays flat and every length is known.

A store is a folder: `meta.json`, and for each column `<name>.values.npy` (all rows end to end) with
`<name>.offsets.npy` (row i is values[offsets[i]:offsets[i + 1]]). It is written in parts, by whoever has their rows, which
survive a kill; then they are joined, and `meta.json` comes last.
"""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass
class Part:
    """Some consecutive rows, encoded."""

    columns: dict[str, list[np.ndarray]]  # name -> one array `[T_i]` per row; as many rows in every column
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out, by reason


class Ragged:
    """A column: `column[i]` is row i's array."""

    def __init__(self, values: np.ndarray, offsets: np.ndarray) -> None:
        self.values, self.offsets = values, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]


class TokenStore:
    """An opened store; columns are memory mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.columns: dict[str, Ragged] = {}
        for name in self.meta["columns"]:
            values = np.load(folder / f"{name}.values.npy", mmap_mode="r")
            self.columns[name] = Ragged(values, np.load(folder / f"{name}.offsets.npy", mmap_mode="r"))

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, column: str) -> Ragged:
        return self.columns[column]

    @staticmethod
    def exists(folder: Path) -> bool:
        """True if `folder` holds a finished store (`meta.json` is written last)."""
        return (folder / "meta.json").exists()


def compact_ids(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    """Ids in the smallest type that holds the vocabulary."""
    smallest = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    return np.asarray(ids, dtype=smallest)


def part_path(folder: Path, number: int) -> Path:
    """Where part `number` of the store at `folder` is written."""
    return folder / "parts" / f"part-{number:06d}.npz"


def write_part(folder: Path, number: int, part: Part) -> None:
    """Write part `number` (from 0) of the store at `folder`.

    It is written under a temporary name and renamed: it is there whole or not at all. Several processes may write
    different parts at once.
    """
    arrays: dict[str, Any] = {}
    for name, rows in part.columns.items():
        arrays[f"{name}.lengths"] = np.array([len(row) for row in rows], dtype=np.int64)
        arrays[f"{name}.values"] = np.concatenate(rows) if rows else np.empty(0, dtype=np.uint16)
    arrays["dropped"] = np.frombuffer(json.dumps(part.dropped).encode(), dtype=np.uint8)
    path = part_path(folder, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp.npz")
    np.savez(partial, **arrays)
    partial.rename(path)


def join_parts(
    folder: Path,
    num_parts: int,
    columns: Sequence[str],
    *,
    meta: dict[str, Any] | None = None,
    unreadable: Counter[str] | None = None,
) -> TokenStore:
    """Make the store at `folder` of its parts 0 to `num_parts` - 1, in this order; afterwards they are removed.

    Args:
        folder: where `write_part` wrote.
        columns: names of the columns that every part has.
        meta: further facts to keep in meta.json.
        unreadable: rows that never came into a part, by reason.
    """
    parts = [part_path(folder, number) for number in range(num_parts)]
    (folder / "parts").mkdir(parents=True, exist_ok=True)  # there is none where there was no row
    counts = {name: _join_column(folder, name, parts) for name in columns}
    assert len(set(counts.values())) <= 1, f"columns of different numbers of rows: {counts}"
    dropped = Counter[str](unreadable or {})
    for path in parts:
        with np.load(path) as part:
            dropped.update(json.loads(part["dropped"].tobytes()))
    facts = {"columns": list(columns), "rows": counts[columns[0]], "dropped": dropped}
    partial = folder / "meta.json.tmp"
    partial.write_text(json.dumps(facts | (meta or {}), indent=1), encoding="utf-8")
    partial.rename(folder / "meta.json")
    shutil.rmtree(folder / "parts")
    return TokenStore(folder)


def _join_column(folder: Path, name: str, parts: Sequence[Path]) -> int:
    """Join one column of all parts without holding it in memory; returns its number of rows."""
    # 1. where each row begins
    lengths = [np.empty(0, dtype=np.int64)]
    dtype = np.dtype(np.uint16)
    for path in parts:
        with np.load(path) as part:
            lengths.append(part[f"{name}.lengths"])
            if len(part[f"{name}.values"]):
                dtype = part[f"{name}.values"].dtype
    offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    np.save(folder / f"{name}.offsets.npy", offsets)
    # 2. the values, part after part
    num_rows, total = len(offsets) - 1, int(offsets[-1])
    if total == 0:  # an empty file cannot be memory mapped
        np.save(folder / f"{name}.values.npy", np.empty(0, dtype=dtype))
        return num_rows
    values = np.lib.format.open_memmap(folder / f"{name}.values.npy", mode="w+", dtype=dtype, shape=(total,))
    start = 0
    for path in parts:
        with np.load(path) as part:
            piece = part[f"{name}.values"]
            values[start : start + len(piece)] = piece
            start += len(piece)
    values.flush()
    return num_rows
