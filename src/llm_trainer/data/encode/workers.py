"""Rows -> a token store: encoded in parts, by several processes at once where the data is large."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from llm_trainer.data.encode.store import Part, TokenStore, join_parts, part_path, write_part

ROWS_PER_PART = 2000

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
) -> TokenStore:
    """Encode `rows` into a store at `folder`, or open the finished one that is already there.

    A build that was killed goes on from its last finished part when it is started again.

    Args:
        folder: where the store goes; its name should hold a key of everything the encoding depends on.
        rows: all rows, in an order that is the same at every call.
        encode: rows -> part with these `columns`; picklable when several `workers` (processes) encode.
        meta: further facts to keep in meta.json.
        unreadable: rows that `rows` itself left out, by reason; read after its end.
    """
    if TokenStore.exists(folder):
        return TokenStore(folder)
    num_parts = _write_parts(folder, rows, encode, workers)
    return join_parts(folder, num_parts, columns, meta=meta, unreadable=unreadable)


def _write_parts(folder: Path, rows: Iterable[Any], encode: Encode, workers: int) -> int:
    """Encode all rows into parts, of which those of a killed build are kept; returns how many there are."""
    num_parts = 0
    iterator = iter(rows)
    running = []
    pool = None
    if workers > 1:
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker, initargs=(encode,))
    try:
        while chunk := list(islice(iterator, ROWS_PER_PART)):
            number = num_parts
            num_parts += 1
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
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    return num_parts


_encode: Encode  # of a worker process


def _start_worker(encode: Encode) -> None:
    global _encode
    _encode = encode


def _encode_part(folder: Path, number: int, chunk: list[Any]) -> None:
    write_part(folder, number, _encode(chunk))
