"""The rollout after the one that is learned from, made meanwhile in a thread (asynchronous mode)."""

import threading
from collections.abc import Mapping
from typing import Any

import torch

from llm_trainer.data.rollout_making import Making, fail_together
from llm_trainer.data.rollout_store import LOOKS_EVERY_S, Stored
from llm_trainer.machine import Machine

# Of what a rollout was made ahead of, what is not known when its making begins: the hash of the weights that have scored it,
# and the steps of other weights that made what a kill had left undone.
SCORED, ALSO = "scored", "also"


def origin(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """What a rollout that was made ahead was begun with."""
    return {name: value for name, value in made_of.items() if name not in (SCORED, ALSO)}


def is_same_ahead(stored: Stored, made_of: Mapping[str, Any], begun: Mapping[str, Any] | None) -> bool:
    """Whether what is on the disk of a rollout that was begun ahead is the one that is wanted, as far as it goes.

    Args:
        made_of: what is wanted; with a `version` if it is to be made ahead, else to be learned from now.
        begun: what a checkpoint says that the rollout was begun with; None: nothing.
    """
    if "version" not in stored.made_of:
        return False
    # 1. it was begun by the same weights, and no others have made a part of it
    same = origin(stored.made_of)
    if same == made_of:
        return ALSO not in stored.made_of
    # 2. the checkpoint says that it was begun so, by weights that are gone; those that score it are there
    is_now = "version" not in made_of
    if is_now and stored.is_finished and stored.made_of[SCORED] != made_of["weights"]:
        return False
    others = [name for name in made_of if name not in ("weights", "version")]
    return same == begun and all(same.get(name) == made_of[name] for name in others)


def mixed(stored: Stored | None, made_of: Mapping[str, Any], step: int) -> tuple[dict[str, Any], str]:
    """What a rollout is made of that was begun by weights which are gone, and how much of it others make, in words.

    Args:
        stored: what is there of it; None: nothing.
        made_of: that is wanted now.
        step: of the weights of now.
    """
    if stored is None:
        return dict(made_of), "all of it is"
    if not stored.missing:
        return stored.made_of, ""
    also = sorted({*stored.made_of.get(ALSO, []), step})
    return stored.made_of | {ALSO: also}, f"{stored.missing} of its {len(stored.parts)} parts are"


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
        fail_together(machine, failure)

    def stop(self) -> None:
        """Give up what is under way, and wait until it has ended; the parts that are finished stay on the disk."""
        if self._making is not None:
            self._making.give_up()
        self.wait()
        self._making = self._failure = None
