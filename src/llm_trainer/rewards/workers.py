"""The trainer's side of the processes that call functions of the user."""

import os
import select
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from llm_trainer.rewards.returned import Answer

START_S = 30.0  # for a worker to come to life
GRACE_S = 5.0  # beyond the limit of a call, until a keeper that does not answer is given up
_open: "weakref.WeakSet[Worker]" = weakref.WeakSet()  # of this process


class Interrupted(Exception):
    """Reward functions were asked to stop before they were done."""


def why_no_workers() -> str:
    """Why functions cannot run in processes of their own here; empty: they can."""
    if sys.platform != "linux":
        return f"on {sys.platform} a process with threads cannot be forked"
    return ""


def held_memory() -> int:
    """Bytes that a fork made now shares with this process, and keeps as they were when this process changes them."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def what_runs() -> str:
    """What runs in this process that a fork of it may suffer from; empty: nothing."""
    running = []
    threads = threading.active_count() - 1
    if threads:
        running.append(f"{threads} Python threads")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        running.append("CUDA")
    return " and ".join(running)


class Worker:
    """A function in a process of its own: the handle of its keeper (`keeper.py`).

    Args:
        name: of the function, for messages.
        serve: any callable, from a request to an answer in JSON types; it is not pickled.
        memory: bytes that it may take; None: no limit.
        processes: that it may have at a time; None: as many as `serving.MOST_PROCESSES`.
    """

    def __init__(
        self, name: str, serve: Callable[[Any], Mapping[str, Any]], memory: int | None, processes: int | None = None
    ) -> None:
        self.name, self.serve, self.memory, self.processes = name, serve, memory, processes
        self._received = bytearray()
        self._deadline = 0.0
        self._fork()

    def _fork(self) -> None:
        from llm_trainer.rewards.keeper import keep
        from llm_trainer.rewards.serving import MOST_PROCESSES, Kept

        mine, theirs = socket.socketpair()
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError, OSError):  # there may be none, or a closed one
                stream.flush()
        trainer = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12 where threads run; see `what_runs`
            pid = os.fork()
        if pid == 0:
            mine.close()
            most = self.processes or MOST_PROCESSES
            keep(Kept(self.name, self.serve, self.memory, most), theirs, trainer)
        theirs.close()
        self._channel, self._pid = mine, pid
        self._end = weakref.finalize(self, _end, trainer, pid, mine)
        _open.add(self)

    def is_ready(self) -> bool:
        """Wait until a worker has come to life; False: none does, since a lock that a thread held stayed locked."""
        self._deadline = time.monotonic() + START_S
        while time.monotonic() < self._deadline:
            if readable([self._channel], 0.2):
                return self._channel.recv(8) == bytes(8)
        return False

    def close(self) -> None:
        """End the function's processes."""
        self._end()

    # A call.

    def begin(self, request: int, size: int, seconds: float) -> None:
        """Send a call.

        Args:
            request: a file with the pickled request.
            size: its bytes.
            seconds: that it may take.
        """
        from llm_trainer.rewards.serving import CALL

        self._deadline = time.monotonic() + seconds + GRACE_S
        self._received.clear()
        try:
            socket.send_fds(self._channel, [CALL.pack(size, seconds)], [request])
        except OSError:  # the keeper was killed since the last call
            self._restart()
            socket.send_fds(self._channel, [CALL.pack(size, seconds)], [request])

    def _restart(self) -> None:
        self.close()
        self._fork()
        self.is_ready()

    def look(self, is_readable: bool) -> Answer | None:
        """The answer, if it is there; None: not yet."""
        if not is_readable:
            if time.monotonic() < self._deadline:
                return None
            return self._lost("time", "did not return, nor could its process be ended in time")
        try:
            chunk = self._channel.recv(1 << 20)
        except OSError:
            chunk = b""
        if not chunk:
            return self._lost("exited", "lost its processes: they were killed from outside, perhaps for want of memory")
        self._received += chunk
        parts = list(_frames(self._received))
        if len(parts) < 2:
            return None
        from llm_trainer.rewards.keeper import answer_of

        return answer_of(parts[0], parts[1])

    def _lost(self, cause: str, what: str) -> Answer:
        self._restart()
        return Answer({}, cause, what)

    def fileno(self) -> int:
        """For `select`."""
        return self._channel.fileno()


def _frames(data: bytearray) -> Iterator[bytes]:
    """The whole frames in what was received."""
    place = 0
    while len(data) - place >= 8:
        size = int.from_bytes(data[place : place + 8])
        if len(data) - place - 8 < size:
            return
        yield bytes(data[place + 8 : place + 8 + size])
        place += 8 + size


def readable(ends: Sequence["Worker | socket.socket"], seconds: float) -> set[int]:
    """Which of `ends`, by descriptor, can be read or are closed; waits for at most `seconds`."""
    poll = select.poll()
    for end in ends:
        poll.register(end, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(seconds * 1000)}


def answers(workers: Sequence[Worker], stop: Callable[[], bool]) -> dict[Worker, Answer]:
    """What the functions say to the calls that were begun.

    Raises:
        Interrupted: `stop` said so; the functions are ended.
    """
    found: dict[Worker, Answer] = {}
    waiting = list(workers)
    try:
        while waiting:
            if stop():
                raise Interrupted
            ready = readable(waiting, 0.1)
            for worker in list(waiting):
                answer = worker.look(worker.fileno() in ready)
                if answer is not None:
                    found[worker] = answer
                    waiting.remove(worker)
    except BaseException:
        for worker in waiting:
            worker.close()  # what it still answers is nobody's; the next call starts it again
        raise
    return found


@contextmanager
def in_memory(data: bytes) -> Iterator[int]:
    """A file that is nowhere on a disk and holds `data`; several processes read it through its descriptor."""
    descriptor = os.memfd_create("rewards")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(data)
        yield descriptor
    finally:
        os.close(descriptor)


def _end(owner: int, pid: int, channel: socket.socket) -> None:
    """End a keeper: it kills what is below it when the channel is closed; nothing happens in a fork of the trainer."""
    if os.getpid() != owner:
        return
    channel.close()
    deadline = time.monotonic() + GRACE_S
    with suppress(ChildProcessError):
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return
            time.sleep(0.002)


def _not_in_children() -> None:
    """A process that the trainer forks (a worker of a DataLoader) must not hold the channels open when the trainer ends."""
    for worker in list(_open):
        with suppress(OSError):
            os.close(worker._channel.detach())
    _open.clear()


os.register_at_fork(after_in_child=_not_in_children)
