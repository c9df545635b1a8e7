"""The rollout after the one that is learned from, made meanwhile in a thread (asynchronous mode)."""

import threading
from collections.abc import Mapping
from typing import Any

import torch

from llm_trainer.data.rollout_making import Making
from llm_trainer.data.rollout_store import LOOKS_EVERY_S, RolloutError
from llm_trainer.machine import Machine

# Of what a rollout was made ahead of, what is not known when its making begins: the hash of the weights that have scored it,
# and the steps of other weights that made what a kill had left undone.
SCORED, ALSO = "scored", "also"


def origin(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """What a rollout that was made ahead was begun with."""
    return {name: value for name, value in made_of.items() if name not in (SCORED, ALSO)}


class Ahead:
    """Makes this process's parts of one rollout in a thread, while the main one learns from the rollout before.

    The thread meets no other process: weights are brought, and the rollout is joined and scored, by the main one. It ends
    within a token when the process is asked to stop. A trainer has one, which all its sources of rollouts know: what draws
    completions has one version of the weights at a time.

    Args:
        max_staleness: optimizer steps that the weights which write a completion may be behind when learning from it begins.
    """

    def __init__(self, max_staleness: int) -> None:
        self.max_staleness = max_staleness
        self._making: Making | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def start(self, making: Making) -> None:
        """Make the parts of a rollout that was begun."""
        assert self._thread is None and self._failure is None
        self._making = making
        # NOTE: a daemon, since whoever leaves the steps without an end (`stop`) must not leave a process that never ends.
        self._thread = threading.Thread(target=self._run, args=(making,), name="rollout-ahead", daemon=True)
        self._thread.start()

    def _run(self, making: Making) -> None:
        device = making.machine.device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # every thread begins with the first one
        try:
            making.make_parts()
        except BaseException as error:
            self._failure = error  # it is the main thread's to raise, on all ranks together

    @property
    def is_busy(self) -> bool:
        """Whether this process's parts are being made."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until this process's parts are made, or nothing more of them will be."""
        while self._thread is not None and self.is_busy:
            self._thread.join(LOOKS_EVERY_S)  # between two looks signals are handled
        self._thread = None

    def collect(self, machine: Machine) -> None:
        """All processes: wait, each for its own parts.

        Raises:
            BaseException: what failed in this process.
            RolloutError: it failed in another one.
        """
        self.wait()
        failure, self._failure, self._making = self._failure, None, None
        said = None if failure is None else f"{type(failure).__name__}: {failure}"
        of_all = machine.gather(said)
        if failure is not None:
            raise failure
        for process, message in enumerate(of_all):
            if message is not None:
                raise RolloutError(f"process {process} could not make its part of the next rollout: {message}")

    def stop(self) -> None:
        """Give up what is under way, and wait until it has ended; the parts that are finished stay on the disk."""
        if self._making is not None:
            self._making.give_up()
        self.wait()
        self._making = self._failure = None
