"""The trainer's side of environments: they run in processes of their own, within limits, or in this one."""

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from llm_trainer.episodes.environments import Environment
from llm_trainer.episodes.player import Call, Player, failed
from llm_trainer.rewards.workers import Worker, answers, in_memory, what_runs, why_no_workers

AT_ONCE = 128  # episodes, at most, each of which has a process
PROCESSES_EACH = 4  # of an episode's environment, on average, with its own
GRACE_S = 10.0  # beyond the limit of a step, until the process that holds it is given up


class Players:
    """The environments of up to `AT_ONCE` episodes.

    Args:
        name: of the environment, for messages.
        make: an environment.
        seconds: that a step may take.
        memory_gb: memory that an environment may take beyond what its process begins with; None: no limit.
        in_process: it is called in this process, without limits.
        say: called with what environments print.

    Attributes:
        notes: what the user should know at the start.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Environment],
        *,
        seconds: float,
        memory_gb: float | None,
        in_process: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.name, self.seconds, self.say = name, seconds, say
        self.notes: list[str] = []
        self._make = make
        self._here: dict[int, Player] = {}
        self._worker: Worker | None = None
        memory = None if memory_gb is None else int(memory_gb * 1e9)
        if not in_process:
            self._start(memory)

    def _start(self, memory: int | None) -> None:
        reason = why_no_workers()
        if not reason:
            from llm_trainer.episodes.actors import Stage

            running = what_runs()
            stage = Stage(partial(Player, self._make), memory)
            self._worker = Worker(self.name, stage, None, AT_ONCE * PROCESSES_EACH)
            if not self._worker.is_ready():
                self._worker.close()
                self._worker = None
                reason = f"a fork of this process, where {running or 'another thread'} runs, does not answer"
        if reason:
            self.notes.append(
                f"environment {self.name} runs in the process that trains, without limits of time and memory: {reason}"
            )

    def ask(self, calls: Sequence[Call], stop: Callable[[], bool]) -> list[dict[str, Any]]:
        """What the environments answer (`Player.answer`), all at the same time.

        Args:
            stop: asked several times a second.

        Raises:
            Interrupted: `stop` said so.
        """
        if self._worker is None:
            return [self._here.setdefault(call.slot, Player(self._make)).answer(call) for call in calls]
        data = pickle.dumps((list(calls), self.seconds))
        with in_memory(data) as request:
            self._worker.begin(request, len(data), self.seconds + GRACE_S)
            answer = answers([self._worker], stop)[self._worker]
        if answer.output.strip():
            self.say(f"environment {self.name} printed: {answer.output.rstrip()}")
        if answer.cause:
            return [failed(answer.cause, answer.what)] * len(calls)
        found: list[dict[str, Any]] = answer.fields["answers"]
        return found

    def close(self) -> None:
        """End the processes; they also end with this process, however that ends."""
        if self._worker is not None:
            self._worker.close()
