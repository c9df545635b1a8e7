"""What the loss of a step is a mean of: the terms of all its micro-batches on all ranks, and each one's share of them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llm_trainer.algorithm import Algorithm, SumOverRanks
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.lockstep import zero_loss
from llm_trainer.state import MicroBatch

Totals = Mapping[str, float]  # terms of each loss of a step, and of what is added to it, over all ranks
ADDED = "added"  # name of the latter


def fill_up(engine: Engine, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of a step, and in lockstep as many fillers of each loss as another rank has more micro-batches.

    Raises:
        ValueError: there is none.
    """
    if not micro_batches:
        raise ValueError(
            "a step without a micro-batch on this rank; expected at least one on every rank, with counts=False (see "
            "MicroBatch.filler) where the rank has no rows"
        )
    if not engine.in_lockstep:
        return micro_batches
    filled = []
    for loss in dict.fromkeys(batch.loss for batch in micro_batches):  # each has a forward of its own
        own = [batch for batch in micro_batches if batch.loss == loss]
        missing = dist.largest(len(own), engine.device) - len(own)
        filled += own + [own[0].filler()] * missing
    return filled


def weigh(algorithm: Algorithm, batch: MicroBatch) -> None:
    """Set of how many terms the means of a micro-batch are."""
    batch.weight = float(algorithm.loss_of(batch)._loss_weight(batch.batch))
    if not batch.loss:
        batch.added_weight = algorithm.regulariser.weigh(batch.batch)


def count_terms(
    algorithm: Algorithm, engine: Engine, batches: list[MicroBatch], stop_requested: bool
) -> tuple[Totals, int, bool]:
    """Weigh every micro-batch; terms and tokens of the step on all ranks, and whether any of them is to stop."""
    tokens = 0
    for batch in batches:
        if batch.counts:
            weigh(algorithm, batch)
            tokens += algorithm.loss_of(batch)._count_tokens(batch.batch)
    names, terms = ["", *algorithm._further_losses()], []
    for name in names:
        terms.append(float(sum(batch.weight for batch in batches if batch.loss == name)))
    names.append(ADDED)
    terms.append(float(sum(batch.added_weight for batch in batches)))
    *totals, all_tokens, stops = dist.sum_numbers([*terms, float(tokens), float(stop_requested)], engine.device)
    stop = stops > 0
    if dist.shares_data():  # a signal may come between the reads of neighbours, who count among different processes
        stop = dist.largest(int(stop), engine.device) > 0
    return dict(zip(names, totals, strict=True)), int(all_tokens), stop


@torch.no_grad()
def begin_step(algorithm: Algorithm, engine: Engine, batches: list[MicroBatch], sum_over_ranks: SumOverRanks) -> None:
    """Let the algorithm see all its micro-batches of a step before the first of them runs."""
    own = [batch for batch in batches if not batch.loss]
    with engine.precision(), engine.together():
        algorithm._begin_step([b.batch for b in own], [b.weight for b in own], sum_over_ranks)
        algorithm.regulariser.begin(own, sum_over_ranks)


def share_of_step(loss: Tensor, batch: MicroBatch, totals: Totals, outputs: object, algorithm: Algorithm) -> Tensor:
    """`[]` what a micro-batch contributes to the loss of its step: each of its means, times its share of that one's terms."""
    if batch.weight:
        share = loss * (batch.weight / totals[batch.loss])
    else:
        share = zero_loss(outputs, algorithm.model)
    added = None if batch.loss else algorithm.regulariser.mean(outputs, batch.counts)
    if added is not None and batch.added_weight:
        share = share + added * (batch.added_weight / totals[ADDED])
    return share
