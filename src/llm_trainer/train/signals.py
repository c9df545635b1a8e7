"""What SIGTERM and SIGINT do to a run: it ends after the current step, with its state saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", so that a scheduler requeues the job


class TrainingInterrupted(SystemExit):
    """A signal stopped the run after its state was saved; the process exits with code 75."""


class Signals:
    """Remembers that SIGTERM or SIGINT came; a second SIGINT interrupts at once."""

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
        before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
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
