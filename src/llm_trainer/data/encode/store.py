"""Token stores: ragged columns on disk, memory mapped, so that memory stays flat and every length is known.

A store is a folder: `meta.json`, and for each column `<name>.values.npy` (all rows end to end) with
`<name>.offsets.npy` (row i is values[offsets[i]:offsets[i + 1]]). It is written in parts, by whoever has their rows, which
survive a kill; then they are joined, and `meta.json` comes last. Nothing is written through a memory map: where the disk is
full, that is a bus error, which no process survives.
"""

import errno
import json
import math
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from llm_trainer.disk import check_space, explained, flush, remove, whole_file

FLUSHED_AT_ONCE = 8  # files


@dataclass
class Part:
    """Some consecutive rows, encoded."""

    columns: dict[str, list[np.ndarray]]  # name -> one array `[T_i]` per row; as many rows in every column
    dropped: Counter[str] = field(default_factory=Counter)  # rows left out, by reason
    notes: Counter[str] = field(default_factory=Counter)  # what was noted about the others (`Location.note`)
    dropped_images: Counter[str] = field(default_factory=Counter)  # images of rows left out, by reason


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

    def __init__(self, folder: Path, meta: dict[str, Any] | None = None) -> None:
        """`meta`: the facts, if `meta.json` is not written yet."""
        self.folder = folder
        self.is_new = False  # made by who has opened it, and not found
        self.meta: dict[str, Any] = meta or json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.columns: dict[str, Ragged] = {}
        for name in self.meta["columns"]:
            self.columns[name] = Ragged(_mapped(folder / f"{name}.values.npy"), _mapped(folder / f"{name}.offsets.npy"))

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, column: str) -> Ragged:
        return self.columns[column]

    @staticmethod
    def exists(folder: Path) -> bool:
        """True if `folder` holds a finished store (`meta.json` is written last)."""
        return (folder / "meta.json").exists()


def _mapped(path: Path) -> np.ndarray:
    """An array on disk, memory mapped, as a plain array: taking a row of a `memmap` costs six times as much."""
    return np.asarray(np.load(path, mmap_mode="r"))


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
    counters = {"dropped": part.dropped, "notes": part.notes}
    if part.dropped_images:
        counters["dropped_images"] = part.dropped_images
    for name, counts in counters.items():
        arrays[name] = np.frombuffer(json.dumps(counts).encode(), dtype=np.uint8)
    path = part_path(folder, number)
    if not path.parent.exists():
        path.parent.mkdir(exist_ok=True)  # a folder that another builder has taken over is not made again
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def columns_of(part: Path) -> list[str]:
    """Names of the columns of a part that was written."""
    with np.load(part) as arrays:
        return [name.removesuffix(".values") for name in arrays.files if name.endswith(".values")]


def join_parts(
    folder: Path,
    num_parts: int,
    columns: Sequence[str],
    *,
    meta: dict[str, Any] | None = None,
    unreadable: Counter[str] | None = None,
) -> TokenStore:
    """Make the store at `folder` of its parts 0 to `num_parts` - 1, in this order; afterwards they are removed.

    Who has more columns to add calls `join_columns`, `write_column` and `close_store` one after the other.

    Args:
        folder: where `write_part` wrote.
        columns: names of the columns that every part has.
        meta: further facts to keep in meta.json.
        unreadable: rows that never came into a part, by reason.
    """
    facts = join_columns(folder, num_parts, columns)
    facts["dropped"].update(unreadable or {})
    return close_store(folder, facts | (meta or {}))


def join_columns(folder: Path, num_parts: int, columns: Sequence[str], flushed: bool = True) -> dict[str, Any]:
    """Join the columns of all parts, which stay; the facts of the store, for `close_store`.

    Args:
        flushed: each file is on the disk before the next is begun; False: `close_store` waits for all at once, which takes
            a tenth of the time where columns are small.
    """
    parts = [part_path(folder, number) for number in range(num_parts)]
    (folder / "parts").mkdir(parents=True, exist_ok=True)  # there is none where there was no row
    counts = {name: _join_column(folder, name, parts, flushed) for name in columns}
    assert len(set(counts.values())) <= 1, f"columns of different numbers of rows: {counts}"
    dropped, notes, images = Counter[str](), Counter[str](), Counter[str]()
    for path in parts:
        with np.load(path) as part:
            dropped.update(json.loads(part["dropped"].tobytes()))
            notes.update(json.loads(part["notes"].tobytes()))
            if "dropped_images" in part:
                images.update(json.loads(part["dropped_images"].tobytes()))
    facts = {"columns": list(columns), "rows": counts[columns[0]], "dropped": dropped, "notes": notes}
    return facts | ({"dropped_images": images} if images else {})


