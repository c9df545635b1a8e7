"""A step that runs out of memory is taken again, cut smaller: the same rows, the same noise, on all ranks alike.

Forwards and backwards of micro-batches are a rank's own, but for the backward in which gradients are exchanged. So a rank
that runs out of memory takes part in that exchange with zeros, and then all ranks tell each other whether one has failed.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llm_trainer.algorithm import Algorithm, Step, SumOverRanks
from llm_trainer.data.stream import RowOfStep
from llm_trainer.disk import DiskError, whole_file
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.out_of_memory import OutOfMemoryError, is_out_of_memory, let_go, release
from llm_trainer.layout import takes_flat
from llm_trainer.state import MicroBatch, Progress
from llm_trainer.train.budget import Budget, may_cut
from llm_trainer.train.terms import begin_step
from llm_trainer.train.work import Work

HELP = (
    "gradient_checkpointing, which computes activations again in the backward; a smaller dataset_block_size with truncation; "
    "or engine: fsdp, which divides weights and optimizer among processes"
)

# Where smaller micro-batches do not help.
HELP_BETWEEN = (
    "an optim_type with less state, such as lion or adafactor; engine: fsdp, which divides weights and optimizer among "
    "processes; save_in_background: false, if it was a save, which copies both"
)
MOST_STATISTICS = 1 << 20  # numbers in a buffer that is put back after a failure; larger ones are tables
REMEMBERED = "smaller_micro_batches.json"  # beside the checkpoints: what a run that had to stop goes on with


class DoesNotFit(Exception):
    """A step ran out of memory on some rank, and nothing of it is left on any.

    Attributes:
        number: of this rank's micro-batch, from 1; 0: as the step was begun; None: it was another rank.
        said: the error's words.
    """

    def __init__(self, number: int | None = None, said: str = "") -> None:
        super().__init__(said)
        self.number, self.said = number, said


@contextmanager
def out_of_memory_noticed(number: int) -> Iterator[None]:
    """The context of a micro-batch, which lets go of everything if it runs out of memory.

    Raises:
        DoesNotFit: it does.
    """
    said = ""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = let_go(error)
    if said:
        raise DoesNotFit(number, said)


class Attempt:
    """The forwards and backwards of a step: all of them on every rank, or nothing is left of any.

    Args:
        give_up: takes part in the exchange of gradients with zeros, after a failure (`Engine.give_up_step`).
    """

    def __init__(self, work: Work, give_up: Callable[[], None]) -> None:
        self._work, self._give_up = work, give_up
        self._metrics = work.metrics.copy()
        self._buffers = [(buffer, buffer.clone()) for buffer in _statistics(work)]
        self._noise = random.getstate(), np.random.get_state()  # torch's is seeded anew as the step begins again

    def begin(self, batches: list[MicroBatch]) -> None:
        """Let the algorithm see the micro-batches. Its sums over ranks are where ranks wait for each other."""
        algorithm, engine = self._work.algorithm, self._work.engine
        with self.part(0):
            begin_step(algorithm, engine, batches, self._agreed(engine.joined(dist.all_reduce)))
        if type(algorithm)._begin_step is not Algorithm._begin_step:
            self.succeed()

    def _agreed(self, sum_over_ranks: SumOverRanks) -> SumOverRanks:
        """The same sum, to which no rank comes if one has failed before."""

        def unless_one_has_failed(values: Tensor) -> Tensor:
            self.succeed()
            return sum_over_ranks(values)

        return unless_one_has_failed

    @contextmanager
    def part(self, number: int) -> Iterator[None]:
        """The context of a micro-batch, counted from 1, or of what comes before (0).

        Raises:
            DoesNotFit: it ran out of memory.
        """
        failure = None
        try:
            with out_of_memory_noticed(number):
                yield
        except DoesNotFit as error:
            if self._work.engine.in_lockstep:
                raise  # the others wait inside a forward or a backward, and cannot be reached
            failure = error
        if failure is not None:
            if number:
                self._give_up()
            self._agree(failure)

    def succeed(self) -> None:
        """Go on if no rank has failed.

        Raises:
            DoesNotFit: one has.
        """
        if not self._work.engine.in_lockstep:
            self._agree(None)

    def _agree(self, failure: DoesNotFit | None) -> None:
        work = self._work
        if not dist.largest(int(failure is not None), work.engine.device):
            return
        work.engine.drop_gradients()
        work.metrics.go_back(self._metrics)
        with torch.no_grad():
            for buffer, before in self._buffers:
                buffer.copy_(before)
        of_python, of_numpy = self._noise
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        release(work.engine.device)
        raise failure or DoesNotFit()


def _statistics(work: Work) -> Iterator[Tensor]:
    """The buffers that a forward may change and a checkpoint holds, such as running means."""
    if work.engine.in_lockstep:
        return
    for module in work.algorithm.saved_model.modules():
        for name, buffer in module._buffers.items():
            is_saved = buffer is not None and name not in module._non_persistent_buffers_set
            if buffer is not None and is_saved and buffer.numel() <= MOST_STATISTICS:
                yield buffer


class Steps:
    """The steps of an epoch, from where the run stands; one that ran out of memory comes again, cut smaller.

    Attributes:
        waited: seconds until the step that came last was there.
    """

    def __init__(self, work: Work, progress: Progress) -> None:
        self._work, self._progress = work, progress
        self._steps = self._open()
        self._step: Step
        self.waited = 0.0

    def _open(self) -> Iterator[Step]:
        self._cut_by = self._work.budget.tokens
        return self._work.source.steps(self._progress.epoch, self._progress.place)

    def __iter__(self) -> "Steps":
        return self

    def __next__(self) -> Step:
        began = time.perf_counter()
        self._step = next(self._steps)
        if self._work.budget.tokens != self._cut_by:  # it has changed since the step before
            self._cut_anew()
            self._step = next(self._steps)
        self.waited = time.perf_counter() - began
        return self._step

    def _cut_anew(self) -> None:
        """Let the step that came last come again, and all that follow, cut as the budget now says."""
        micro_batches, position = self._step
        recut = self._work.source.recut(micro_batches)
        if recut is None:
            self._steps = self._open()
        else:
            self._steps = chain([(recut, position)], self._steps)
            self._cut_by = self._work.budget.tokens

    def again(self, failure: DoesNotFit) -> None:
        """Let the step that came last come again; it and all that follow are cut smaller, on all ranks alike.

        Raises:
            OutOfMemoryError: it cannot be cut any smaller, or the ranks have lost each other; on every rank.
        """
        work, (micro_batches, _) = self._work, self._step
        rows = work.source.rows_of_step(self._progress.epoch, self._progress.place, micro_batches)
        shrink(work, rows, failure, f"step {self._progress.step + 1}")
        self._cut_anew()


@contextmanager
def one_message() -> Iterator[None]:
    """The context of all steps. Where memory runs out and no smaller cut mends it, as in an update, they end in one message.

    An update is not taken again: some weights may have changed by then. Nothing of it is in any checkpoint.

    Raises:
        OutOfMemoryError: memory ran out.
    """
    said = ""
    try:
        yield
    except Exception as error:
        explains_itself = type(error).__module__.startswith(
            "llm_trainer."
        )  # such as one of a reward that ran out of it
        if explains_itself or not is_out_of_memory(error):
            raise
        said = let_go(error)
    if said:
        raise OutOfMemoryError(
            f"{dist.place()}: out of memory ({said}). Smaller micro-batches would not help here. What helps: {HELP_BETWEEN}. "
            "Started again, the run goes on from its newest checkpoint"
        )


# How to cut smaller.


def any_failed(engine: Engine, failure: DoesNotFit) -> bool:
    """Whether something has failed on a rank; on any, unless they are in lockstep, however long the others need."""
    has_failed = failure.number is not None
    return has_failed if engine.in_lockstep else any(dist.gather_patiently(has_failed))


def shrink(work: Work, rows: list[list[RowOfStep]], failure: DoesNotFit, where: str) -> None:
    """Make the budget smaller than what did not fit, on all ranks alike, and say so.

    Args:
        rows: of this rank's micro-batches.
        failure: what happened on this rank.
        where: what did not fit, for messages.

    Raises:
        OutOfMemoryError: it cannot be cut any smaller; or, in lockstep, the others have not been kept waiting for it.
    """
    if work.engine.in_lockstep:
        _stop(work, rows, failure, where)
    found = [told for told in dist.gather_objects(_describe(rows, failure)) if told]
    failed = _agreed_size(_that_failed(rows, failure))
    if not failed[0] and dist.world_size() > 1:  # single rows; ranks on one machine may share its memory
        failed = _agreed_size(rows)
    happened = f"{where} ran out of memory: {'; '.join(found)}"
    if not _smaller(work.budget, *failed):
        raise OutOfMemoryError(f"{happened}. {_no_smaller(work, rows)}. What helps: {HELP}")
    work.run.say(
        f"{happened}. It is taken again, and from now on a micro-batch has at most {work.budget.tokens:,} tokens. No row, and "
        "no gradient, depends on that"
    )


def _stop(work: Work, rows: list[list[RowOfStep]], failure: DoesNotFit, where: str) -> None:
    """In lockstep, where the others wait inside a forward: remember the smaller size for the next start.

    Raises:
        OutOfMemoryError: always; the other ranks are told by `watch`.
    """
    happened = f"{where} ran out of memory: {_describe(rows, failure)}"
    if not _smaller(work.budget, *_largest(_that_failed(rows, failure))):
        raise OutOfMemoryError(f"{happened}. {_no_smaller(work, rows)}. What helps: {HELP}")
    path = work.run.save_dir / REMEMBERED
    kept = f"({path} says so)"
    try:
        with whole_file(path) as partial:
            partial.write_text(json.dumps(work.budget.state_dict()), encoding="utf-8")
    except DiskError as error:
        kept = f"if you say so ({error})"
    raise OutOfMemoryError(
        f"{happened}. With engine {work.engine.name} the ranks cannot take a step again. Started again, the run goes on from "
        f"its newest checkpoint with micro-batches of at most {work.budget.tokens:,} tokens {kept}"
    )


def _smaller(budget: Budget, cost: int, longest: int) -> bool:
    """Shrink the budget below a micro-batch of that size; whether that can help."""
    if budget.tokens is not None:
        cost = min(cost, budget.tokens)  # laid flat, rows cost less than `_largest` says
    return budget.shrink(cost, longest)


def _no_smaller(work: Work, rows: list[list[RowOfStep]]) -> str:
    """Why a step stays as it is; `rows` are those of its micro-batches."""
    kind = type(work.algorithm)
    if not rows and may_cut(work.algorithm):
        return (
            "Its micro-batches are not cut, for they hold something else than padded tensors [B, T] under names that are known "
            "(input_ids, labels, attention_mask, ...), or labels on padding: put fewer rows into each (batch_size)"
        )
    if may_cut(work.algorithm) or isinstance(work.budget.configured, int):
        return "It cannot be cut any smaller"
    if takes_flat(kind):
        return (
            "Rows of a micro-batch depend on each other in this model, or in its loss; it is not cut unless micro_batch_tokens "
            "is a number"
        )
    return (
        f"{kind.__name__} has methods of its own that see micro-batches, so these are not cut: say `takes_flat = True` in the "
        "class if its loss does not depend on how a step is cut, or make them smaller (batch_size)"
    )


def recall(budget: Budget, save_dir: Path) -> None:
    """Go on with the smaller size that a run in this folder had to stop for, on all ranks alike."""
    path, state = save_dir / REMEMBERED, None
    if path.is_file():
        state = json.loads(path.read_text(encoding="utf-8"))
    for found in dist.gather_patiently(state):  # the rank that failed may have a disk of its own
        if found is not None and (budget.tokens is None or found["tokens"] < budget.tokens):
            budget.load_state_dict(found)


def _that_failed(rows: list[list[RowOfStep]], failure: DoesNotFit) -> list[list[RowOfStep]]:
    """The micro-batches of this rank that may have been too large: that which failed; all, if it was before the first."""
    if failure.number is None:
        return []
    if failure.number == 0 or failure.number > len(rows):  # as the step was begun, or in a filler
        return rows
    return [rows[failure.number - 1]]


def _largest(rows: list[list[RowOfStep]]) -> tuple[int, int]:
    """Tokens with padding, and of the longest row, of the largest micro-batch that can be cut; 0 if there is none."""
    sizes = [(0, 0)]
    for micro_batch in rows:
        if len(micro_batch) > 1:
            longest = max(row.tokens for row in micro_batch)
            sizes.append((longest * len(micro_batch), longest))
    return max(sizes)


def _agreed_size(rows: list[list[RowOfStep]]) -> tuple[int, int]:
    """The largest sizes of any rank."""
    (_, cost), (_, longest) = dist.extremes(_largest(rows))
    return cost, longest


def _describe(rows: list[list[RowOfStep]], failure: DoesNotFit) -> str:
    """What failed on this rank, in words; empty if nothing did."""
    if failure.number is None:
        return ""
    of_rank = f" of rank {dist.rank()}" if dist.world_size() > 1 else ""
    if not failure.number:
        return f"what comes before the first micro-batch{of_rank} ({failure.said})"
    told = f"micro-batch {failure.number}{of_rank}"
    failed = rows[failure.number - 1] if len(rows) >= failure.number else []
    if len(failed) == 1:
        told += f", which is {failed[0].place} ({failed[0].tokens:,} tokens)"
    elif failed:
        told += f", {len(failed)} rows of up to {max(row.tokens for row in failed):,} tokens"
    return f"{told} ({failure.said})"
