"""What the loss of a step is a mean of: the terms of all its micro-batches on all ranks, and each one's share of them."""

import torch
from torch import Tensor

from llm_trainer.algorithm import Algorithm, SumOverRanks
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.lockstep import zero_loss
from llm_trainer.state import MicroBatch


def fill_up(engine: Engine, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of a step, and in lockstep as many fillers as another rank has more of them.

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
    missing = dist.largest(len(micro_batches), engine.device) - len(micro_batches)
    return micro_batches + [micro_batches[0].filler()] * missing


def count_terms(
    algorithm: Algorithm, engine: Engine, batches: list[MicroBatch], stop_requested: bool
) -> tuple[float, int, bool]:
    """Weigh every micro-batch; terms and tokens of the step on all ranks, and whether any of them is to stop."""
    tokens = 0
    for batch in batches:
        if batch.counts:
            batch.weight = float(algorithm._loss_weight(batch.batch))
            tokens += algorithm._count_tokens(batch.batch)
    terms = sum(batch.weight for batch in batches)
    total, all_tokens, stops = dist.sum_numbers([terms, float(tokens), float(stop_requested)], engine.device)
    stop = stops > 0
    if dist.shares_data():  # a signal may come between the reads of neighbours, who count among different processes
        stop = dist.largest(int(stop), engine.device) > 0
    return total or 1.0, int(all_tokens), stop  # weights may be fractions: 1 only in place of 0


@torch.no_grad()
def begin_step(algorithm: Algorithm, engine: Engine, batches: list[MicroBatch], sum_over_ranks: SumOverRanks) -> None:
    """Let the algorithm see all micro-batches of a step before the first of them runs."""
    with engine.precision(), engine.together():
        algorithm._begin_step([b.batch for b in batches], [b.weight for b in batches], sum_over_ranks)


def share_of_step(loss: Tensor, batch: MicroBatch, total: float, outputs: object, algorithm: Algorithm) -> Tensor:
    """`[]` what a micro-batch contributes to the loss of its step: its mean, times its share of the step's terms."""
    if not batch.weight:
        return zero_loss(outputs, algorithm.model)
    return loss * (batch.weight / total)
