"""The keeper of a user's function: the process that holds its limits, between the trainer and the worker that calls it.

The trainer forks the keeper as early as it can, and the keeper forks the worker (`serving.py`), again whenever one had to be
killed: so functions need not be pickled, closures and lambdas work. The keeper never runs the function and has one thread,
so it is there to kill. Requests travel in memory files, answers and what the function prints through pipes that the keeper
empties: nobody waits for somebody who does not read. Linux only.
"""

import gc
import json
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import NoReturn

from llm_trainer.rewards.processes import (
    OF_JOBS,
    PR_SET_CHILD_SUBREAPER,
    Process,
    all_processes,
    descendants,
    end_processes,
    prctl,
)
from llm_trainer.rewards.returned import Answer
from llm_trainer.rewards.serving import CALL, FRAME, Kept, work

MOST_OUTPUT = 2000  # bytes of what a call prints that are kept
MOST_ANSWER = 1 << 30  # bytes
LOOK_S = 0.2  # between two looks at the processes of a call
DISMISS_S = 0.3  # for what is told to end, before it is killed
_READ = 1 << 20


def keep(kept: Kept, channel: socket.socket, trainer: int) -> NoReturn:
    """The life of a keeper, in a process that was forked for it: until the trainer closes its end of `channel`, or ends."""
    status = 1
    try:
        _become_quiet()
        os.setsid()  # Ctrl-C in a terminal is for the trainer
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # what the function leaves behind becomes this process's
        Keeper(kept, channel, trainer).run()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the trainer is gone
    except BaseException as error:
        print(f"the keeper of {kept.name!r} failed: {error!r}", file=sys.stderr, flush=True)
    finally:
        with suppress(BaseException):
            end_processes()
        os._exit(status)  # nothing that was inherited is cleaned up, closed or flushed a second time


def _become_quiet() -> None:
    """Make a keeper of a fork: no signals of others, no handlers, no collection of what belongs to the trainer."""
    signal.set_wakeup_fd(-1)
    for number in OF_JOBS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    gc.disable()
    gc.freeze()


