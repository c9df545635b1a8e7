"""Rows -> a token store: encoded in parts, by several processes at once where the data is large."""

import gc
import os
import pickle
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from llm_trainer.config.env import override
from llm_trainer.data.encode.store import Part, TokenStore, join_parts, part_path, private_folder, write_part
from llm_trainer.disk import DiskError, bytes_in, check_space
from llm_trainer.lock import Lock

ROWS_PER_PART = 500
SIZE_PER_PART = 1 << 20  # characters, or bytes of arrays: rows may be books
THREADS = 2  # of a single process: while one renders, which is Python, the other tokenises, which is not
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
        encode: rows -> part with these `columns`; it is called from several threads, or in `workers` processes.
        meta: further facts to keep in meta.json.
        unreadable: rows that `rows` itself left out, by reason; read after its end.
        source_bytes: size of what the rows are read from, to foresee the size of the store; 0: not known.

    Raises:
        DiskError: there is no space for it; nothing of it is left.
        ChildProcessError: a worker was killed; finished parts are kept.
    """
    if TokenStore.exists(folder):
        return found_store(folder)
    lock = Lock(folder.with_name(f"{folder.name}.lock"), f"the token store '{folder}'")
    with lock.held(wait=True):
        if TokenStore.exists(folder):  # another process made it meanwhile
            return found_store(folder)
        with private_folder(folder) as private:
            num_parts = _write_parts(private, rows, encode, workers, source_bytes)
            join_parts(private, num_parts, columns, meta=meta, unreadable=unreadable)
    store = TokenStore(folder)
    store.is_new = True
    return store


def found_store(folder: Path) -> TokenStore:
    """Open the finished store at `folder`, which counts as used now."""
    with suppress(OSError):  # somebody else's, or on a disk that cannot be written
        os.utime(folder)  # used now: see `llm-trainer data cache`
    return TokenStore(folder)


def _write_parts(folder: Path, rows: Iterable[Any], encode: Encode, workers: int, source_bytes: int) -> int:
    """Encode all rows into parts, of which those of a killed build are kept; returns how many there are."""
    num_parts = foreseen = 0
    share_of_first = 0.0  # of the source's bytes; 0: not known
    running: deque[Future[None]] = deque()

    def look_for_space() -> None:
        nonlocal foreseen
        if not foreseen:
            foreseen = _foresee(folder, share_of_first)
            check_space(folder, foreseen)

    pool, encode_part = _start_pool(encode, workers)
    try:
        for chunk in _chunks(rows):
            number = num_parts
            num_parts += 1
            if source_bytes and number == 0:
                share_of_first = len(pickle.dumps(chunk)) / source_bytes
            if part_path(folder, number).exists():
                look_for_space()
                continue
            running.append(pool.submit(encode_part, folder, number, chunk))
            del chunk
            if len(running) > workers + 1:  # bounds the rows held in memory
                running.popleft().result()
                look_for_space()
        while running:
            running.popleft().result()
            look_for_space()
    except DiskError as error:
        error.needed = max(error.needed, _foresee(folder, share_of_first))
        raise
    except BrokenProcessPool as error:
        raise ChildProcessError(
            f"{folder}: one of {workers} processes that tokenize was killed, by the system if memory was short; expected all "
            "to go on; start again with fewer (data_loader_num_workers, or --workers): finished parts are kept"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    return num_parts


def _chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """The rows of each part: the same at every call, since a killed build goes on from its parts."""
    chunk: list[Any] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += _size(row)
        if len(chunk) == ROWS_PER_PART or size >= SIZE_PER_PART:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(value: Any) -> int:
    """About how many characters, or bytes of arrays and images, a row holds."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    if isinstance(value, np.ndarray):
        return value.nbytes
    return 8


def _foresee(folder: Path, share_of_first: float) -> int:
    """Bytes that all parts and the joined store will take at least; 0 until the first part is there to tell."""
    if not share_of_first:
        return 0
    expected = 2 * bytes_in(part_path(folder, 0)) / min(share_of_first, 1.0)
    return int(expected * CERTAIN_SHARE)


# --- who encodes


def _start_pool(encode: Encode, workers: int) -> tuple[Executor, Callable[[Path, int, list[Any]], None]]:
    """Threads of this process or several `workers`, and the function to submit to them."""
    if workers == 1:
        return ThreadPoolExecutor(THREADS), partial(_encode_part, encode)
    # A fork has everything at once, in memory that is shared; a new process would import this package, and the user's
    # script with all that it imports, again. Elsewhere forks are unsafe (macOS) or missing.
    method = "fork" if sys.platform == "linux" else "spawn"
    pool = ProcessPoolExecutor(workers, get_context(method), initializer=_start_worker, initargs=(encode,))
    return pool, _encode_in_worker


_encode: Encode  # of a worker process


def _start_worker(encode: Encode) -> None:
    global _encode
    _encode = encode
    # As many processes as wanted, each with one thread. A forked pool of threads would never answer.
    override("TOKENIZERS_PARALLELISM", "false")
    gc.freeze()  # what the collector does not visit stays shared
    # What signals mean is for the process that trains to say; its handlers were forked too.
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker within a second after its process was killed: its neighbours keep the pipe of rows open."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _encode_in_worker(folder: Path, number: int, chunk: list[Any]) -> None:
    _encode_part(_encode, folder, number, chunk)


def _encode_part(encode: Encode, folder: Path, number: int, chunk: list[Any]) -> None:
    write_part(folder, number, encode(chunk))
