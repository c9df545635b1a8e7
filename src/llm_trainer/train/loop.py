"""The one training loop. It drives any algorithm on any engine and knows neither."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from llm_trainer.algorithm import Algorithm
from llm_trainer.data.stream import StepSource, mix_seeds
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.state import Horizon, MicroBatch, Progress, StepDone
from llm_trainer.train.budget import Budget
from llm_trainer.train.hooks import RunView
from llm_trainer.train.metrics import Metrics
from llm_trainer.train.terms import begin_step, count_terms, fill_up, share_of_step


@dataclass(frozen=True)
class Work:
    """What is trained, on what, from which data.

    Attributes:
        algorithm: says what the loss is.
        engine: executes forward, backward and update.
        source: where optimizer steps come from.
        val_sources: validation data by name.
        budget: how many tokens a micro-batch may have.
        metrics: what the algorithm records, unless the micro-batch is a filler.
        horizon: how far the run goes.
        run: for drivers of other libraries, which may ask it to evaluate or save.
        stop_requested: whether this process has been asked to stop.
        seed: all noise follows from it.
        max_grad_norm: the gradient is scaled down to this norm; 0 does not clip.
    """

    algorithm: Algorithm
    engine: Engine
    source: StepSource
    val_sources: Mapping[str, StepSource]
    budget: Budget
    metrics: Metrics
    horizon: Horizon
    run: RunView
    stop_requested: Callable[[], bool]
    seed: int
    max_grad_norm: float


def fit(work: Work, progress: Progress, after: Callable[[StepDone | None], bool]) -> None:
    """Train on from where `progress` stands until `after` says that it is enough.

    Args:
        after: called after every step with what it was, and after every epoch with None; it moves `progress` on and says
            whether the run is over.
    """
    while True:
        for micro_batches, position in work.algorithm._train_steps(work.source, progress.epoch, progress.position):
            done = train_step(work, progress.step, micro_batches, position)
            if after(done):
                return
            dist.reached(f"data of step {progress.step + 1}")
        if after(None):
            return


def train_step(work: Work, step: int, micro_batches: list[MicroBatch], position: int) -> StepDone:
    """Take one optimizer step: along the gradient of the mean over ALL terms of all micro-batches on all ranks."""
    algorithm, engine = work.algorithm, work.engine
    started = time.perf_counter()

    # 1. The noise of a step is a function of (seed, step, rank): a resumed run continues bit for bit.
    torch.manual_seed(mix_seeds(work.seed, step, dist.rank()))

    # 2. Count what the step's loss is a mean of, before the first micro-batch runs.
    dist.reached(f"step {step + 1}, beginning")
    batches = fill_up(engine, micro_batches)
    total, tokens, stop = count_terms(algorithm, engine, batches, work.stop_requested())
    begin_step(algorithm, engine, batches, engine.joined(dist.all_reduce))

    # 3. Add up gradients. The losses ADD, over micro-batches and over ranks.
    loss_sum = torch.zeros((), device=engine.device)
    for number, micro_batch in enumerate(batches, start=1):
        dist.reached(f"step {step + 1}, micro-batch {number}")
        with engine.micro_step(last=number == len(batches)), work.metrics.recording(micro_batch.counts):
            batch = algorithm._prepare_batch(micro_batch.batch)
            outputs = algorithm._forward(batch)
            loss = algorithm._compute_loss(outputs, batch)
            share = share_of_step(loss, micro_batch, total, outputs, algorithm)
            engine.backward(share)
        loss_sum += share.detach()
    dist.reached(f"step {step + 1}, update")
    algorithm._end_step(dist.all_reduce)

    # 4. Update the weights, unless the gradient is not finite. The host waits for the device here, and nowhere else.
    grad_norm, finite = engine.step(work.max_grad_norm)
    return StepDone(loss_sum, grad_norm, finite, tokens, time.perf_counter() - started, stop, batches, position)
