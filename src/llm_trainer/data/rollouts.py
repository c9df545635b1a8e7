"""Rollouts: what a policy has written, as data on disk. Learning from one is a `SampleStream` over it.

A rollout is a token store (`data.encode.store`) with one row per completion. It is a function of the weights, the seed and
the prompts, and is found again by them. Whoever makes one is a `Maker`; `RolloutSource` asks it for rollouts, keeps them on
disk, and yields the optimizer steps that are taken on each.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch

from llm_trainer.data.collate import laying, pad_right
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.kinds import Batch, LanguageSample, Lay
from llm_trainer.data.rollout_prompts import Prompt, PromptSource
from llm_trainer.data.rollout_store import AnyAsked, RolloutError, RolloutFolder, Row, Stored, verified
from llm_trainer.data.stream import RowOfStep, SampleStream, StepSource, mix_seeds
from llm_trainer.layout import Layout
from llm_trainer.machine import Machine
from llm_trainer.state import InRollout, MicroBatch, Position

FINISHES = ("stop", "length", "aborted", "error")  # how a completion ended: it is done, was cut, given up, has failed
# Columns of every rollout. One number per token of prompt AND completion where it says `[T]`, aligned like labels: the
# number at t is about the token AT t, and 0 where the policy did not write it.
COLUMNS: dict[str, type] = {
    "input_ids": np.uint32,  # [T]
    "trained": np.bool_,  # [T] the policy wrote it, and it may be learned from
    "group": np.int64,  # [1] number of the prompt in the rollout
    "sampled_logprobs": np.float32,  # [T] under the distribution that the token was drawn from
    "versions": np.int64,  # [2k] spans: first token, version of the weights that wrote from there on
    "finish": np.uint8,  # [1] index into FINISHES
    "rewards": np.float64,  # [F] one per reward function; NaN: it is missing, or does not apply
    "facts": np.uint8,  # the bytes of a JSON text: answer, the prompt's other columns, errors by reward function
}
LEFT_OUT = "left_out"  # [1] 0: learned from; else why not, as `meta.json` numbers the reasons
PER_ROW = ("group", "row_index", "finish", "rewards", LEFT_OUT)
NOT_IN_BATCHES = ("input_ids", "trained", "versions", "facts", LEFT_OUT)
NOTHING_WRITTEN, FAILED = "nothing was written", "the completion failed"  # why rows are dropped
ROWS_PER_PART = 64  # of a default part, at most: what a kill loses of a rollout
EVALUATION = 0xE7A1  # what tells the seeds of evaluations from those of training


def as_json(facts: Mapping[str, Any]) -> np.ndarray:
    """What the column `facts` holds; what JSON has no form for becomes text."""
    text = json.dumps(facts, ensure_ascii=False, default=str)
    return np.frombuffer(text.encode(), dtype=np.uint8)


class Rollout:
    """A rollout on disk, one row per completion: a `SampleDataset`.

    Args:
        folder: of the store.
        meta: its facts, while it is not finished.

    Attributes:
        lengths: `[rows]` tokens of prompt and completion.
        used: `[rows that are learned from]` their numbers.
        after: position of the prompts behind it.
    """

    def __init__(self, folder: Path, meta: dict[str, Any] | None = None) -> None:
        self.store = TokenStore(folder, meta)
        self.lengths: np.ndarray = np.diff(self.store["input_ids"].offsets)
        self.file_sizes = [len(self.lengths)]
        self.after: int = self.store.meta.get("after", 0)
        reasons = self.store.meta.get("reasons", [])
        left_out = np.zeros(len(self), dtype=np.uint8)
        if LEFT_OUT in self.store.columns:
            left_out = self.column(LEFT_OUT)
        masking = [number for number, (how, _) in enumerate(reasons, start=1) if how == "masked"]
        self.is_masked = np.isin(left_out, masking)
        self.used: np.ndarray = np.flatnonzero((left_out == 0) | self.is_masked)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`, counted over all rows, as its arrays by column; `trained` without what is masked."""
        row = {name: column[index] for name, column in self.store.columns.items()}
        row["row_index"] = np.array([index])
        if self.is_masked[index]:
            row["trained"] = np.zeros_like(row["trained"])
        return row

    def column(self, name: str) -> Any:
        """The whole of a column: `[rows]` or `[rows, F]` of what there is once per row, else `column[i]` is row i's array."""
        ragged = self.store[name]
        widths = set(np.diff(ragged.offsets).tolist())
        if name not in PER_ROW and widths != {1}:
            return ragged
        values = np.asarray(ragged.values).reshape(len(self), -1)
        return values[:, 0] if name != "rewards" else values

    def facts(self, index: int) -> dict[str, Any]:
        """What else is known of a row: `answer`, the prompt's other columns, errors by reward function."""
        return json.loads(self.store["facts"][index].tobytes())

    def place(self, index: int) -> str:
        """Where a row comes from, for messages."""
        return f"completion {index} of rollout {self.store.folder.name.partition('.')[0]}"

    @property
    def ledger(self) -> dict[str, Any]:
        """Where every token went that was sampled: `sampled` = `trained` + `environment` + `masked` + `dropped`."""
        return self.store.meta["ledger"]


