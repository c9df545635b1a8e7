"""What SIGTERM, SIGINT and SIGUSR1 do to a run: it ends after the current step, with its state saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", so that a scheduler requeues the job


class TrainingInterrupted(SystemExit):
    """A signal stopped the run after its state was saved; the process exits with code 75."""


class Signals:
    """Remembers that SIGTERM, SIGINT or SIGUSR1 came; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def stop(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.received is not None

    @contextmanager
    def listening(self) -> Iterator["Signals"]:
        """Listen while the block runs (only the main thread can)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self.received = None
        numbers = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:  # it would end the process, with nothing saved
            numbers.append(signal.SIGUSR1)
        before = {number: signal.signal(number, self._note) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.received = None  # an evaluation afterwards is not cut short

    def _note(self, number: int, frame: Any) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
