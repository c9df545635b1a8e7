"""A rollout that is being made: begun by all processes, its parts made by each of them, joined and finished by all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llm_trainer.data.rollout_store import AnyAsked, RolloutError, RolloutFolder
from llm_trainer.data.rollouts import LEFT_OUT, Finished, Maker, Plan, Prompt, Rollout, account, checked
from llm_trainer.data.stream import mix_seeds
from llm_trainer.machine import Machine

EVALUATION = 0xE7A1  # what tells the seeds of evaluations from those of training
TOO_OLD = "the weights that wrote it are too old"  # why rows are dropped
OF_TOKENS = ("generate", "reward", "score")  # phases whose work grows with the tokens


@dataclass(eq=False)
class Making:
    """Makes one rollout.

    Args:
        folder: that it goes to.
        maker: of its rows.
        machine: of the run.
        number: of the rollout.
        prompts: all of them.
        facts: `made_of`, `after` and `parts`, see `rollout_store.Stored`.
        training: False: for an evaluation.
    """

    folder: RolloutFolder
    maker: Maker
    machine: Machine
    number: int
    prompts: Sequence[Prompt]
    facts: Mapping[str, Any]
    training: bool = True

    def __post_init__(self) -> None:
        self._sign = self.folder.stop_sign(self.number)
        self._stop = AnyAsked(self.machine, self._sign)
        self._missing: list[int] = []
        self._is_stopped = False
        purpose = () if self.training else (EVALUATION,)
        seed = mix_seeds(self.machine.seed, self.number, *purpose)
        self.plan = Plan(self.number, seed, self.machine.step, self.training, self._stop)

    def begin(self) -> None:
        """All processes: open its folder, and bring the weights as they are now to whatever samples."""
        self._missing = self.folder.begin(self.number, self.facts)
        with self.plan.timed("sync"):
            self.maker.begin(self.plan)

    def bring_weights(self) -> None:
        """All processes: the same while parts are made, to those that sample in flight (`Maker.updates_in_flight`)."""
        with self.plan.timed("sync"):
            self.maker.begin(replace(self.plan, version=self.machine.step))

    def make_parts(self) -> None:
        """This process's share of the parts that are missing. Nothing in here waits for another process."""
        machine, parts = self.machine, self.facts["parts"]
        try:
            for part in self._missing[machine.process_number :: machine.num_processes]:
                first, last = parts[part]
                rows = None if self._stop() else self.maker.make(self.plan, self.prompts[first:last])
                if rows is None:
                    self._is_stopped = True
                    self._sign.touch()
                    break
                self.folder.write_part(self.number, part, [checked(row) for row in rows])
        except BaseException:
            self._sign.touch()  # the others do not wait for it
            raise

    def make_parts_together(self) -> None:
        """All processes: the same, and wait for each other; what fails in one fails in all."""
        failure = None
        try:
            self.make_parts()
        except Exception as error:
            failure = error
        with self.plan.timed("wait"):
            fail_together(self.machine, failure)

    def give_up(self) -> None:
        """Let `make_parts`, in another thread, come to its end at the next token."""
        self._stop.give_up()

    def finish(self, made_of: Mapping[str, Any] | None = None, max_staleness: int | None = None) -> Rollout:
        """All processes: wait for all parts, join them, and add what is known of all rows only.

        Args:
            made_of: more of what it was made of.
            max_staleness: rows that weights wrote which are older are dropped (`staleness`); None: none are.

        Raises:
            Stopped: a process was asked to stop; on all of them.
        """
        plan, parts = self.plan, self.facts["parts"]
        with plan.timed("wait"):
            self.folder.wait_for_parts(self.number, len(parts), lambda: self._is_stopped or self._stop())
        folder, joined = self.folder.join(self.number, len(parts))
        own = {"made_of": {**self.facts["made_of"], **(made_of or {})}, "after": self.facts["after"]}
        with plan.timed("score"):
            rollout = Rollout(folder, joined | own)
            finished = self.maker.finish(rollout)
        if max_staleness is not None:
            too_old = staleness(rollout, self.machine.step) > max_staleness
            finished = Finished(finished.columns, finished.masked, {**finished.dropped, TOO_OLD: too_old})
        reasons, left_out, ledger = account(rollout, finished)
        columns = dict(finished.columns) | {LEFT_OUT: list(left_out[:, None])}
        path = self.folder.finish(self.number, columns, joined, own | {"reasons": reasons, "ledger": ledger})
        self._record(ledger["sampled"])
        return Rollout(path)

    def _record(self, sampled: int) -> None:
        """How long the phases have taken this process, and how many tokens all have sampled meanwhile."""
        for phase, seconds in self.plan.seconds.items():
            self.machine.record(f"seconds/{phase}", seconds)
            if seconds and phase in OF_TOKENS:
                self.machine.record(f"tokens_per_second/{phase}", sampled, seconds)


def fail_together(machine: Machine, failure: BaseException | None) -> None:
    """All processes: go on if no process has failed to make its parts of a rollout.

    Raises:
        BaseException: `failure`, what failed in this process.
        RolloutError: it failed in another one.
    """
    said = None if failure is None else f"{type(failure).__name__}: {failure}"
    of_all = machine.gather(said)
    if failure is not None:
        raise failure
    for process, message in enumerate(of_all):
        if message is not None:
            raise RolloutError(f"process {process} could not make its part of a rollout: {message}")


def staleness(rollout: Rollout, step: int) -> np.ndarray:
    """`[rows]` optimizer steps between the oldest weights that wrote tokens of a row, and `step`; 0 of rows that were given."""
    found = np.zeros(len(rollout), dtype=np.int64)
    for row in range(len(rollout)):
        versions = rollout.store["versions"][row][1::2]
        if len(versions) and versions.min() >= 0:
            found[row] = step - versions.min()
    return found
