"""The worker below a keeper (`keeper.py`): it calls the user's function, once for each request."""

import gc
import json
import mmap
import os
import pickle
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from llm_trainer.config import env
from llm_trainer.rewards.processes import end_with_parent, limit_memory, pass_over_signals

CALL = struct.Struct(">Qd")  # bytes of the request, seconds that it may take
FRAME = struct.Struct(">Q")  # bytes of an answer
MOST_PROCESSES = 64 + (os.cpu_count() or 1)  # of a function at a time: pools have one per core


class Kept(NamedTuple):
    """A function and its limits.

    Attributes:
        name: In messages.
        serve: Called in the worker, with each request; its answer is in JSON types. A worker whose answer has a true `ends`
            ends with it.
        memory: Bytes that it may take beyond what its process begins with, its own processes included; None: no limit.
        processes: That it may have at a time.
    """

    name: str
    serve: Callable[[Any], Mapping[str, Any]]
    memory: int | None
    processes: int = MOST_PROCESSES


def work(kept: Kept, requests: socket.socket, results: int, output: int, keeper: int) -> NoReturn:
    """The life of a worker, in a process that was forked for it: calls the function until the keeper hangs up."""
    status = 1
    try:
        end_with_parent()
        os.setsid()  # a group of its own, which is killed at once
        _prepare(kept, output, keeper)
        _write(results, FRAME.pack(0))
        pid = os.getpid()
        while True:
            message, files, *_ = socket.recv_fds(requests, CALL.size, 1)
            if not files:
                status = 0
                break
            size, _ = CALL.unpack(message)
            answer, goes_on = _answer(kept, files[0], size)
            for stream in (sys.stdout, sys.stderr):
                with suppress(BaseException):
                    stream.flush()
            if os.getpid() != pid:
                break  # a child that the function has forked, and that came back from it
            _write(results, FRAME.pack(len(answer)) + answer)
            if not goes_on:
                break
    except BaseException as error:
        with suppress(BaseException):
            print(f"the worker failed: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _prepare(kept: Kept, output: int, keeper: int) -> None:
    """Make a worker of a fork: streams, signals, memory, threads."""
    # 1. what it prints goes to the keeper, whatever stood in place of the streams (a notebook's use sockets and threads)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="replace", buffering=1, closefd=False)

    # 2. signals
    pass_over_signals()

    # 3. the memory; where the machine runs out of it, this process goes before the trainer
    if kept.memory is not None:
        limit_memory(kept.memory)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")

    # 4. threads did not come along with the fork, but libraries believe that theirs are there
    env.override("TOKENIZERS_PARALLELISM", "false")
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
    gc.enable()
    if os.getppid() != keeper:
        os._exit(1)  # it died before the signal for that was asked for


def _answer(kept: Kept, request: int, size: int) -> tuple[bytes, bool]:
    """Call the function for a request; `size` bytes in a memory file, which other functions read too.

    Returns:
        The answer, and whether this worker goes on: what holds the memory that has run out goes with it.
    """
    try:
        try:
            with mmap.mmap(request, size, access=mmap.ACCESS_READ) as data:
                asked = pickle.loads(data)
        finally:
            os.close(request)
        answer = kept.serve(asked)
        return json.dumps(answer).encode(), not answer.get("ends")
    except MemoryError:
        return b'{"failed": ["memory", "ran out of memory"]}', False
    except BaseException as error:  # what is no Exception: the function may raise KeyboardInterrupt itself
        what = f"raised {type(error).__name__}"
        return json.dumps({"failed": ["raised", what]}).encode(), True


def _write(end: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(end, rest) :]
