"""One forward and backward of the longest rows, to see what a token takes; nothing of it is left."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.data.stream import SampleStream
from llm_trainer.engine.out_of_memory import is_out_of_memory, let_go, release
from llm_trainer.engine.room import forget_resident_peak, resident_now, resident_peak
from llm_trainer.state import MicroBatch
from llm_trainer.train.loop import add_gradient
from llm_trainer.train.snapshot import RandomState
from llm_trainer.train.terms import ADDED, begin_step, weigh
from llm_trainer.train.work import Work

TOKENS = 4096  # of a trial, at most. What does not grow with them counts as if it did.


def bytes_per_token(work: Work, source: SampleStream) -> float | None:
    """What a micro-batch takes at its peak, beside what was there before; all ranks together.

    Gradients are counted in, as they are made by it.

    Returns:
        Bytes per token, padding counted as tokens; infinite where the trial did not fit; None where nothing can be measured.
    """
    engine = work.engine
    on_host = engine.device.type != "cuda"
    is_seen = not on_host or forget_resident_peak()  # if not, the others may see it, and need this rank
    batch, tokens = longest_rows(source)
    if not on_host:
        torch.cuda.reset_peak_memory_stats(engine.device)
    before = resident_now() if on_host else torch.cuda.memory_allocated(engine.device)
    try:
        with without_a_trace(work):
            _run(work, batch)
    except Exception as error:
        if engine.in_lockstep or not is_out_of_memory(error):
            raise  # in lockstep the other ranks wait inside it
        let_go(error)
        release(engine.device)
        return float("inf")
    peak = resident_peak() if on_host else torch.cuda.max_memory_allocated(engine.device)
    return max(1, peak - before) / tokens if is_seen and peak is not None else None


def longest_rows(source: SampleStream) -> tuple[MicroBatch, int]:
    """A micro-batch of the longest rows, the same on every rank, and its tokens with padding.

    It has at most `batch_size` rows: where that does not fit, training without a trial would not either.
    """
    lengths = np.asarray(source.costs)
    longest = int(lengths.max())
    count = min(len(lengths), source.batch_size, max(1, TOKENS // longest))
    rows = np.argsort(-lengths, kind="stable")[:count]
    batch = MicroBatch(source.collate([source.dataset[int(row)] for row in rows]), counts=False)
    return batch, int(lengths[rows].sum()) if source.flat else longest * count


def _run(work: Work, micro_batch: MicroBatch) -> None:
    """As a step does it, but for the update."""
    algorithm, engine = work.algorithm, work.engine
    weigh(algorithm, micro_batch)
    micro_batch.weight = micro_batch.weight or 1.0
    with work.metrics.recording(micro_batch.counts):
        begin_step(algorithm, engine, [micro_batch], lambda numbers: numbers)
    # Sharded gradients are added up where only the last backward of a step comes past.
    totals = {"": micro_batch.weight, ADDED: micro_batch.added_weight}
    add_gradient(work, micro_batch, totals, last=engine.in_lockstep)


@contextmanager
def without_a_trace(work: Work) -> Iterator[None]:
    """The context of a forward and backward between two steps of which nothing is to stay.

    That is: gradients, buffers such as BatchNorm's, random numbers, and what an algorithm remembers in its attributes, in
    modules among them too.
    """
    algorithm, module = work.algorithm, work.algorithm.model
    random = RandomState()
    state, was_training = random.state_dict(), module.training
    buffers: dict[Tensor, Tensor] = {}
    for one in (module, *vars(algorithm).values()):
        if isinstance(one, nn.Module):
            buffers |= {buffer: buffer.clone() for buffer in one.buffers()}
    kept = {name: _copy(value) for name, value in vars(algorithm).items()}
    module.train()
    try:
        yield
    finally:
        module.train(was_training)
        work.engine.drop_gradients()
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
        vars(algorithm).update(kept)
        random.load_state_dict(state)


def _copy(value: object) -> object:
    """A number, a tensor, or a list or dict of such as it is now; anything else itself."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is dict:
        return {name: _copy(one) for name, one in value.items()}
    if type(value) is list:
        return [_copy(one) for one in value]
    return copy.copy(value) if isinstance(value, list | dict | set) else value
