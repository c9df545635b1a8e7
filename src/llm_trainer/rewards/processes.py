"""Processes below this one: what there is, what they may take, and their ends. Linux only."""

import ctypes
import os
import resource
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

SWEEP_S = 5.0  # to kill processes that fork meanwhile
OF_JOBS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # sent to whole groups or jobs
_LIBC = ctypes.CDLL(None)  # found before there is a fork: a lock of the loader may stay locked in it
_PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h


class Process(NamedTuple):
    parent: int
    rss: int  # bytes


def all_processes() -> dict[int, Process]:
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
        found[int(entry)] = Process(int(fields[1]), int(fields[21]) * page)
    return found


def descendants(pid: int, processes: dict[int, Process]) -> list[int]:
    children: dict[int, list[int]] = {}
    for number, process in processes.items():
        children.setdefault(process.parent, []).append(number)
    found, open_ends = [], [pid]
    while open_ends:
        those = children.get(open_ends.pop(), [])
        found += those
        open_ends += those
    return found


def end_processes(group: int | None = None) -> None:
    """Kill all processes below this one, first a whole group at once, and take note of their ends."""
    if group is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)  # between its forks nothing gets away
    deadline = time.monotonic() + SWEEP_S
    while time.monotonic() < deadline:
        _reap()
        family = descendants(os.getpid(), all_processes())
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


def pass_over_signals() -> None:
    """Signals that whole jobs are sent are the trainer's; what this process starts gets them as ever."""
    pid = os.getpid()

    def pass_over(number: int, frame: Any) -> None:
        if os.getpid() != pid:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    for number in OF_JOBS:
        signal.signal(number, pass_over)


def limit_memory(more: int) -> None:
    """Let this process take so many bytes more: of what can be written to.

    Address space would count libraries too, and what is reserved and never used.
    """
    limit = _writable() + more
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def end_with_parent() -> None:
    """Let this process be killed when the one ends that forked it."""
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def prctl(option: int, value: int) -> None:
    _LIBC.prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def _writable() -> int:
    """Bytes of private memory that this process may write to; most of it is shared with the trainer still."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[5]) * resource.getpagesize()