class _Used:
    """The rows of a rollout that are learned from."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self.lengths = rollout.lengths[rollout.used]
        self.file_sizes = [len(self.lengths)]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self._rollout[int(self._rollout.used[index])]

    def place(self, index: int) -> str:
        return self._rollout.place(int(self._rollout.used[index]))


def collate_rollout(rows: Sequence[Row], lay: Lay) -> Batch:
    """A micro-batch of rows of a rollout, laid out as language rows are.

    Args:
        rows: as `Rollout` gives them.
        lay: `collate_flat`, or `collate_padded` with its pad_id.

    Returns:
        `input_ids`, `labels` (the ids where trained, else -100) and what else `lay` gives, padded `[B, T]` or flat
        `[1, N]`; every column with a number per token under its own name in the same layout, 0 on padding; `group [B]`,
        `row_index [B]`, `finish [B]`, `rewards [B, F]` and other columns with as many numbers in every row; further ones as
        lists of B tensors.
    """
    samples = []
    for row in rows:
        ids = row["input_ids"]
        samples.append(LanguageSample(input_ids=ids, trained=row["trained"], document_lengths=[len(ids)]))
    batch: Batch = dict(lay(samples))
    is_flat = "document_lengths" in batch
    for name in rows[0]:
        if name in NOT_IN_BATCHES:
            continue
        values = [row[name] for row in rows]
        is_per_token = all(len(row[name]) == len(row["input_ids"]) for row in rows)
        if name in PER_ROW or not is_per_token:
            batch[name] = _per_row(values)
        elif is_flat:
            batch[name] = torch.from_numpy(np.concatenate(values))[None]
        else:
            batch[name] = pad_right(values, 0, values[0].dtype.type)
    return batch


def _per_row(values: Sequence[np.ndarray]) -> Any:
    if len({len(value) for value in values}) > 1:
        return [torch.from_numpy(np.array(value)) for value in values]
    table = torch.from_numpy(np.stack(values))
    return table[:, 0] if table.shape[1] == 1 and values[0].dtype != np.float64 else table


class Finished(NamedTuple):
    """What `Maker.finish` adds to a rollout.

    Attributes:
        columns: name -> an array per row, `[T]` (one number per token) or of another length: `advantages`, `old_logprobs`.
        masked: reason -> `[rows]` bool: rows of which no token counts in the loss, but which are there as rows.
        dropped: reason -> `[rows]` bool: rows that no update sees. A row that is named twice is left out for the first
            reason.
    """

    columns: Mapping[str, Sequence[np.ndarray]]
    masked: Mapping[str, np.ndarray] = {}
    dropped: Mapping[str, np.ndarray] = {}


@dataclass(frozen=True)
class Plan:
    """What rollout is to be made.

    Attributes:
        number: of the rollout, counted over the run; of an evaluation, within it.
        seed: all its noise follows from it, and from the prompt's number, the sample's and the token's.
        version: of the weights: optimizer steps done.
        training: False: for an evaluation.
        stop: whether any process has been asked to stop; to be asked at every token.
        seconds: by phase, see `timed`.
    """

    number: int
    seed: int
    version: int
    training: bool
    stop: Callable[[], bool]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block as those of 'generate', 'reward', 'score', 'sync', ...: logged `seconds/<phase>`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


class Maker(Protocol):
    """What makes rollouts: `trainers/rollouts.py`."""

    def settings(self, training: bool) -> Mapping[str, Any]:
        """What a rollout depends on beside weights, seed and prompts, in JSON types: how completions are drawn, rewards."""

    def begin(self, plan: Plan) -> None:
        """All processes, before parts are made: bring the weights to whatever samples."""

    def make(self, plan: Plan, prompts: Sequence[Prompt]) -> Sequence[Row] | None:
        """The rows of some consecutive prompts, a part; called in one process, with other parts in others.

        They depend on nothing but weights, `plan.seed` and prompts. None: `plan.stop` has said so.
        """

    def finish(self, rollout: Rollout) -> Finished:
        """All processes, when all parts are there: further columns (a scoring pass, advantages); all get the same."""

    def metrics(self, rollout: Rollout) -> Mapping[str, tuple[float, float]]:
        """Name -> (sum, number of terms) of what is to be logged of a rollout, when learning from it begins."""


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

    def __post_init__(self) -> None:
        self.micro_batch_tokens: int | Literal["auto"] | None = self.source.micro_batch_tokens
        self._prompts = PromptSource(self.source, self.machine)
        folder = self.machine.save_dir / "rollouts"
        if not self.training:
            folder = folder / "evaluation"
        self._folder = RolloutFolder(folder, self.machine)
        self._opened: tuple[int, Rollout] | None = None  # its number
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
        return {**self._prompts.source.state_dict(), "passes": self.passes, "rows_per_update": self.rows_per_update}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the source that gave `state`; a rollout under way is learned to its end as it was begun."""
        self._prompts.source.load_state_dict(state)
        self._cut_before = state["passes"], state["rows_per_update"]
        self._opened = self._logged = None

    def recut(self, micro_batches: list[MicroBatch]) -> None:
        return None  # a seek is exact

    def rows_of_step(self, epoch: int, position: Position, micro_batches: list[MicroBatch]) -> list[list[RowOfStep]]:
        place = InRollout.at(position)
        if self._opened is None or self._opened[0] != place.number:  # the step before was its last
            return []
        stream = self._stream(*self._opened, self._cut(place)[1])
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
        return SampleStream(
            _Used(rollout),
            partial(collate_rollout, lay=lay),
            rows_per_step=rows_per_update or max(1, len(rollout.used)),
            batch_size=self.batch_size or 8,
            rank=self.machine.rank,
            world_size=self.machine.world_size,
            micro_batch_tokens=self.micro_batch_tokens,
            flat=flat,
            layout=self.layout,
            shuffle=self.training,
            seed=mix_seeds(self.machine.seed, number),
        )

    # Rollouts.

    def _rollout(self, epoch: int, place: InRollout) -> Rollout | None:
        """Rollout `place.number`, found or made; None: the epoch has no more prompts."""
        if self._opened is not None and self._opened[0] == place.number:
            return self._opened[1]
        if self.rollouts is not None and self.training:
            rollout = self._given(Path(self.rollouts), epoch, place)
        elif place.updates:
            rollout = self._under_way(epoch, place)
        else:
            rollout = self._found_or_made(epoch, place)
        if rollout is None:
            return None
        self._opened = place.number, rollout
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
        stored = self._find(number)
        as_stored = None if stored is None else stored.after
        taken = self._prompts.take(epoch, place.position, as_stored)
        if taken is None:
            return None
        made_of = self._made_of(epoch, place, taken.prompts)
        if stored is not None and stored.made_of != made_of:
            differ = [name for name in made_of if stored.made_of.get(name) != made_of[name]]
            stored = None
            self._set_aside(number, f"was made with other {' and '.join(differ)}")
            taken = self._prompts.take(epoch, place.position) or taken
            made_of = self._made_of(epoch, place, taken.prompts)
        if stored is not None and stored.is_finished:
            return Rollout(self._folder.path(number))
        if self.training and not self.keep_rollouts:
            self._folder.prune(*self.machine.checkpoint_steps())
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
        stop = AnyAsked(machine, self._folder.stop_sign(number))
        purpose = () if self.training else (EVALUATION,)
        plan = Plan(number, mix_seeds(machine.seed, number, *purpose), machine.step, self.training, stop)

        # 1. the parts that are missing, each in one process
        missing = self._folder.begin(number, facts)
        with plan.timed("sync"):
            self.maker.begin(plan)
        try:
            for part in missing[machine.process_number :: machine.num_processes]:
                first, last = parts[part]
                rows = None if stop() else self.maker.make(plan, prompts[first:last])
                if rows is None:
                    break
                self._folder.write_part(number, part, [_checked(row) for row in rows])
        except BaseException:
            self._folder.stop_sign(number).touch()  # the others do not wait for it
            raise
        self._folder.wait_for_parts(number, len(parts), stop)

        # 2. joined, and what is known of all of them only
        folder, joined = self._folder.join(number, len(parts))
        with plan.timed("score"):
            finished = self.maker.finish(Rollout(folder, joined))
        reasons, left_out, ledger = account(Rollout(folder, joined), finished)
        columns = dict(finished.columns) | {LEFT_OUT: list(left_out[:, None])}
        own = {name: facts[name] for name in ("made_of", "after")}
        path = self._folder.finish(number, columns, joined, own | {"reasons": reasons, "ledger": ledger})
        for phase, seconds in plan.seconds.items():
            machine.record(f"seconds/{phase}", seconds)
        return Rollout(path)

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
            return None
        meta = verified(path)
        return Rollout(path) if meta["made_of"]["epoch"] == epoch else None


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
    if not isinstance(source, SampleStream):
        return None  # how many prompts a batch of a loader has is not known
    per_rollout, prompts = source.rows_per_step, len(source)
    sizes = [min(per_rollout, prompts - first) for first in range(0, prompts, per_rollout)]
    return passes * sum(math.ceil(size * samples / rows_per_update) for size in sizes)