class Keeper:
    """Hands calls to a worker, one at a time, and ends the worker where a limit is reached."""

    def __init__(self, kept: Kept, channel: socket.socket, trainer: int) -> None:
        self.kept, self.channel, self.trainer = kept, channel, trainer
        self.first_rss = all_processes().get(os.getpid(), Process(0, 0)).rss  # pages that are shared with the trainer
        self._start_worker()

    def run(self) -> None:
        """Serve calls until the trainer is gone."""
        self._greet()
        while os.getppid() == self.trainer:
            if not self._ready(self.channel.fileno(), 1000):
                self._is_alive()
                continue
            message, files, *_ = socket.recv_fds(self.channel, CALL.size, 1)
            if len(message) < CALL.size or not files:
                return self._dismiss()
            _, seconds = CALL.unpack(message)
            if not self._is_alive():
                self._end_worker()
                self._start_worker()
            answer = self._call(message, files[0], seconds)
            os.close(files[0])
            for part in (answer, self._output()):
                self.channel.sendall(FRAME.pack(len(part)) + part)

    def _greet(self) -> None:
        """Say that a worker came to life: locks that another thread of the trainer held could have kept it from that."""
        while len(self.received) < FRAME.size:
            if not self._is_alive() or os.getppid() != self.trainer:
                raise BrokenPipeError
            self._ready(self.results, 100)
            self._read_results()
        self.channel.sendall(FRAME.pack(0))

    # The worker.

    def _start_worker(self) -> None:
        mine, theirs = socket.socketpair()
        self.results, results = os.pipe()
        self.output, output = os.pipe()
        keeper = os.getpid()
        self.worker = os.fork()
        if self.worker == 0:
            for end in (mine, self.channel):
                end.close()
            for number in (self.results, self.output):
                os.close(number)
            work(self.kept, theirs, results, output, keeper)
        theirs.close()
        for number in (results, output):
            os.close(number)
        self.requests, self.received, self.printed, self.left_out = mine, bytearray(), bytearray(), 0
        self.ended: int | None = None  # how, as waitpid says it
        self.is_open = True
        os.set_blocking(self.results, False)
        os.set_blocking(self.output, False)

    def _is_alive(self) -> bool:
        """Whether the worker lives; whatever else has ended is taken note of too, so that nothing stays a zombie."""
        while self.ended is None:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self.worker:
                self.ended = status
        return self.ended is None

    def _dismiss(self) -> None:
        """Let an idle worker end, and what it has started clean up behind itself, before they are killed."""
        self.requests.close()
        deadline = time.monotonic() + DISMISS_S
        while descendants(os.getpid(), all_processes()) and time.monotonic() < deadline:
            self._is_alive()
            time.sleep(0.005)

    def _end_worker(self) -> None:
        """Kill the worker and all processes that come from it."""
        if not self.is_open:
            return
        end_processes(self.worker)
        self.is_open, self.ended = False, self.ended or 0
        self.requests.close()
        os.close(self.results)
        os.close(self.output)

    # A call.

    def _call(self, message: bytes, request: int, seconds: float) -> bytes:
        """The answer to a call, or why there is none."""
        deadline = time.monotonic() + seconds
        next_look = time.monotonic() + LOOK_S
        cause, what = "", ""
        with suppress(OSError):  # it has just ended, which is seen below
            socket.send_fds(self.requests, [message], [request])
        while not cause:
            self._wait(min(deadline, next_look))
            self._read_results()
            self._read_output()
            now = time.monotonic()
            if self._has_answer():
                break
            if not self._is_alive():
                cause, what = "exited", f"ended its process ({_ending(self.ended or 0)})"
            elif now >= deadline:
                cause, what = "time", f"did not return within {seconds:g} s and was ended"
            elif now >= next_look:
                cause, what = self._look()
                next_look = time.monotonic() + max(LOOK_S, 10 * (time.monotonic() - now))
            elif len(self.received) > MOST_ANSWER:
                cause, what = "memory", f"returned more than {MOST_ANSWER:,} bytes"
        self._read_output()
        if not cause:
            answer = bytes(self.received[FRAME.size :])
            self.received.clear()
            return answer
        self._end_worker()
        return json.dumps({"failed": [cause, what]}).encode()

    def _output(self) -> bytes:
        """What was printed since the last call."""
        text = bytes(self.printed)
        if self.left_out:
            text += f"\n[... {self.left_out:,} more bytes were left out]\n".encode()
        self.printed, self.left_out = bytearray(), 0
        return text

    def _wait(self, until: float) -> None:
        """Until there is something to read, for at most 50 ms: a worker's end need not show in its pipes."""
        seconds = min(max(0.0, until - time.monotonic()), 0.05)
        poll = select.poll()
        for end in (self.results, self.output):
            poll.register(end, select.POLLIN)
        poll.register(self.channel, 0)  # the trainer hangs up, and nobody wants the answer
        for end, event in poll.poll(seconds * 1000):
            if end == self.channel.fileno() and event:
                raise BrokenPipeError
            if event == select.POLLHUP:
                time.sleep(min(seconds, 0.005))  # the pipe is closed, which poll says at once for ever
        if os.getppid() != self.trainer:
            raise BrokenPipeError

    @staticmethod
    def _ready(end: int, milliseconds: float) -> bool:
        poll = select.poll()
        poll.register(end, select.POLLIN)
        return bool(poll.poll(milliseconds))

    def _read_results(self) -> None:
        self.received += _read(self.results)

    def _read_output(self) -> None:
        """Keep the beginning; the rest is read too, or the function would wait for somebody to read it."""
        text = _read(self.output)
        room = MOST_OUTPUT - len(self.printed)
        self.printed += text[:room]
        self.left_out += max(0, len(text) - room)

    def _has_answer(self) -> bool:
        greeting = FRAME.pack(0)
        if self.received.startswith(greeting):
            del self.received[: len(greeting)]
        if len(self.received) < FRAME.size:
            return False
        return len(self.received) - FRAME.size >= FRAME.unpack(self.received[: FRAME.size])[0]

    def _look(self) -> tuple[str, str]:
        """Cause and words, if the function's processes are too many or take too much memory together."""
        processes = all_processes()
        family = descendants(os.getpid(), processes)
        if len(family) > self.kept.processes:
            return "processes", f"started {len(family)} processes, more than {self.kept.processes}, and was ended"
        taken = sum(max(0, processes[pid].rss - self.first_rss) for pid in family)
        if self.kept.memory is not None and taken > self.kept.memory:
            limit = self.kept.memory / 1e9
            return "memory", f"took {taken / 1e9:.2g} GB of memory, more than {limit:.2g} GB, and was ended"
        return "", ""


def _read(end: int) -> bytes:
    """What a pipe holds, without waiting; of an endless stream the first part."""
    found = bytearray()
    with suppress(BlockingIOError):
        while len(found) < 16 * _READ:
            chunk = os.read(end, _READ)
            if not chunk:
                break
            found += chunk
    return bytes(found)


def _ending(status: int) -> str:
    """`exit code 3`, `SIGSEGV`."""
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.waitstatus_to_exitcode(status)}"


def answer_of(answer: bytes, output: bytes) -> Answer:
    """What `Keeper.run` sent for a call."""
    text, fields = output.decode(errors="replace"), json.loads(answer)
    if "failed" in fields:
        cause, what = fields["failed"]
        return Answer({}, cause, what, text)
    return Answer(fields, output=text)
