"""The one training loop. It drives any algorithm on any engine and knows neither."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from llm_trainer.data.stream import mix_seeds
from llm_trainer.engine import dist
from llm_trainer.position import Position
from llm_trainer.state import MicroBatch, Progress, StepDone
from llm_trainer.train.retry import Attempt, DoesNotFit, Steps
from llm_trainer.train.terms import Totals, count_terms, fill_up, share_of_step
from llm_trainer.train.work import Work


def fit(work: Work, progress: Progress, after: Callable[[StepDone | None], bool]) -> None:
    """Train on from where `progress` stands until `after` says that it is enough.

    Args:
        after: called after every step with what it was, and after every epoch with None; it moves `progress` on and says
            whether the run is over.
    """
    while True:
        steps = Steps(work, progress)
        for micro_batches, position in steps:
            try:
                done = train_step(work, progress.step, micro_batches, position)
            except DoesNotFit as failure:
                steps.again(failure)  # cut smaller; nothing has happened yet
                continue
            if after(replace(done, waited=steps.waited)):
                return
            dist.reached(f"data of step {progress.step + 1}")
        if after(None):
            return


def train_step(work: Work, step: int, micro_batches: list[MicroBatch], position: Position) -> StepDone:
    """Take one optimizer step: along the gradient of the mean over ALL terms of all micro-batches on all ranks.

    Raises:
        DoesNotFit: a rank has run out of memory; nothing of the step is left on any.
    """
    algorithm, engine = work.algorithm, work.engine
    started, cpu_started = time.perf_counter(), time.process_time()

    # 1. The noise of a step is a function of (seed, step, rank): a resumed run continues bit for bit.
    torch.manual_seed(mix_seeds(work.seed, step, dist.rank()))

    # 2. Count what the step's losses are means of, before the first micro-batch runs.
    dist.reached(f"step {step + 1}, beginning")
    batches = fill_up(engine, micro_batches)
    totals, tokens, stop = count_terms(algorithm, engine, batches, work.stop_requested())
    attempt = Attempt(work, engine.give_up_step)
    attempt.begin(batches)

    # 3. Add up gradients. The losses ADD, over micro-batches and over ranks.
    loss_sum = torch.zeros((), device=engine.device)
    for number, micro_batch in enumerate(batches, start=1):
        dist.reached(f"step {step + 1}, micro-batch {number}")
        with attempt.part(number):
            loss_sum += add_gradient(work, micro_batch, totals, last=number == len(batches))
    attempt.succeed()
    dist.reached(f"step {step + 1}, update")
    algorithm._end_step(dist.all_reduce)
    algorithm.regulariser.end(dist.all_reduce)

    # 4. Update the weights, unless the gradient is not finite. The host waits for the device here, and nowhere else.
    grad_norm, finite = engine.step(work.max_grad_norm)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return StepDone(loss_sum, grad_norm, finite, tokens, totals, seconds, stop, batches, position, cpu_seconds)


def add_gradient(work: Work, micro_batch: MicroBatch, totals: Totals, last: bool) -> Tensor:
    """Forward and backward of a micro-batch; `[]` what it contributes to the loss of the step, of `totals` terms."""
    algorithm, engine = work.algorithm, work.engine
    own = algorithm.loss_of(micro_batch)
    with engine.micro_step(last), work.metrics.recording(micro_batch.counts):
        batch = own._prepare_batch(micro_batch.batch)
        outputs = own._forward(batch)
        loss = own._compute_loss(outputs, batch)
        share = share_of_step(loss, micro_batch, totals, outputs, algorithm)
        engine.backward(share)
    return share.detach()
