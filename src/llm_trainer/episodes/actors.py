"""The processes in which environments run: each episode has one of its own, so that none can cost another.

A worker of `rewards.keeper` forks them and waits for all that were asked; its keeper ends them with it. Linux only.
"""

import json
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from llm_trainer.episodes.player import Call, failed
from llm_trainer.rewards.processes import end_with_parent, limit_memory, pass_over_signals

SIZE = struct.Struct(">Q")  # before every message
LOOK_S = 0.05  # between two looks at processes that say nothing
_READ = 1 << 20


class Stage:
    """Asks the environments of several episodes at once; what a worker serves (`rewards.serving.Kept.serve`).

    Args:
        player: makes what plays an episode.
        memory: bytes that each may take beyond what its process begins with; None: no limit.
    """

    def __init__(self, player: Callable[[], Any], memory: int | None) -> None:
        self._player, self._memory = player, memory
        self._actors: dict[int, Actor] = {}

    def __call__(self, asked: tuple[Sequence[Call], float]) -> Mapping[str, Any]:
        """The answers to calls, each of which may take so many seconds."""
        calls, seconds = asked
        deadline = time.monotonic() + seconds
        found: dict[int, dict[str, Any]] = {}
        waiting: dict[int, Actor] = {}  # by their place among the calls
        for place, call in enumerate(calls):
            if call.slot not in self._actors:
                self._actors[call.slot] = Actor(self._player(), self._memory)
            waiting[place] = self._actors[call.slot]
            waiting[place].ask(call)
        while waiting:
            left = deadline - time.monotonic()
            is_late = left <= 0
            readable = _readable(waiting.values(), max(0.0, min(LOOK_S, left)))
            for place, actor in list(waiting.items()):
                answer = actor.look(actor.end.fileno() in readable)
                if answer is None and is_late:
                    actor.kill()
                    answer = failed("time", f"did not return within {seconds:g} s and was ended")
                if answer is not None:
                    found[place] = answer
                    del waiting[place]
                    if actor.is_lost:
                        del self._actors[calls[place].slot]
        return {"answers": [found[place] for place in range(len(calls))]}


class Actor:
    """The process of an episode, as the stage sees it.

    Attributes:
        end: of the channel.
        is_lost: it has ended.
    """

    def __init__(self, player: Any, memory: int | None) -> None:
        self.end, theirs = socket.socketpair()
        self.is_lost = False
        self._received = bytearray()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self.end.close()
            _act(player, theirs, memory)
        theirs.close()

    def ask(self, call: Call) -> None:
        """Send a call; it is idle, so it reads."""
        data = pickle.dumps(call)
        with suppress(OSError):  # it has ended since its last answer, which is seen when it is looked at
            self.end.sendall(SIZE.pack(len(data)) + data)

    def look(self, is_readable: bool) -> dict[str, Any] | None:
        """The answer, or why there will be none; None: not yet."""
        chunk = b""
        if is_readable:
            with suppress(OSError):
                chunk = self.end.recv(_READ)
            self._received += chunk
            if len(self._received) >= SIZE.size:
                (size,) = SIZE.unpack(self._received[: SIZE.size])
                if len(self._received) == SIZE.size + size:
                    answer = json.loads(self._received[SIZE.size :])
                    self._received.clear()
                    return answer  # type: ignore[no-any-return]
        # What it has started may hold its end of the channel open.
        if not chunk and (is_readable or self._has_ended()):
            self.kill()
            return failed("exited", "ended its process")
        return None

    def _has_ended(self) -> bool:
        with suppress(ChildProcessError):
            return os.waitpid(self._pid, os.WNOHANG)[0] != 0
        return True

    def kill(self) -> None:
        """End it, with all of its group."""
        self.is_lost = True
        self.end.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._pid, signal.SIGKILL)
        with suppress(ProcessLookupError):  # it may not have had its group yet
            os.kill(self._pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _act(player: Any, channel: socket.socket, memory: int | None) -> NoReturn:
    """The life of an actor, in a process that was forked for it: until the stage closes its end."""
    status = 1
    try:
        end_with_parent()
        os.setsid()  # a group of its own, which is killed at once
        pass_over_signals()
        if memory is not None:
            limit_memory(memory)
        pid = os.getpid()
        while (call := _receive(channel)) is not None:
            answer = player.answer(call)
            for stream in (sys.stdout, sys.stderr):
                with suppress(BaseException):
                    stream.flush()
            if os.getpid() != pid:
                break  # a child that the environment has forked, and that came back from it
            data = json.dumps(answer).encode()
            channel.sendall(SIZE.pack(len(data)) + data)
        status = 0
    except BaseException as error:
        with suppress(BaseException):
            print(f"the process of an environment failed: {error!r}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)


def _receive(channel: socket.socket) -> Call | None:
    head = _exactly(channel, SIZE.size)
    if not head:
        return None
    call: Call = pickle.loads(_exactly(channel, SIZE.unpack(head)[0]))
    return call


def _exactly(channel: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = channel.recv(min(_READ, size - len(data)))
        if not chunk:
            return b""
        data += chunk
    return bytes(data)


def _readable(actors: Any, seconds: float) -> set[int]:
    poll = select.poll()
    for actor in actors:
        poll.register(actor.end, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(seconds * 1000)}
