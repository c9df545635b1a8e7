"""Where the steps of reinforcement learning come from: rollouts that are found or made, and the updates on each."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from llm_trainer.data.collate import laying
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.rollout_ahead import SCORED, Ahead, is_same_ahead, mixed, origin
from llm_trainer.data.rollout_making import Making, staleness
from llm_trainer.data.rollout_prompts import Prompt, PromptSource, Taken
from llm_trainer.data.rollout_store import RolloutError, RolloutFolder, Stored, verified
from llm_trainer.data.rollouts import Maker, Rollout, Used, collate_rollout
from llm_trainer.data.stream import RowOfStep, SampleStream, StepSource, mix_seeds
from llm_trainer.layout import Layout
from llm_trainer.machine import Machine
from llm_trainer.position import InRollout, Position
from llm_trainer.state import MicroBatch, Stopped

ROWS_PER_PART = 64  # of a default part, at most: what a kill loses of a rollout
ROWS_PER_MICRO_BATCH = 8  # where neither a token budget nor anybody says it


class _Wanted(NamedTuple):
    """A rollout that is to be learned from, and what there is of it.

    Attributes:
        epoch: of its prompts.
        place: where it begins.
        taken: its prompts; None: the epoch has no more.
        made_of: what it is made of.
        stored: what is on the disk of it; None: nothing.
    """

    epoch: int
    place: InRollout
    taken: Taken | None
    made_of: dict[str, Any]
    stored: Stored | None


class _Following(NamedTuple):
    """The rollout after the one that is learned from.

    Attributes:
        wanted: which it is.
        making: makes it; None: it is on the disk, or there is none.
        of_prompts: the state of the source of prompts before its prompts were taken.
    """

    wanted: _Wanted
    making: Making | None
    of_prompts: dict[str, Any]


@dataclass(eq=False, repr=False)
class RolloutSource:
    """Steps on rollouts: it finds or makes rollout n, then yields its updates.

    A rollout has the prompts of one step of `source`. Its rows are gone through `passes` times, each time in another order,
    `rows_per_update` at a time. A position is an `InRollout`.

    Args:
        source: of prompts: a `SampleStream`, or steps over a loader of the user.
        maker: makes rollouts.
        machine: of the run.
        training: False: evaluation; one pass, in order.
        samples: completions per prompt, as far as is known before they are there.
        passes: over each rollout.
        rows_per_update: of an optimizer step, over all ranks; None: all of a rollout.
        batch_size: rows of a micro-batch where there is no token budget.
        prompts_per_part: of a rollout, which a kill can lose of it per process; None: few, and a part for every process.
        pad_id: token that pads rows.
        keep_rollouts: all of them; else those that no checkpoint needs are removed.
        rollouts: folder of stored rollouts of another run, which are learned from in place of new ones.
        fits: raises an error if such a rollout cannot be learned from; None: any can.
        shares_prompts: says, when a rollout is there, whether the trainer runs the prompt of a group once per micro-batch, so
            that a token budget counts it once; None: it does not.
        before: called by all processes before a rollout of the training is looked for and made, and weights are asked for;
            by the same step and weights it does the same, or nothing the second time. None: nothing is to be done.
        needs_ids: False: environments begin the conversations, and the batches of a loader need not have prompts.
        ahead: makes each rollout while the one before is learned from; None: they take turns.
    """

    source: StepSource
    maker: Maker
    machine: Machine
    _: KW_ONLY
    training: bool = True
    samples: int = 1
    passes: int = 1
    rows_per_update: int | None = None
    batch_size: int | None = None
    prompts_per_part: int | None = None
    pad_id: int = 0
    keep_rollouts: bool = False
    rollouts: str | None = None
    fits: Callable[[Rollout], None] | None = None
    shares_prompts: Callable[[], bool] | None = None
    before: Callable[[], None] | None = None
    needs_ids: bool = True
    ahead: Ahead | None = None

    def __post_init__(self) -> None:
        self.micro_batch_tokens: int | Literal["auto"] | None = self.source.micro_batch_tokens
        self._prompts = PromptSource(self.source, self.machine, self.needs_ids)
        self.source = self._prompts.source
        folder = self.machine.save_dir / "rollouts"
        if not self.training:
            folder = folder / "evaluation"
            self.passes, self.rows_per_update = 1, None
        self._folder = RolloutFolder(folder, self.machine)
        self._opened: tuple[int, int, Rollout] | None = None  # epoch and number of it
        self._logged: tuple[int, int] | None = None  # number and step of the rollout whose metrics were recorded last
        self._cut_before: tuple[int, int | None] | None = None  # passes and rows per update of a checkpoint
        self._following: _Following | None = None
        self._begun: dict[str, Any] | None = None  # `number` and `made_of` of the rollout that was begun ahead last

    # What a source says.

    @property
    def layout(self) -> Layout:
        """How rows are laid out."""
        return self.machine.layout

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
        return f"{prompts} x {self.samples} completions per rollout; {passes}, {update} per step{turns}"

    def size(self) -> int | None:
        return self.source.size()

    def num_steps(self) -> int | None:
        return num_updates(self.source, self.samples, self.rows_per_update, self.passes)

    def state_dict(self) -> dict[str, Any]:
        """What the source of prompts must remember, and how rollouts are cut into updates."""
        passes, rows_per_update = self._cut_before or (self.passes, self.rows_per_update)
        of_prompts = self.source.state_dict() if self._following is None else self._following.of_prompts
        state = {**of_prompts, "passes": passes, "rows_per_update": rows_per_update}
        return state if self._begun is None else {**state, "begun": self._begun}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the source that gave `state`; a rollout under way is learned to its end as it was begun."""
        self.stop()
        self.source.load_state_dict(state)
        self._begun = None if self.ahead is None else state.get("begun")
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
        if self.ahead is not None and self.training:
            self.ahead.stop()
        self._following = None

    # Steps.

    def steps(self, epoch: int, position: Position = 0) -> Iterator[tuple[list[MicroBatch], InRollout]]:
        """
        Raises:
            Stopped: a process was asked to stop while a rollout was made; on all of them.
            RolloutError: a stored rollout that is needed is not there, or damaged.
        """
        place = InRollout.at(position)
        if not self.training:
            self._opened = None  # of an evaluation before, with other weights
            if self.ahead is not None:
                self.ahead.wait()  # what draws is to get other weights; all ranks meet before it does
        while True:
            rollout = self._rollout(epoch, place)
            if rollout is None:
                return
            yield from self._updates(rollout, epoch, place)
            place = InRollout(rollout.after, place.number + 1)

    def _updates(self, rollout: Rollout, epoch: int, place: InRollout) -> Iterator[tuple[list[MicroBatch], InRollout]]:
        """The updates of a rollout that are left."""
        passes, rows_per_update = self._cut(place)
        stream = self._stream(place.number, rollout, rows_per_update)
        per_pass = stream.num_steps()
        if not per_pass:  # nothing of it can be learned from
            return
        done = place.updates
        first, before = divmod(done, per_pass)
        for turn in range(first, passes):
            for micro_batches, _ in stream.steps(turn, before * stream.rows_per_step):
                self._look_ahead(epoch, InRollout(rollout.after, place.number + 1), left=passes * per_pass - done)
                done += 1
                after = InRollout(place.position, place.number, done)
                if done == passes * per_pass:
                    after = InRollout(rollout.after, place.number + 1)
                yield micro_batches, after
            before = 0

    def _cut(self, place: InRollout) -> tuple[int, int | None]:
        """Passes and rows per update of a rollout: as it was begun."""
        if place.updates == 0:
            self._cut_before = None
        return self._cut_before or (self.passes, self.rows_per_update)

    def _stream(self, number: int, rollout: Rollout, rows_per_update: int | None) -> SampleStream:
        """The rows of a rollout that are learned from, in steps."""
        flat, lay = laying(self.layout, self.pad_id)
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
        if self.rollouts is not None and self.training:
            rollout = self._given(Path(self.rollouts), epoch, place)
        elif place.updates:
            rollout = self._under_way(epoch, place)
        else:
            rollout = self._found_or_made(epoch, place)
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
        for name, (total, count) in self.maker.metrics(rollout).items():
            self.machine.record(name, total, count)
        if self.ahead is not None and self.training:
            ages = staleness(rollout, self.machine.step)
            self.machine.record("staleness/mean", float(ages.sum()), len(ages))
            self.machine.record("staleness/max", float(ages.max(initial=0)), 1)

    def _found_or_made(self, epoch: int, place: InRollout) -> Rollout | None:
        """The rollout that the weights, the seed and the prompts of this moment make, from the disk if it is there."""
        if self._following is not None:
            return self._collected(self._following)
        wanted = self._look_up(epoch, place, self.machine.step)
        if wanted.taken is None:
            return None
        making = self._begin(wanted)
        if making is None:
            return Rollout(self._folder.path(place.number))
        making.make_parts()
        return self._finished(making, wanted.made_of["weights"])

    def _look_up(self, epoch: int, place: InRollout, step: int) -> _Wanted:
        """What the rollout is made of that will be learned from at `step`, and what of it is on the disk."""
        number = place.number
        if self.training and number == 0 and self.machine.begins_anew:
            self._folder.set_all_aside()
        stored = self._find(number) if self.training else None
        if not self.training:  # what rewards it may be anything by now
            self._folder.set_aside(number, keep=False)
        as_stored = None if stored is None else stored.after
        taken = self._prompts.take(epoch, place.position, as_stored)
        if taken is None:
            return _Wanted(epoch, place, None, {}, None)
        if self.training and self.before is not None and step == self.machine.step:
            self.before()
        made_of = self._made_of(epoch, place, taken.prompts, step)
        if stored is not None and not self._is_same(number, stored, made_of):
            differ = [name for name in made_of if stored.made_of.get(name) != made_of[name]]
            stored = None
            self._set_aside(number, f"was made with other {' and '.join(differ)}")
            if isinstance(self.source, SampleStream):  # as many as a step has now
                taken = self._prompts.take(epoch, place.position) or taken
            made_of = self._made_of(epoch, place, taken.prompts, step)
        return _Wanted(epoch, place, taken, made_of, stored)

    def _begin(self, wanted: _Wanted) -> Making | None:
        """Begin to make what is not on the disk of a rollout; None: all of it is."""
        assert wanted.taken is not None
        number, stored, made_of = wanted.place.number, wanted.stored, wanted.made_of
        if stored is not None and stored.is_finished:
            return None
        if self.training and not self.keep_rollouts:
            self._folder.prune()
        if stored is None:
            parts = self._parts(len(wanted.taken.prompts))
        else:
            parts = stored.parts
        begun = self._begun_as(number)
        if begun is not None and begun != made_of:  # by weights that are gone
            made_of, missing = mixed(stored, made_of, self.machine.step)
            if missing:
                self.machine.say(
                    f"WARNING: rollout {number} was being made with the weights of step {begun['version']} when the run was "
                    f"stopped; {missing} made with those of step {self.machine.step}. From here on the run is not "
                    f"bit-identical to one that was never stopped; its rows say which weights wrote them"
                )
        facts = {"made_of": made_of, "after": wanted.taken.after, "parts": parts}
        making = Making(self._folder, self.maker, self.machine, number, wanted.taken.prompts, facts, self.training)
        making.begin()
        return making

    def _finished(self, making: Making, weights: str) -> Rollout:
        """A rollout of which this process has made its parts; `weights`: the hash of those that score it.

        Raises:
            Stopped: a process was asked to stop; on all of them.
        """
        if self.ahead is None or not self.training:
            return making.finish()
        scored = {SCORED: weights} if "version" in making.facts["made_of"] else {}
        return making.finish(scored, self.ahead.max_staleness)

    # Rollouts that are made ahead.

    def _look_ahead(self, epoch: int, place: InRollout, left: int) -> None:
        """Begin the rollout at `place` as soon as its weights will not be too old; asked before every update of the one before.

        Args:
            left: updates until it is learned from, the coming one included.

        Raises:
            Stopped: a process was asked to stop, when it would begin; on all of them.
        """
        ahead, machine = self.ahead, self.machine
        if ahead is None or not self.training or self.rollouts is not None:
            return
        if self._following is not None:
            return self._bring_weights(self._following.making)
        is_last = machine.max_steps is not None and machine.step + left >= machine.max_steps
        if left > ahead.max_staleness or is_last:
            return
        if any(machine.gather(machine.stop_requested())):
            raise Stopped  # a step later these weights would be gone, and nothing made by them
        of_prompts = self.source.state_dict()
        wanted = self._look_up(epoch, place, machine.step + left)
        making = None if wanted.taken is None else self._begin(wanted)
        self._following = _Following(wanted, making, of_prompts)
        if making is not None:
            self._begun = {"number": place.number, "made_of": origin(making.facts["made_of"])}
            ahead.start(making)
        elif wanted.stored is not None:
            self._begun = {"number": place.number, "made_of": origin(wanted.stored.made_of)}

    def _bring_weights(self, making: Making | None) -> None:
        """Let what makes the rollout go on with the weights of now, if it can take them meanwhile and is not done."""
        if making is None or not self.maker.updates_in_flight or self.ahead is None:
            return
        if any(self.machine.gather(self.ahead.is_busy)):
            making.bring_weights()

    def _collected(self, following: _Following) -> Rollout | None:
        """The rollout that was made ahead, when it is to be learned from; None: the epoch has no more prompts.

        Raises:
            Stopped: a process was asked to stop; on all of them.
        """
        assert self.ahead is not None
        wanted, making = following.wanted, following.making
        rollout = None
        if making is not None:
            with making.plan.timed("wait"):
                self.ahead.collect(self.machine)
            if self.before is not None:
                self.before()
            rollout = self._finished(making, self.machine.weights_hash())
        self._following = None  # not before: a checkpoint that is saved because all were asked to stop knows of it
        if making is None and wanted.taken is not None:
            return self._found_or_made(wanted.epoch, wanted.place)  # on the disk, if the weights of now have scored it
        return rollout

    def _begun_as(self, number: int) -> dict[str, Any] | None:
        """What a rollout was begun ahead with; None: it was not, as far as this run knows."""
        if self._begun is None or self._begun["number"] != number:
            return None
        return self._begun["made_of"]

    def _is_same(self, number: int, stored: Stored, made_of: Mapping[str, Any]) -> bool:
        """Whether what is on the disk is the rollout that is wanted, or a part of it."""
        if stored.made_of == made_of:
            return True
        return self.ahead is not None and is_same_ahead(stored, made_of, self._begun_as(number))

    def _find(self, number: int) -> Stored | None:
        try:
            return self._folder.find(number)
        except RolloutError as error:  # the weights are there that made it
            self._set_aside(number, str(error))
            return None

    def _set_aside(self, number: int, why: str) -> None:
        """Make a rollout anew, and say so if one that was finished lies in its place."""
        path = self._folder.path(number)
        target = self._folder.set_aside(number, keep=self.training)
        if target is not None:
            self.machine.say(f"WARNING: {path} {why}; it was moved to {target} and is made anew")

    def _made_of(self, epoch: int, place: InRollout, prompts: Sequence[Prompt], step: int) -> dict[str, Any]:
        printed = 0
        for prompt in prompts:
            printed = prompt.fingerprint(printed)
        facts = {"prompts": printed, "weights": self.machine.weights_hash()}
        if step != self.machine.step:
            facts["version"] = self.machine.step
        return self._place_of(epoch, place, step) | facts

    def _place_of(self, epoch: int, place: InRollout, step: int) -> dict[str, Any]:
        """What a rollout is made of, as far as it can be said when the weights have gone on."""
        settings = json.loads(json.dumps(self.maker.settings(self.training)))  # as it comes back from a file
        at = {"seed": self.machine.seed, "epoch": epoch, "position": place.position, "step": step}
        return at | {"training": self.training, "settings": settings}

    def _parts(self, prompts: int) -> list[tuple[int, int]]:
        """Prompts `[first, last)` of each part: a part for every process, if there are so many, and none too large."""
        size = self.prompts_per_part
        if size is None:
            size = min(math.ceil(prompts / self.machine.num_processes), max(1, ROWS_PER_PART // self.samples))
        return list(pairwise([*range(0, prompts, size), prompts]))

    def _under_way(self, epoch: int, place: InRollout) -> Rollout:
        """The rollout in whose middle a checkpoint was saved.

        Raises:
            RolloutError: it is not there, or another one.
        """
        number, path = place.number, self._folder.path(place.number)
        fix = "put it back, or go on from an earlier checkpoint (resume: PATH), which makes it again"
        stored = self._folder.find(number)
        if stored is None or not stored.is_finished:
            raise RolloutError(
                f"{path}: not there; expected the rollout on which {place.updates} updates had been done when the checkpoint "
                f"was saved; {fix}"
            )
        expected = self._place_of(epoch, place, self.machine.step - place.updates)
        del expected["settings"]  # new ones are for the next rollout
        differ = [name for name in expected if stored.made_of.get(name) != expected[name]]
        if differ:
            raise RolloutError(
                f"{path}: a rollout of another run or another moment ({', '.join(differ)} differ); expected the one on which "
                f"{place.updates} updates had been done when the checkpoint was saved; {fix}"
            )
        return Rollout(path)

    def _given(self, folder: Path, epoch: int, place: InRollout) -> Rollout | None:
        """A stored rollout of another run; None: it had none after those before.

        Raises:
            RolloutError: there is none at all, or this one is damaged.
        """
        if (folder / "rollouts").is_dir():  # a run's
            folder = folder / "rollouts"
        path = folder / f"{place.number:08d}"
        if not path.is_dir():
            if place.number == 0:
                raise RolloutError(
                    f"rollouts: found no {path}; expected the folder save_dir/rollouts of a run, which had kept all of them "
                    f"(keep_rollouts: true)"
                )
            self.machine.say(f"rollouts: {folder} has no more than {place.number} rollouts")
            return None
        meta = verified(path)
        rollout = Rollout(path)
        if self.fits is not None:
            self.fits(rollout)
        return rollout if meta["made_of"]["epoch"] == epoch else None


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
