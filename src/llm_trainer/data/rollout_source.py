"""Where the steps of reinforcement learning come from: rollouts that are found or made, and the updates on each."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from llm_trainer.data.collate import laying
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.rollout_prompts import Prompt, PromptSource
from llm_trainer.data.rollout_store import AnyAsked, RolloutError, RolloutFolder, Stored, verified
from llm_trainer.data.rollouts import LEFT_OUT, Maker, Plan, Rollout, Used, account, checked, collate_rollout
from llm_trainer.data.stream import RowOfStep, SampleStream, StepSource, mix_seeds
from llm_trainer.layout import Layout
from llm_trainer.machine import Machine
from llm_trainer.position import InRollout, Position
from llm_trainer.state import MicroBatch

ROWS_PER_PART = 64  # of a default part, at most: what a kill loses of a rollout
ROWS_PER_MICRO_BATCH = 8  # where neither a token budget nor anybody says it
EVALUATION = 0xE7A1  # what tells the seeds of evaluations from those of training


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
        return f"{prompts} x {self.samples} completions per rollout; {passes}, {update} per step"

    def size(self) -> int | None:
        return self.source.size()

    def num_steps(self) -> int | None:
        return num_updates(self.source, self.samples, self.rows_per_update, self.passes)

    def state_dict(self) -> dict[str, Any]:
        """What the source of prompts must remember, and how rollouts are cut into updates."""
        passes, rows_per_update = self._cut_before or (self.passes, self.rows_per_update)
        return {**self.source.state_dict(), "passes": passes, "rows_per_update": rows_per_update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the source that gave `state`; a rollout under way is learned to its end as it was begun."""
        self.source.load_state_dict(state)
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
        while True:
            rollout = self._rollout(epoch, place)
            if rollout is None:
                return
            yield from self._updates(rollout, place)
            place = InRollout(rollout.after, place.number + 1)

    def _updates(self, rollout: Rollout, place: InRollout) -> Iterator[tuple[list[MicroBatch], InRollout]]:
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

    def _found_or_made(self, epoch: int, place: InRollout) -> Rollout | None:
        """The rollout that the weights, the seed and the prompts of this moment make, from the disk if it is there."""
        number = place.number
        if self.training and number == 0 and self.machine.begins_anew:
            self._folder.set_all_aside()
        stored = self._find(number) if self.training else None
        if not self.training:  # what rewards it may be anything by now
            self._folder.set_aside(number, keep=False)
        as_stored = None if stored is None else stored.after
        taken = self._prompts.take(epoch, place.position, as_stored)
        if taken is None:
            return None
        if self.training and self.before is not None:
            self.before()
        made_of = self._made_of(epoch, place, taken.prompts)
        if stored is not None and stored.made_of != made_of:
            differ = [name for name in made_of if stored.made_of.get(name) != made_of[name]]
            stored = None
            self._set_aside(number, f"was made with other {' and '.join(differ)}")
            if isinstance(self.source, SampleStream):  # as many as a step has now
                taken = self._prompts.take(epoch, place.position) or taken
            made_of = self._made_of(epoch, place, taken.prompts)
        if stored is not None and stored.is_finished:
            return Rollout(self._folder.path(number))
        if self.training and not self.keep_rollouts:
            self._folder.prune()
        parts = self._parts(len(taken.prompts)) if stored is None else stored.parts
        return self._made(number, taken.prompts, {"made_of": made_of, "after": taken.after, "parts": parts})

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

    def _made_of(self, epoch: int, place: InRollout, prompts: Sequence[Prompt]) -> dict[str, Any]:
        printed = 0
        for prompt in prompts:
            printed = prompt.fingerprint(printed)
        return self._place_of(epoch, place, self.machine.step) | {
            "prompts": printed,
            "weights": self.machine.weights_hash(),
        }

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

    def _made(self, number: int, prompts: Sequence[Prompt], facts: dict[str, Any]) -> Rollout:
        """
        Raises:
            Stopped: a process was asked to stop; on all of them.
        """
        machine, parts = self.machine, facts["parts"]
        sign = self._folder.stop_sign(number)
        stop = AnyAsked(machine, sign)
        purpose = () if self.training else (EVALUATION,)
        plan = Plan(number, mix_seeds(machine.seed, number, *purpose), machine.step, self.training, stop)

        # 1. the parts that are missing, each in one process
        missing = self._folder.begin(number, facts)
        with plan.timed("sync"):
            self.maker.begin(plan)
        is_stopped = False
        try:
            for part in missing[machine.process_number :: machine.num_processes]:
                first, last = parts[part]
                rows = None if stop() else self.maker.make(plan, prompts[first:last])
                if rows is None:
                    is_stopped = True
                    sign.touch()
                    break
                self._folder.write_part(number, part, [checked(row) for row in rows])
        except BaseException:
            sign.touch()  # the others do not wait for it
            raise
        with plan.timed("wait"):
            self._folder.wait_for_parts(number, len(parts), lambda: is_stopped or stop())

        # 2. joined, and what is known of all of them only
        folder, joined = self._folder.join(number, len(parts))
        with plan.timed("score"):
            rollout = Rollout(folder, joined)
            finished = self.maker.finish(rollout)
        reasons, left_out, ledger = account(rollout, finished)
        columns = dict(finished.columns) | {LEFT_OUT: list(left_out[:, None])}
        own = {name: facts[name] for name in ("made_of", "after")}
        path = self._folder.finish(number, columns, joined, own | {"reasons": reasons, "ledger": ledger})
        self._record_times(plan, ledger["sampled"])
        return Rollout(path)

    def _record_times(self, plan: Plan, sampled: int) -> None:
        """How long the phases have taken this process, and how many tokens all have sampled meanwhile."""
        for phase, seconds in plan.seconds.items():
            self.machine.record(f"seconds/{phase}", seconds)
        if plan.seconds.get("generate"):
            self.machine.record("tokens_per_second/generate", sampled, plan.seconds["generate"])

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
        path = folder / f"{place.number:08d}"
        if not path.is_dir():
            if place.number == 0:
                raise RolloutError(
                    f"rollouts: found no {path}; expected the folder save_dir/rollouts of a run that kept them"
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
