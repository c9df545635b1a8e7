"""The processes behind a user's function: a keeper, which holds its limits, and the worker that calls it.

The trainer forks the keeper as early as it can, and the keeper forks the worker, again whenever one had to be killed: so
functions need not be pickled, closures and lambdas work. The keeper never runs the function and has one thread, so it is
there to kill. Requests travel in memory files, answers and what the function prints through pipes that the keeper empties:
nobody waits for somebody who does not read. Linux only.
"""

import ctypes
import gc
import json
import mmap
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from llm_trainer.config import env
from llm_trainer.rewards.returned import Answer

CALL = struct.Struct(">Qd")  # bytes of the request, seconds that it may take
FRAME = struct.Struct(">Q")  # bytes of an answer
MOST_OUTPUT = 2000  # bytes of what a call prints that are kept
MOST_ANSWER = 1 << 30  # bytes
MOST_PROCESSES = 64 + (os.cpu_count() or 1)  # of a function at a time: pools have one per core
LOOK_S = 0.2  # between two looks at the processes of a call
DISMISS_S = 0.3  # for what is told to end, before it is killed
SWEEP_S = 5.0  # to kill processes that fork meanwhile
_READ = 1 << 20
_QUIET = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # sent to whole groups or jobs
_LIBC = ctypes.CDLL(None)  # found before there is a fork: a lock of the loader may stay locked in it
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


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


# --- the keeper


def keep(kept: Kept, channel: socket.socket, trainer: int) -> NoReturn:
    """The life of a keeper, in a process that was forked for it: until the trainer closes its end of `channel`, or ends."""
    status = 1
    try:
        _become_quiet()
        os.setsid()  # Ctrl-C in a terminal is for the trainer
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what the function leaves behind becomes this process's
        Keeper(kept, channel, trainer).run()
        status = 0
    except (BrokenPipeError, ConnectionResetError):
        status = 0  # the trainer is gone
    except BaseException as error:
        print(f"the keeper of {kept.name!r} failed: {error!r}", file=sys.stderr, flush=True)
    finally:
        with suppress(BaseException):
            _end_processes()
        os._exit(status)  # nothing that was inherited is cleaned up, closed or flushed a second time


class Keeper:
    """Hands calls to a worker, one at a time, and ends the worker where a limit is reached."""

    def __init__(self, kept: Kept, channel: socket.socket, trainer: int) -> None:
        self.kept, self.channel, self.trainer = kept, channel, trainer
        self.first_rss = _processes().get(os.getpid(), _Process(0, 0)).rss  # pages that are shared with the trainer
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
        while _descendants(os.getpid(), _processes()) and time.monotonic() < deadline:
            self._is_alive()
            time.sleep(0.005)

    def _end_worker(self) -> None:
        """Kill the worker and all processes that come from it."""
        if not self.is_open:
            return
        _end_processes(self.worker)
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
        processes = _processes()
        family = _descendants(os.getpid(), processes)
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


# --- the worker


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


def pass_over_signals() -> None:
    """Signals that whole jobs are sent are the trainer's; what this process starts gets them as ever."""
    pid = os.getpid()

    def pass_over(number: int, frame: Any) -> None:
        if os.getpid() != pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in _QUIET:
        signal.signal(number, pass_over)


def limit_memory(more: int) -> None:
    """Let this process take so many bytes more: of what can be written to.

    Address space would count libraries too, and what is reserved and never used.
    """
    limit = _writable() + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


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


def answer_of(answer: bytes, output: bytes) -> Answer:
    """What `Keeper.run` sent for a call."""
    text, fields = output.decode(errors="replace"), json.loads(answer)
    if "failed" in fields:
        cause, what = fields["failed"]
        return Answer({}, cause, what, text)
    return Answer(fields, output=text)


def _write(end: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(end, rest) :]


# --- processes


class _Process(NamedTuple):
    parent: int
    rss: int  # bytes


def _processes() -> dict[int, _Process]:
    """All processes that can be seen, by their number."""
    page, found = resource.getpagesize(), {}
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                stat = file.read()
        except OSError:
            continue  # it has ended meanwhile
        fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
        found[int(entry)] = _Process(int(fields[1]), int(fields[21]) * page)
    return found


def _descendants(pid: int, processes: dict[int, _Process]) -> list[int]:
    children: dict[int, list[int]] = {}
    for number, process in processes.items():
        children.setdefault(process.parent, []).append(number)
    found, open_ends = [], [pid]
    while open_ends:
        those = children.get(open_ends.pop(), [])
        found += those
        open_ends += those
    return found


def _end_processes(group: int | None = None) -> None:
    """Kill all processes below this one, first a whole group at once, and take note of their ends."""
    if group is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)  # between its forks nothing gets away
    deadline = time.monotonic() + SWEEP_S
    while time.monotonic() < deadline:
        _reap()
        family = _descendants(os.getpid(), _processes())
        if not family:
            return
        _kill(family)
        time.sleep(0.002)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _become_quiet() -> None:
    """Make a keeper of a fork: no signals of others, no handlers, no collection of what belongs to the trainer."""
    signal.set_wakeup_fd(-1)
    for number in _QUIET:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    gc.disable()
    gc.freeze()


def end_with_parent() -> None:
    """Let this process be killed when the one ends that forked it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _writable() -> int:
    """Bytes of private memory that this process may write to; most of it is shared with the trainer still."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