def _checked(row: Row) -> Row:
    """A row with its columns in their types.

    Raises:
        ValueError: a column is missing, or has not a number per token.
    """
    length = len(row["input_ids"])
    for name in COLUMNS:
        found = len(row[name]) if name in row else None
        if found is None or (name in ("trained", "sampled_logprobs") and found != length):
            raise ValueError(
                f"a completion of {length} tokens, prompt included: column {name} is {found} long; expected every column of "
                f"COLUMNS, and {length} numbers in those per token"
            )
    return {name: np.asarray(values, dtype=COLUMNS.get(name)) for name, values in row.items()}


def account(rollout: Rollout, finished: Finished) -> tuple[list[tuple[str, str]], np.ndarray, dict[str, Any]]:
    """Why rows are left out, `[rows]` the number of the reason (from 1; 0: none), and the ledger of all tokens.

    Raises:
        ValueError: a column is not one array per row.
    """
    rows = len(rollout)
    for name, values in finished.columns.items():
        if len(values) != rows:
            raise ValueError(f"column {name} of a rollout: found {len(values)} arrays, expected {rows}, one per row")
    # 1. tokens by row: sampled from the first one on that the policy wrote, of which those of an environment are not its own
    trained, sampled = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    for row in range(rows):
        trained[row] = rollout.store["trained"][row].sum()
        spans = rollout.store["versions"][row]
        sampled[row] = rollout.lengths[row] - (spans[0] if len(spans) else rollout.lengths[row])
    # 2. the first reason of each row
    finish = rollout.column("finish")
    dropped = {FAILED: finish >= FINISHES.index("aborted"), NOTHING_WRITTEN: trained == 0, **finished.dropped}
    reasons = [("dropped", why) for why in dropped] + [("masked", why) for why in finished.masked]
    left_out = np.zeros(rows, dtype=np.uint8)
    for number, is_so in enumerate([*dropped.values(), *finished.masked.values()], start=1):
        left_out[(left_out == 0) & np.asarray(is_so, dtype=bool)] = number
    # 3. where the tokens are
    used = left_out == 0
    ledger: dict[str, Any] = {
        "rows": rows,
        "sampled": int(sampled.sum()),
        "trained": int(trained[used].sum()),
        "environment": int((sampled - trained)[used].sum()),
        "masked": {},
        "dropped": {},
    }
    for number, (how, why) in enumerate(reasons, start=1):
        if (left_out == number).any():
            ledger[how][why] = int(sampled[left_out == number].sum())
    everything = (
        ledger["trained"] + ledger["environment"] + sum(ledger["masked"].values()) + sum(ledger["dropped"].values())
    )
    assert everything == ledger["sampled"], ledger
    return reasons, left_out, ledger