def write_column(folder: Path, name: str, rows: Sequence[np.ndarray]) -> None:
    """Write one more column, `[T_i]` per row, which `close_store` waits for."""
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    offsets = np.cumsum(np.concatenate([[0], lengths]), dtype=np.int64)
    save_array(folder / f"{name}.offsets.npy", offsets.shape, offsets.dtype, [offsets], flushed=False)
    dtype = np.result_type(*{row.dtype for row in rows} or [np.float32])
    save_array(folder / f"{name}.values.npy", (int(offsets[-1]),), dtype, rows, flushed=False)


def close_store(folder: Path, facts: dict[str, Any]) -> TokenStore:
    """Write `meta.json`, which comes last, when all columns are on the disk, and remove the parts."""
    with ThreadPoolExecutor(FLUSHED_AT_ONCE) as pool:
        list(pool.map(flush, folder.glob("*.npy")))  # together: the disk waits once for several
    with whole_file(folder / "meta.json") as partial:
        partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    shutil.rmtree(folder / "parts")
    return TokenStore(folder)


def _join_column(folder: Path, name: str, parts: Sequence[Path], flushed: bool) -> int:
    """Join one column of all parts without holding it in memory; returns its number of rows."""
    # 1. where each row begins
    lengths = [np.empty(0, dtype=np.int64)]
    dtypes = []
    for path in parts:
        with np.load(path) as part:
            lengths.append(part[f"{name}.lengths"])
            values = part[f"{name}.values"]  # which reads the file each time
            if len(values):
                dtypes.append(values.dtype)
    dtype = np.result_type(*dtypes or [np.uint16])  # weights may be fractions in one part and 0 or 1 in the others
    offsets = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    save_array(folder / f"{name}.offsets.npy", offsets.shape, offsets.dtype, [offsets], flushed)
    # 2. the values, part after part
    pieces = (_values_of(path, name) for path in parts)
    save_array(folder / f"{name}.values.npy", (int(offsets[-1]),), dtype, pieces, flushed)
    return len(offsets) - 1


def _values_of(path: Path, name: str) -> np.ndarray:
    with np.load(path) as part:
        return part[f"{name}.values"]


def save_array(
    path: Path, shape: tuple[int, ...], dtype: np.dtype, pieces: Iterable[np.ndarray], flushed: bool = True
) -> None:
    """Write a `.npy` of this shape, whose values come in pieces: whole or not at all, unless it is not `flushed` here.

    Raises:
        DiskError: there is no space for it.
    """
    needed = math.prod(shape) * dtype.itemsize
    check_space(path, needed)
    written: Any = whole_file(path, needed)
    if not flushed:
        written = explained(path, path, needed)
    with written as partial, (partial or path).open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype=dtype).data)


# --- one store, several builders


@contextmanager
def private_folder(folder: Path, needed: int = 0) -> Iterator[Path]:
    """A new folder to build the store of `folder` in; it becomes `folder` at once when it is whole.

    Whoever else builds the same store does it in a folder of its own, so that no two write into one file; whose is finished
    first is used by all. What killed builds left in theirs is taken over. A disk that is full leaves nothing behind.

    Args:
        needed: bytes that the store will take, as far as they are known.
    """
    private = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:12]}")
    (private / "parts").mkdir(parents=True)
    for left in [folder, *folder.parent.glob(f"{escape(folder.name)}.building-*")]:
        if left != private and left.is_dir():
            for part in (left / "parts").glob("part-*.npz"):
                os.rename(part, private / "parts" / part.name)
            remove(left)
    try:
        with explained(folder, private, needed):
            yield private
            _take_its_place(private, folder)
    except ChildProcessError:
        raise  # it was killed, as this process may be: its parts are as good
    except (ValueError, OSError):  # of the rows: once they are mended, they are other rows
        remove(private)
        raise


def _take_its_place(private: Path, folder: Path) -> None:
    flush(private)
    try:
        os.rename(private, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not TokenStore.exists(folder):
            raise
        remove(private)  # another builder was first
    flush(folder.parent)
