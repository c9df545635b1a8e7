"""How long the worker processes of a DataLoader live: as long as the run needs them, and never longer than its process."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import c_bool
from multiprocessing.sharedctypes import RawValue
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # what schedulers and terminals send to every process
_needed: tuple[int, Any] | None = None  # the process that trains, and a flag that it shares with its workers


def _own_flag() -> Any:
    """The flag of this process; one that was forked while it trains, such as another rank, has its own."""
    global _needed
    if _needed is None or _needed[0] != os.getpid():
        _needed = os.getpid(), RawValue(c_bool, False)
    return _needed[1]


@contextmanager
def workers_needed() -> Iterator[None]:
    """While the block runs, SIGTERM does not end a worker: there is a step to finish, and a checkpoint to write."""
    flag = _own_flag()
    before, flag.value = flag.value, True
    try:
        yield
    finally:
        flag.value = before


@contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait while workers are started in the block: until `WorkerLife` has begun, one would end them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerLife:
    """A `worker_init_fn`: the worker survives signals while it is needed, and ends when its process has ended.

    Without that, SIGTERM is how a worker is dismissed when the interpreter exits, so it may not always be ignored.

    Args:
        then: the `worker_init_fn` of the user.
    """

    def __init__(self, then: Callable[[int], object] | None = None) -> None:
        self.then = then
        self._flag: Any = None  # of the process that has spawned this worker; a worker that is forked finds it here

    def __getstate__(self) -> dict[str, Any]:
        return {"then": self.then, "_flag": _own_flag()}

    def __deepcopy__(self, memo: dict) -> "WorkerLife":
        return WorkerLife(self.then)  # flags cannot be copied

    def __call__(self, worker: int) -> None:
        if self._flag is None and _needed is not None and _needed[0] == os.getppid():
            self._flag = _needed[1]
        for number in (signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._dismiss)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)  # see `signals_held`
        threading.Thread(target=_end_with_process, daemon=True).start()
        if self.then is not None:
            self.then(worker)

    def _dismiss(self, number: int, frame: Any) -> None:
        if self._flag is None or not self._flag.value:
            os._exit(0)


def _end_with_process() -> None:
    """End this worker within a second after the process that has started it, however that ended.

    A worker that waits to hand over a batch would never notice: its neighbours keep the other end of the pipe open.
    """
    started_by, process = os.getppid(), multiprocessing.parent_process()
    assert process is not None
    while process.is_alive() and os.getppid() == started_by:
        process.join(timeout=1)
    os._exit(1)
