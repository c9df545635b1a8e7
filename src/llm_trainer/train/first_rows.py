"""Adapters that begin with what the first rows of a run say (EVA, LoRA-GA), before an engine wraps the model."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.stream import SampleStream, StepSource, innermost
from llm_trainer.engine import dist
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.models.adapter_start import awaited_init, begin_with_gradients, begin_with_inputs, values_at_start
from llm_trainer.state import MicroBatch
from llm_trainer.train.loop import add_gradient
from llm_trainer.train.terms import ADDED, begin_step, weigh
from llm_trainer.train.trial import without_a_trace
from llm_trainer.train.work import Work

TOKENS = 16384  # that are looked at, at most, but for the last row
AT_ONCE = 2048  # of them in one forward


def begin_adapters(work: Work, module: nn.Module, together: bool) -> None:
    """Give adapters that wait for rows their first values, the same on every rank; nothing where none waits.

    The rows are the first ones of the first epoch, on every rank the same, and cut always alike: so the values depend neither
    on the number of ranks nor on the size of micro-batches. Afterwards the model gives the numbers that it gave before.

    Args:
        work: its engine has not prepared anything yet.
        module: what that will prepare.
        together: whether several processes train together.

    Raises:
        ValueError: there are no rows before the first step, or the algorithm does not say that it learns from rows alone.
    """
    adapted: Any = work.algorithm.base_model
    init = awaited_init(adapted)
    if init is None:
        return
    _check(work.algorithm, adapted, init)
    engine = work.engine
    was_on = next(module.parameters()).device
    precision = engine.precision_name.replace("fp16", "fp32")  # without a scale of the loss
    plain = TorchEngine(engine.device, precision)
    plain.prepare(module, adapted, work.algorithm.optimizer)
    work.algorithm.model = module
    work = replace(work, engine=plain)
    try:
        with without_a_trace(work):
            module.eval()
            batches = list(_first_batches(work))
            if init == "eva":
                _see_inputs(work, adapted, batches)
            else:
                begin_with_gradients(adapted, lambda: _add_gradients(work, batches))
    finally:
        del work.algorithm.model
    if together:
        for value in values_at_start(adapted):
            value.copy_(dist.broadcast_tensor(value))
    if engine.in_lockstep:  # all of the model may be too large for one device beside anything else
        module.to(was_on)


def _check(algorithm: Algorithm, adapted: nn.Module, init: str) -> None:
    """
    Raises:
        ValueError: what the adapters wait for will not come.
    """
    name = type(algorithm).__name__
    if not getattr(algorithm, "learns_from_rows_alone", False):
        raise ValueError(
            f"adapter_config.init: {init} looks at the rows that are learned from, and {name} has none, or not these alone, "
            f"before its first step; expected another init, or adapter_config.path, adapters that began with those of another "
            f"run: SFTTrainer, Trainer, DPOTrainer and KTOTrainer have rows"
        )
    if any(parameter.is_meta for parameter in adapted.parameters()):
        raise ValueError(
            f"adapter_config.init: {init} looks at what the first rows do in the model, and on this rank its weights are not "
            f"there yet (meta device); expected a model with weights on every rank"
        )


def _first_batches(work: Work) -> Iterator[MicroBatch]:
    """The first rows of the first epoch, as micro-batches of which nothing is recorded."""
    source, seen = innermost(work.source), 0
    for batch in _batches_of(source):
        yield MicroBatch(batch, counts=False)
        seen += work.algorithm._count_tokens(batch)
        if seen >= TOKENS:
            return


def _batches_of(source: StepSource) -> Iterator[Any]:
    if isinstance(source, SampleStream):
        rows = source.order(0, 0, min(len(source), TOKENS))  # each has a token at least
        group, size = list[Any](), 0
        for row in rows.tolist():
            cost = int(source.costs[row])
            if group and size + cost > AT_ONCE:
                yield source.collate(group)
                group, size = [], 0
            group.append(source.dataset[row])
            size += cost
        yield source.collate(group)
        return
    if isinstance(source, LoaderSteps):  # all that it gives, and not only this rank's share
        source = replace(
            source,
            rank=0,
            world_size=1,
            accumulation=1,
            micro_batch_tokens=None,
            read_once=False,
            largest=_itself,
        )
    for micro_batches, _ in source.steps(0, 0):
        for micro_batch in micro_batches:
            yield micro_batch.batch


def _itself(number: int) -> int:
    return number


def _see_inputs(work: Work, adapted: Any, batches: list[MicroBatch]) -> None:
    algorithm = work.algorithm
    with work.engine.precision(), torch.no_grad():
        rows = [algorithm._prepare_batch(micro_batch.batch) for micro_batch in batches]
        begin_with_inputs(adapted, rows, algorithm._forward)


def _add_gradients(work: Work, batches: list[MicroBatch]) -> None:
    """Those of the mean over all terms of the batches, as one step would take them."""
    algorithm = work.algorithm
    for batch in batches:
        weigh(algorithm, batch)
    with work.metrics.recording(counts=False):
        begin_step(algorithm, work.engine, batches, lambda numbers: numbers)
    total = sum(batch.weight for batch in batches) or 1.0
    added = sum(batch.added_weight for batch in batches) or 1.0
    for number, batch in enumerate(batches, start=1):
        add_gradient(work, batch, {"": total, ADDED: added}, last=number == len(batches))
