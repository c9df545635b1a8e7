"""The values that pass between the data, the loop and the run: where a run stands, and what a step takes and gives."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from llm_trainer.position import InRollout, Position

if TYPE_CHECKING:
    from torch import Tensor


class Stopped(Exception):
    """A source of steps has stopped, because a rank was asked to; raised on all ranks, between two steps."""


class Choice(NamedTuple):
    """Something that the machine chose because the user left it open. It changes rounding at most.

    Attributes:
        name: what was chosen, such as 'layout'.
        value: what it was set to, such as 'flat'.
        why: the reason, in a few words.
        key: the option and value by which the user decides otherwise, such as 'data_loader_config.packing: none', or an
            environment variable, 'OMP_NUM_THREADS=4'.
    """

    name: str
    value: str
    why: str
    key: str

    def __str__(self) -> str:
        return f"{self.name} {self.value}: {self.why} [{self.option}]"

    @property
    def facts(self) -> dict[str, str]:
        """All but the name, for machines."""
        return {"value": self.value, "why": self.why, "key": self.key}

    @property
    def option(self) -> str:
        """The key as it is typed behind a command."""
        return self.key.replace(": ", "=")

    def as_keyword(self) -> Self:
        """The same choice for users without a configuration: its key is a keyword of a trainer, such as packing='none'."""
        option, is_option, value = self.key.partition(": ")
        if not is_option:
            return self
        literal = {"null": None, "true": True, "false": False}.get(value, value)
        return self._replace(key=f"{option.rpartition('.')[2]}={literal!r}")


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        position: position of the next sample in the current epoch, in the units of the step source; in a rollout, of its
            first prompt.
        rollout: number of the rollout under way, counted over the run; 0 also where nothing is sampled.
        updates: optimizer steps that were taken on it.
        tokens: tokens seen on all ranks.
        train_seconds: time spent in steps, and in waiting for their data.
        best_loss: lowest validation loss; where the best model is that with the highest of another metric, that value.
        best_step: the step it was measured at.
        evals_without_progress: evaluations since then.
        stopped_early: early stopping, or a hook, ended the run.
        bad_steps: steps in a row that were not finite.
        skipped_steps: all steps that were not finite.
        learning_rate: of the last step.
        hooks_done: step at which each hook was called last.
        lines: the metrics written since the last step; a resumed run writes them again, so that no line is lost or double.
        words: of the algorithm about the last step, likewise.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    rollout: int = 0
    updates: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_progress: int = 0
    stopped_early: bool = False
    bad_steps: int = 0
    skipped_steps: int = 0
    learning_rate: float = 0.0
    hooks_done: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, float]] = field(default_factory=list)
    words: str = ""

    @property
    def place(self) -> Position:
        """Where the next step begins, as its source says it."""
        if self.rollout or self.updates:
            return InRollout(self.position, self.rollout, self.updates)
        return self.position

    @property
    def is_between_epochs(self) -> bool:
        """Whether an epoch has just ended: the first updates of a rollout leave the position at its first prompt."""
        return self.epoch > 0 and self.position == 0 and self.updates == 0

    def advance(self, position: Position) -> None:
        """Count a finished optimizer step; the next one begins at `position`."""
        self.step += 1
        self.position, self.rollout, self.updates = InRollout.at(position)

    def next_epoch(self, rollout: int = 0) -> None:
        """Count a finished epoch; the next one begins at its first sample, and not before that `rollout`."""
        self.epoch += 1
        self.position = 0
        self.rollout = max(self.rollout, rollout)

    def note_loss(self, loss: float, min_delta: float, highest: bool = False) -> bool:
        """Note a validation loss; whether it is the lowest so far, by more than `min_delta`. `highest`: a reward's highest."""
        sign = -1 if highest else 1
        best = math.inf if self.best_loss is None else sign * self.best_loss
        is_best = sign * loss < best - min_delta  # never where it is NaN
        if is_best:
            self.best_loss, self.best_step = loss, self.step
            self.evals_without_progress = 0
        else:
            self.evals_without_progress += 1
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """All of it, in JSON types."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, in place: others hold this object."""
        restored = Progress(**state)
        for name in fields(self):
            setattr(self, name.name, getattr(restored, name.name))


@dataclass(frozen=True)
class Horizon:
    """How far a run goes.

    Attributes:
        epochs: passes over the data.
        max_steps: optimizer steps after which it ends, whatever `epochs` says; None: no such limit.
        steps_per_epoch: optimizer steps of one pass; None: the data does not say.
    """

    epochs: int
    max_steps: int | None = None
    steps_per_epoch: int | None = None

    def reached(self, progress: Progress) -> bool:
        """Whether the last step has been done."""
        if progress.stopped_early or progress.epoch >= self.epochs:
            return True
        return self.max_steps is not None and progress.step >= self.max_steps

    def total(self) -> int | None:
        """Optimizer steps of the whole run; None where neither the data nor a limit says."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.steps_per_epoch is not None:
            limits.append(self.steps_per_epoch * self.epochs)
        return min(limits, default=None)


@dataclass
class MicroBatch:
    """What one forward and backward sees.

    Attributes:
        batch: as the loader made it.
        counts: False for a filler: a batch that weighs nothing and is recorded nowhere. It only keeps a rank without rows
            in step with the others.
        weight: number of terms that its loss is a mean of; the loop sets it.
        added_weight: the same of what is added to its loss (`algorithm.Regulariser`).
        loss: which one, of several that a step adds up (`Algorithm._further_losses`); empty: the algorithm's own.
    """

    batch: Any
    counts: bool = True
    weight: float = 0.0
    loss: str = ""
    added_weight: float = 0.0

    def filler(self) -> "MicroBatch":
        """The same batch as one that does not count."""
        return MicroBatch(self.batch, counts=False, loss=self.loss)


@dataclass(frozen=True)
class StepDone:
    """What an optimizer step was.

    Attributes:
        loss: `[]` this rank's share of the step's loss, on the device; the sum over ranks is the step's loss.
        grad_norm: of the whole gradient, before clipping.
        finite: whether it is finite; otherwise nothing was updated.
        tokens: of all ranks.
        terms: of all ranks, that each of its losses is a mean of; all 0: nothing counted.
        seconds, cpu_seconds: that the step took by the clock, and of the processor for this process (0: nobody has looked).
        waited: seconds before it, in which its data were awaited; of a rollout's first update, until it was made.
        stop: whether any rank has been asked to stop.
        batches: this rank's micro-batches.
        position: in the data, after the step.
    """

    loss: "Tensor"
    grad_norm: float
    finite: bool
    tokens: int
    terms: Mapping[str, float]
    seconds: float
    stop: bool
    batches: Sequence[MicroBatch]
    position: Position
    cpu_seconds: float = 0.0
    waited: float = 0.0
