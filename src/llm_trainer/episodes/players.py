"""The trainer's side of environments and agents: they run in processes of their own, within limits, or in this one."""

import pickle
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from llm_trainer.episodes.player import Call, failed
from llm_trainer.rewards.workers import Interrupted, Worker, in_memory, readable, what_runs, why_no_workers

AT_ONCE = 128  # episodes, at most, each of which has a process
PROCESSES_EACH = 4  # of an episode's environment, on average, with its own
LOOK_S = 0.1  # between two looks at whether the run is to stop
GRACE_S = 10.0  # beyond the limit of a step, until the process that holds it is given up


class Plays(Protocol):
    """Answers calls in the name of a user's object, and never past an exception: `player.Player`."""

    def answer(self, call: Call) -> dict[str, Any]: ...


class Players:
    """The environments, or agents, of up to `AT_ONCE` episodes.

    Args:
        name: of the environment, for messages.
        make: what plays one episode after another.
        seconds: that an answer may take.
        memory_gb: memory that an environment may take beyond what its process begins with; None: no limit.
        in_process: it is called in this process, without limits.
        say: called with what environments print.

    Attributes:
        notes: what the user should know at the start.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Plays],
        *,
        seconds: float,
        memory_gb: float | None,
        in_process: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.name, self.seconds, self.say = name, seconds, say
        self.notes: list[str] = []
        self._make = make
        self._here: dict[int, Plays] = {}
        self._worker: Worker | None = None
        memory = None if memory_gb is None else int(memory_gb * 1e9)
        if not in_process:
            self._start(memory)

    def _start(self, memory: int | None) -> None:
        reason = why_no_workers()
        if not reason:
            from llm_trainer.episodes.actors import Stage

            running = what_runs()
            stage = Stage(self._make, memory)
            self._worker = Worker(self.name, stage, None, AT_ONCE * PROCESSES_EACH)
            if not self._worker.is_ready():
                self._worker.close()
                self._worker = None
                reason = f"a fork of this process, where {running or 'another thread'} runs, does not answer"
        if reason:
            self.notes.append(
                f"{self.name} runs in the process that trains, without limits of time and memory: {reason}"
            )

    def ask(self, calls: Sequence[Call], stop: Callable[[], bool]) -> list[dict[str, Any]]:
        """What they answer (`Plays.answer`), all at the same time.

        Args:
            stop: asked several times a second.

        Raises:
            Interrupted: `stop` said so.
        """
        if self._worker is None:
            return [self._player(call.slot).answer(call) for call in calls]
        with self.asking(calls) as look:
            while (found := look()) is None:
                if stop():
                    raise Interrupted
                readable([self._worker], LOOK_S)
        return found

    @contextmanager
    def asking(self, calls: Sequence[Call]) -> Iterator[Callable[[], list[dict[str, Any]] | None]]:
        """A function that gives the answers when they are there; None: not yet. Who leaves before ends the processes."""
        if self._worker is None:
            with ThreadPoolExecutor(max(1, len(calls))) as threads:
                asked = [threads.submit(self._player(call.slot).answer, call) for call in calls]
                yield lambda: [one.result() for one in asked] if all(one.done() for one in asked) else None
            return
        worker, data = self._worker, pickle.dumps((list(calls), self.seconds))
        found: list[dict[str, Any]] | None = None

        def look() -> list[dict[str, Any]] | None:
            nonlocal found
            answer = worker.look(bool(readable([worker], 0)))
            if answer is None:
                return None
            if answer.output.strip():
                self.say(f"{self.name} printed: {answer.output.rstrip()}")
            found = [failed(answer.cause, answer.what)] * len(calls) if answer.cause else answer.fields["answers"]
            return found

        with in_memory(data) as request:
            worker.begin(request, len(data), self.seconds + GRACE_S)
            try:
                yield look
            finally:
                if found is None:
                    worker.close()  # what it still answers is nobody's; the next call starts it again

    def _player(self, slot: int) -> Plays:
        return self._here.setdefault(slot, self._make())

    def close(self) -> None:
        """End the processes; they also end with this process, however that ends."""
        if self._worker is not None:
            self._worker.close()
