"""Rows -> a token store: encoded in parts, by several processes at once where the data is large."""

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llm_trainer.data.encode.store import Part, TokenStore, join_parts, part_path, private_folder, write_part
from llm_trainer.disk import DiskError, bytes_in, check_space
from llm_trainer.lock import Lock

ROWS_PER_PART = 2000
CERTAIN_SHARE = 0.3  # of the space that the first rows foretell: others may be shorter, or compressed

Encode = Callable[[list[Any]], Part]


def build_store(
    folder: Path,
    rows: Iterable[Any],
    encode: Encode,
    columns: Sequence[str],
    *,
    workers: int = 1,
    meta: dict[str, Any] | None = None,
    unreadable: Counter[str] | None = None,
    source_bytes: int = 0,
) -> TokenStore:
    """Encode `rows` into a store at `folder`, or open the finished one that is already there.

    A build that was killed goes on from its last finished part when it is started again. One process builds a store, and
    others that want the same one wait for it.

    Args:
        folder: where the store goes; its name should hold a key of everything the encoding depends on.
        rows: all rows, in an order that is the same at every call.
        encode: rows -> part with these `columns`; picklable when several `workers` (processes) encode.
        meta: further facts to keep in meta.json.
        unreadable: rows that `rows` itself left out, by reason; read after its end.
        source_bytes: size of what the rows are read from, to foresee the size of the store; 0: not known.

    Raises:
        DiskError: there is no space for it; nothing of it is left.
    """
    if TokenStore.exists(folder):
        return TokenStore(folder)
    lock = Lock(folder.with_name(f"{folder.name}.lock"), f"the token store '{folder}'")
    with lock.held(wait=True):
        if not TokenStore.exists(folder):
            with private_folder(folder) as private:
                num_parts = _write_parts(private, rows, encode, workers, source_bytes)
                join_parts(private, num_parts, columns, meta=meta, unreadable=unreadable)
    return TokenStore(folder)


def _write_parts(folder: Path, rows: Iterable[Any], encode: Encode, workers: int, source_bytes: int) -> int:
    """Encode all rows into parts, of which those of a killed build are kept; returns how many there are."""
    num_parts = foreseen = 0
    iterator = iter(rows)
    running = []
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encode,))
    try:
        while chunk := list(islice(iterator, ROWS_PER_PART)):
            number = num_parts
            num_parts += 1
            if source_bytes and not foreseen:
                foreseen = _foresee(folder, chunk, source_bytes)
                check_space(folder, foreseen)
            if part_path(folder, number).exists():
                continue
            if pool is None:
                write_part(folder, number, encode(chunk))
                continue
            running.append(pool.submit(_encode_part, folder, number, chunk))
            if len(running) > 2 * workers:  # bounds the rows held in memory
                running.pop(0).result()
        for future in running:
            future.result()
    except DiskError as error:
        error.needed = max(error.needed, foreseen)
        raise
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return num_parts


def _foresee(folder: Path, chunk: list[Any], source_bytes: int) -> int:
    """Bytes that all parts and the joined store will take at least; 0 until the first part is there to tell."""
    first_part = bytes_in(part_path(folder, 0))
    share_read = len(pickle.dumps(chunk)) / source_bytes
    expected = 2 * first_part / min(share_read, 1.0)
    return int(expected * CERTAIN_SHARE)


_encode: Encode  # of a worker process


def _start_worker(encode: Encode) -> None:
    global _encode
    _encode = encode


def _encode_part(folder: Path, number: int, chunk: list[Any]) -> None:
    write_part(folder, number, _encode(chunk))
