"""Rollouts in their turn: each is found on the disk, or made, some of it while the one before is learned from."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llm_trainer.data.rollout_ahead import SCORED, Ahead, is_same_ahead, mixed, origin
from llm_trainer.data.rollout_making import Making
from llm_trainer.data.rollout_prompts import Prompt, PromptSource, Taken
from llm_trainer.data.rollout_store import RolloutError, RolloutFolder, Stored, verified
from llm_trainer.data.rollouts import Maker, Rollout
from llm_trainer.data.stream import SampleStream
from llm_trainer.machine import Machine
from llm_trainer.position import InRollout
from llm_trainer.state import Stopped

ROWS_PER_PART = 64  # of a default part, at most: what a kill loses of a rollout


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
class RolloutSupply:
    """Says which rollout comes next, and finds or makes it. What it keeps is in every checkpoint.

    Args:
        prompts: takes them from their source.
        maker: makes rollouts.
        machine: of the run.
        training: False: evaluation.
        samples: completions per prompt, as far as is known before they are there.
        prompts_per_part: of a rollout, which a kill can lose of it per process; None: few, and a part for every process.
        keep_rollouts: all of them; else those that no checkpoint needs are removed.
        rollouts: folder of stored rollouts of another run, which are learned from in place of new ones.
        fits: raises an error if such a rollout cannot be learned from; None: any can.
        before: called by all processes before a rollout of the training is looked for and made, and weights are asked for;
            by the same step and weights it does the same, or nothing the second time. None: nothing is to be done.
        ahead: makes each rollout while the one before is learned from; None: they take turns.
    """

    prompts: PromptSource
    maker: Maker
    machine: Machine
    _: KW_ONLY
    training: bool = True
    samples: int = 1
    prompts_per_part: int | None = None
    keep_rollouts: bool = False
    rollouts: str | None = None
    fits: Callable[[Rollout], None] | None = None
    before: Callable[[], None] | None = None
    ahead: Ahead | None = None

    def __post_init__(self) -> None:
        folder = self.machine.save_dir / "rollouts"
        if not self.training:
            folder = folder / "evaluation"
        self._folder = RolloutFolder(folder, self.machine)
        self._following: _Following | None = None
        self._begun: dict[str, Any] | None = None  # `number` and `made_of` of the rollout that was begun ahead last
        # `epoch`, `number` and `step` of the rollout that would have been begun ahead if the run went on behind `max_steps`.
        self._held_back: dict[str, int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """What the source of prompts must remember, and what was begun ahead."""
        state = self.prompts.source.state_dict() if self._following is None else self._following.of_prompts
        ahead = {"begun": self._begun, "held_back": self._held_back}
        return {**state, **{name: value for name, value in ahead.items() if value is not None}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the one that gave `state`."""
        self.stop()
        self.prompts.source.load_state_dict(state)
        self._begun = None if self.ahead is None else state.get("begun")
        self._held_back = None if self.ahead is None else state.get("held_back")

    def stop(self) -> None:
        """End what is done meanwhile: a rollout that is made ahead stays on the disk as far as it is made."""
        if self.ahead is not None and self.training:
            self.ahead.stop()
        self._following = None

    def get(self, epoch: int, place: InRollout) -> Rollout | None:
        """Rollout `place.number`, all of it; None: the epoch has no more prompts.

        Raises:
            Stopped: a process was asked to stop while it was made; on all of them.
            RolloutError: it must be on the disk, and is not there, or damaged.
        """
        if self.rollouts is not None and self.training:
            return self._given(Path(self.rollouts), epoch, place)
        if place.updates:
            return self._under_way(epoch, place)
        return self._found_or_made(epoch, place)

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
        making.make_parts_together()
        return self._finished(making, wanted.made_of.get("weights"))

    def _look_up(self, epoch: int, place: InRollout, step: int) -> _Wanted:
        """What the rollout is made of that will be learned from at `step`, and what of it is on the disk."""
        number = place.number
        if self.training and number == 0 and self.machine.begins_anew:
            self._folder.set_all_aside()
        stored = self._find(number) if self.training else None
        if not self.training:  # what rewards it may be anything by now
            self._folder.set_aside(number, keep=False)
        as_stored = None if stored is None else stored.after
        taken = self.prompts.take(epoch, place.position, as_stored)
        if taken is None:
            return _Wanted(epoch, place, None, {}, None)
        if self.training and self.before is not None and step == self.machine.step:
            self.before()
        made_of = self._made_of(epoch, place, taken.prompts, step)
        if stored is not None and not self._is_same(number, stored, made_of):
            differ = different(stored.made_of, made_of)
            stored = None
            self._set_aside(number, f"was made with other {' and '.join(differ)}")
            if isinstance(self.prompts.source, SampleStream):  # as many as a step has now
                taken = self.prompts.take(epoch, place.position) or taken
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
        if self.training:
            self._say_if_held_back(wanted)
        facts = {"made_of": made_of, "after": wanted.taken.after, "parts": parts}
        making = Making(self._folder, self.maker, self.machine, number, wanted.taken.prompts, facts, self.training)
        making.begin()
        return making

    def _finished(self, making: Making, weights: str | None) -> Rollout:
        """A rollout of which this process has made its parts; `weights`: the hash of those that score it, in training.

        Raises:
            Stopped: a process was asked to stop; on all of them.
        """
        if self.ahead is None or not self.training:
            return making.finish()
        scored = {SCORED: weights} if "version" in making.facts["made_of"] else {}
        return making.finish(scored, self.ahead.max_staleness)

    # Rollouts that are made ahead.

    def look_ahead(self, epoch: int, place: InRollout, left: int) -> None:
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
        if left > ahead.max_staleness:
            return
        if is_last:
            if self._held_back is None or self._held_back["number"] != place.number:
                self._held_back = {"epoch": epoch, "number": place.number, "step": machine.step}
            return
        if any(machine.gather(machine.stop_requested())):
            raise Stopped  # a step later these weights would be gone, and nothing made by them
        of_prompts = self.prompts.source.state_dict()
        wanted = self._look_up(epoch, place, machine.step + left)
        making = None if wanted.taken is None else self._begin(wanted)
        self._following = _Following(wanted, making, of_prompts)
        if making is not None:
            self._begun = {"number": place.number, "made_of": origin(making.facts["made_of"])}
            ahead.start(making)
        elif wanted.stored is not None:
            self._begun = {"number": place.number, "made_of": origin(wanted.stored.made_of)}

    def _say_if_held_back(self, wanted: _Wanted) -> None:
        """Say so if a longer run would have begun a rollout earlier: this one ended by `max_steps`, and was extended."""
        held, self._held_back = self._held_back, None
        if held is None or (held["epoch"], held["number"]) != (wanted.epoch, wanted.place.number):
            return  # the first of an epoch is never begun ahead
        self.machine.say(
            f"WARNING: rollout {held['number']} is made with the weights of step {self.machine.step}; a run that did not end "
            f"by max_steps before would have begun it with those of step {held['step']}, ahead of learning. From here on this "
            f"run is not bit-identical to such a one"
        )

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
        """What tells a rollout from any other one; one of an evaluation is never looked for."""
        if not self.training:
            return self._place_of(epoch, place, step)
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


def different(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What a rollout was made of otherwise than is wanted, in words."""
    found = [name for name in wanted if there.get(name) != wanted[name]]
    if "settings" in found:
        ours, theirs = wanted["settings"], there.get("settings", {})
        names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
        found[found.index("settings")] = f"settings ({', '.join(names)})"
    return found
