"""Where the steps of reinforcement learning come from: rollouts that are found or made, and the updates on each."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, Literal

from llm_trainer.config.errors import counted
from llm_trainer.data.collate import laying
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.rollout_making import staleness
from llm_trainer.data.rollout_supply import RolloutSupply
from llm_trainer.data.rollout_unlearned import NothingLearned, Unlearned
from llm_trainer.data.rollouts import Rollout, Used, collate_rollout
from llm_trainer.data.stream import RowOfStep, SampleStream, StepSource, mix_seeds
from llm_trainer.data.vision import ImageFormat
from llm_trainer.layout import Layout
from llm_trainer.position import InRollout, Position
from llm_trainer.state import MicroBatch

ROWS_PER_MICRO_BATCH = 8  # where neither a token budget nor anybody says it


@dataclass(eq=False, repr=False)
class RolloutSource:
    """Steps on rollouts: it finds or makes rollout n, then yields its updates.

    A rollout has the prompts of one step of a source of prompts. Its rows are gone through `passes` times, each time in
    another order, `rows_per_update` at a time. A position is an `InRollout`.

    Args:
        supply: finds or makes rollouts.
        passes: over each rollout.
        rows_per_update: of an optimizer step, over all ranks; None: all of a rollout.
        batch_size: rows of a micro-batch where there is no token budget.
        pad_id: token that pads rows.
        shares_prompts: says, when a rollout is there, whether the trainer runs the prompt of a group once per micro-batch, so
            that a token budget counts it once; None: it does not.
        images: what opens those that prompts show; None: rows show none.

    Attributes:
        unlearned: rollouts of the training in a row that gave no update.
        following: number of the rollout behind those of the epoch that ended last.
    """

    supply: RolloutSupply
    _: KW_ONLY
    passes: int = 1
    rows_per_update: int | None = None
    batch_size: int | None = None
    pad_id: int = 0
    shares_prompts: Callable[[], bool] | None = None
    images: ImageFormat | None = None

    def __post_init__(self) -> None:
        prompts = self.supply.prompts
        self.micro_batch_tokens: int | Literal["auto"] | None = prompts.micro_batch_tokens
        self.source: StepSource = prompts.source
        self.machine, self.training, self.ahead = self.supply.machine, self.supply.training, self.supply.ahead
        if not self.training:  # one pass, in order
            self.passes, self.rows_per_update = 1, None
        self.unlearned, self.following = Unlearned(self.machine.say), 0
        self._opened: tuple[int, int, Rollout] | None = None  # epoch and number of it
        self._logged: tuple[int, int] | None = None  # number and step of the rollout whose metrics were recorded last
        self._cut_before: tuple[int, int | None] | None = None  # passes and rows per update of a checkpoint

    # What a source says.

    @property
    def layout(self) -> Layout:
        """How rows are laid out."""
        return self.machine.layout

    @property
    def shows_images(self) -> bool:
        """Whether prompts may show images; of a user's loader nobody knows, so they may."""
        return self.source.shows_images if isinstance(self.source, SampleStream) else True

    def describe(self) -> str:
        """What is learned from one step of prompts, for the screen before training."""
        prompts = "the prompts of a step"
        if isinstance(self.source, SampleStream):
            prompts = f"{self.source.rows_per_step} prompts"
        update = "all rows" if self.rows_per_update is None else f"{self.rows_per_update} rows"
        passes = "1 pass" if self.passes == 1 else f"{self.passes} passes"
        turns = ""
        if self.ahead is not None:
            turns = f"; the next is made meanwhile, by weights at most {self.ahead.max_staleness} steps old"
        return f"{prompts} x {self.supply.samples} completions per rollout; {passes}, {update} per step{turns}"

    def size(self) -> int | None:
        return self.source.size()

    def num_steps(self) -> int | None:
        return num_updates(self.source, self.supply.samples, self.rows_per_update, self.passes)

    def state_dict(self) -> dict[str, Any]:
        """What the source of prompts must remember, and how rollouts are cut into updates."""
        passes, rows_per_update = self._cut_before or (self.passes, self.rows_per_update)
        return {**self.supply.state_dict(), "passes": passes, "rows_per_update": rows_per_update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the source that gave `state`; a rollout under way is learned to its end as it was begun."""
        self.supply.load_state_dict(state)
        self._cut_before = state["passes"], state["rows_per_update"]
        self._opened = self._logged = None

    def recut(self, micro_batches: list[MicroBatch]) -> None:
        return None  # a seek is exact

    def rows_of_step(self, epoch: int, position: Position, micro_batches: list[MicroBatch]) -> list[list[RowOfStep]]:
        place = InRollout.at(position)
        assert self._opened is not None and self._opened[:2] == (epoch, place.number)
        stream = self._stream(place.number, self._opened[2], self._cut(place)[1])
        turn, before = divmod(place.updates, stream.num_steps())
        return stream.rows_of_step(turn, before * stream.rows_per_step, micro_batches)

    def stop(self) -> None:
        """End what is done meanwhile: a rollout that is made ahead stays on the disk as far as it is made."""
        self.supply.stop()

    # Steps.

    def steps(self, epoch: int, position: Position = 0) -> Iterator[tuple[list[MicroBatch], InRollout]]:
        """
        Raises:
            Stopped: a process was asked to stop while a rollout was made; on all of them.
            RolloutError: a stored rollout that is needed is not there, or damaged.
            NothingLearned: the first rollouts of the training gave no update.
        """
        place = InRollout.at(position)
        if not self.training:
            self._opened = None  # of an evaluation before, with other weights
            if self.ahead is not None:
                self.ahead.wait()  # what draws is to get other weights; all ranks meet before it does
        while True:
            rollout = self._rollout(epoch, place)
            if rollout is None:
                self.following = place.number
                return
            yield from self._updates(rollout, epoch, place)
            place = InRollout(rollout.after, place.number + 1)

    def _updates(self, rollout: Rollout, epoch: int, place: InRollout) -> Iterator[tuple[list[MicroBatch], InRollout]]:
        """The updates of a rollout that are left."""
        passes, rows_per_update = self._cut(place)
        stream = self._stream(place.number, rollout, rows_per_update)
        per_pass = stream.num_steps()
        if not per_pass:  # nothing of it can be learned from
            if self.training:
                self.unlearned.add(rollout, has_learned=self.machine.step > 0)
            return
        self.unlearned.forget()
        following = InRollout(rollout.after, place.number + 1)
        done = place.updates
        first, before = divmod(done, per_pass)
        for turn in range(first, passes):
            for micro_batches, _ in stream.steps(turn, before * stream.rows_per_step):
                self.supply.look_ahead(epoch, following, left=passes * per_pass - done)
                done += 1
                after = InRollout(place.position, place.number, done)
                if done == passes * per_pass:
                    after = following
                yield micro_batches, after
            before = 0

    def _cut(self, place: InRollout) -> tuple[int, int | None]:
        """Passes and rows per update of a rollout: as it was begun."""
        if place.updates == 0:
            self._cut_before = None
        return self._cut_before or (self.passes, self.rows_per_update)

    def _stream(self, number: int, rollout: Rollout, rows_per_update: int | None) -> SampleStream:
        """The rows of a rollout that are learned from, in steps."""
        flat, lay = laying(self.layout, self.pad_id, self.images)
        rows = Used(rollout)
        are_shared = self.shares_prompts is not None and self.shares_prompts()
        shared = rows.shared() if are_shared else None
        return SampleStream(
            rows,
            partial(collate_rollout, lay=lay),
            rows_per_step=rows_per_update or max(1, len(rollout.used)),
            batch_size=self.batch_size or ROWS_PER_MICRO_BATCH,
            rank=self.machine.rank,
            world_size=self.machine.world_size,
            micro_batch_tokens=self.micro_batch_tokens,
            flat=flat,
            shared=shared,
            layout=self.layout,
            shuffle=self.training,
            seed=mix_seeds(self.machine.seed, number),
        )

    # Rollouts.

    def _rollout(self, epoch: int, place: InRollout) -> Rollout | None:
        """Rollout `place.number`, found or made; None: the epoch has no more prompts."""
        if self._opened is not None and self._opened[:2] == (epoch, place.number):
            return self._opened[2]
        rollout = self.supply.get(epoch, place)
        if rollout is None:
            return None
        self._opened = epoch, place.number, rollout
        self._log(rollout, place)
        return rollout

    def _log(self, rollout: Rollout, place: InRollout) -> None:
        """Record the metrics of a rollout when learning from it begins, once; a checkpoint in its middle holds them."""
        now = (place.number, self.machine.step)
        if place.updates or (self.training and self._logged == now):
            return
        self._logged = now
        for name, (total, count) in self.supply.maker.metrics(rollout).items():
            self.machine.record(name, total, count)
        if self.ahead is not None and self.training:
            ages = staleness(rollout, self.machine.step)
            self.machine.record("staleness/mean", float(ages.sum()), len(ages))
            self.machine.record("staleness/max", float(ages.max(initial=0)), 1)


def nothing_learned(source: StepSource) -> NothingLearned:
    """What ends a run in which `source` gave no optimizer step."""
    if isinstance(source, RolloutSource) and source.unlearned.count:
        return source.unlearned.error(f"all of the run ({counted(source.unlearned.count, 'rollout')})")
    return NothingLearned(
        f"nothing was learned: {type(source).__name__} gave no optimizer step in any epoch; expected at least one"
    )


def num_updates(source: StepSource, samples: int, rows_per_update: int | None, passes: int) -> int | None:
    """Optimizer steps of an epoch over `source` of prompts, of which every step becomes a rollout; None: it does not say.

    They are as many as there are if no row is dropped.

    Args:
        samples: completions per prompt.
        rows_per_update: of an optimizer step; None: all rows of a rollout.
        passes: over each rollout.
    """
    if rows_per_update is None:
        steps = source.num_steps()
        return None if steps is None else steps * passes
    rows = None
    if isinstance(source, SampleStream):
        rows = len(source), source.rows_per_step
    elif isinstance(source, LoaderSteps):
        rows = source.num_rows()
    if rows is None:
        return None
    prompts, per_rollout = rows
    full, rest = divmod(prompts, per_rollout)
    updates = full * math.ceil(per_rollout * samples / rows_per_update) + math.ceil(rest * samples / rows_per_update)
    return passes * updates
