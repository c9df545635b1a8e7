"""The one training loop. It drives any trainer on any engine and knows neither."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_trainer.data.collate import Filler
from llm_trainer.data.stream import Batch, StepSource, mix
from llm_trainer.engine import dist
from llm_trainer.metrics import Metrics

if TYPE_CHECKING:
    from llm_trainer.run import Run

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", so that a scheduler requeues the job


class TrainingInterrupted(SystemExit):
    """A signal stopped the run after its state was saved; the process exits with code 75."""


class NonFiniteError(ArithmeticError):
    """The weights the run starts from are not finite, or too many steps in a row had a loss or gradient that is not finite."""


class Signals:
    """Remembers that SIGTERM or SIGINT came; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    @contextmanager
    def listening(self) -> Iterator["Signals"]:
        """Listen while the block runs (only the main thread can)."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        self.received = None
        before = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


def fit(run: "Run") -> None:
    """Train from where `run.progress` stands to the end of the last epoch or step."""
    progress, settings = run.progress, run.settings
    while not run.finished():
        steps = run.trainer._train_steps(run.source, progress.epoch, progress.position)
        for micro_batches, position in steps:
            # The noise of a step is a function of (seed, step, rank): a resumed run continues bit for bit.
            torch.manual_seed(mix(settings.seed, progress.step, dist.rank()))
            train_step(run, micro_batches)
            progress.step, progress.position = progress.step + 1, position
            run.after_step()
            if run.finished():
                return
        progress.epoch, progress.position = progress.epoch + 1, 0
        run.after_epoch()


def train_step(run: "Run", micro_batches: list[Batch]) -> None:
    """One optimizer step: the gradient of the mean over ALL terms of all micro-batches on all ranks.

    Raises:
        NonFiniteError: `max_bad_steps` steps in a row were not finite. Nothing was updated by any of them.
    """
    trainer, engine, started = run.trainer, run.engine, time.perf_counter()
    weights = [0.0 if isinstance(batch, Filler) else float(trainer._loss_weight(batch)) for batch in micro_batches]
    tokens = sum(0 if isinstance(batch, Filler) else trainer._count_tokens(batch) for batch in micro_batches)
    exact = torch.float32 if engine.device.type == "mps" else torch.float64
    shared = torch.tensor([sum(weights), float(tokens), float(run.signals.received is not None)], dtype=exact)
    total, tokens_of_all, stop = dist.all_reduce(shared.to(engine.device)).tolist()
    step_loss = torch.zeros((), device=engine.device)
    begin_step(run, micro_batches, weights, dist.all_reduce)
    for i, (batch, weight) in enumerate(zip(micro_batches, weights, strict=True)):
        with engine.micro_step(last=i == len(micro_batches) - 1):
            run.recording = not isinstance(batch, Filler)
            batch = trainer._prepare_batch(batch.batch if isinstance(batch, Filler) else batch)
            loss = trainer._compute_loss(trainer._forward(batch), batch)
            loss = loss * (weight / max(total, 1.0)) if weight else nothing(trainer.model)
            engine.backward(loss)
        step_loss += loss.detach()
    trainer._end_step(dist.all_reduce)
    learning_rate = run.learning_rate()
    grad_norm = engine.step(run.max_grad_norm)
    run.note_step(tokens_of_all, time.perf_counter() - started, learning_rate, stop_requested=stop > 0)
    if math.isfinite(grad_norm.item()):
        run.step_schedule()
        run.progress.bad_steps = 0
        run.metrics.add("loss", step_loss, 1 / dist.world_size())
        run.metrics.add("grad_norm", grad_norm / dist.world_size(), 1 / dist.world_size())
    else:
        refuse(run, micro_batches, dist.all_reduce(step_loss).item())


@torch.no_grad()
def begin_step(run: "Run", micro_batches: list[Batch], weights: list[float], sum_over_ranks: Any) -> None:
    """Let the trainer see all micro-batches of a step before the first of them runs."""
    batches = [batch.batch if isinstance(batch, Filler) else batch for batch in micro_batches]
    with run.engine.precision():
        run.trainer._begin_step(batches, weights, sum_over_ranks)


def nothing(module: nn.Module) -> torch.Tensor:
    """The share of a batch without terms: 0, with a gradient of 0. Its loss may be 0 / 0, and NaN * 0 is NaN."""
    return torch.stack([(p * 0).sum().float() for p in module.parameters() if p.requires_grad]).sum()


def broken_tensor(module: nn.Module) -> str | None:
    """Which parameter holds a NaN or an infinity, and how many of them; None: all are finite."""
    named = list(module.named_parameters())
    whole = torch.stack([p.isfinite().all() for _, p in named])  # the host waits for the device once
    for name, p in (named[i] for i in (~whole).nonzero().flatten().tolist()):
        return f"{name.removeprefix('module.')} ({int((~p.isfinite()).sum())} of {p.numel():,} values are not finite)"
    return None


def refuse(run: "Run", micro_batches: list[Batch], loss: float) -> None:
    """Count a step whose gradient was not finite, keep its batches for inspection, stop after too many in a row."""
    run.progress.bad_steps += 1
    run.progress.skipped_steps += 1
    kept = run.keep_batches(micro_batches)
    message = f"step {run.progress.step + 1}: loss {loss:g}, gradient not finite; the update was skipped, {kept}"
    run.warn(message)
    limit = run.settings.max_bad_steps + (20 if run.engine.state_dict()["scaler"] else 0)  # fp16 finds its scale so
    if run.progress.bad_steps >= limit:
        broken = broken_tensor(run.trainer.base_model)
        if broken is not None:
            cause = f"the weights are broken, by an update before: {broken}; lower the learning rate or add warm-up"
        elif not math.isfinite(loss):
            cause = "the weights are finite and the loss is not: look for broken rows in the kept batches"
        else:
            cause = "the loss is finite and its gradient is not: lower the learning rate, or use bf16 or fp32"
        raise NonFiniteError(
            f"{message}. {run.progress.bad_steps} steps in a row were not finite, so the run stops; nothing was updated "
            f"by them. Likely cause: {cause}. Last valid checkpoint: {run.last_checkpoint()}"
        )


@torch.no_grad()
def validate(run: "Run") -> dict[str, float]:
    """Metrics of the validation data, `eval_loss` among them: means over all its terms on all ranks.

    Of data that has a name also its own, `eval_<name>_loss`. An interrupt ends it early on every rank; the caller then
    saves and stops, and a resumed run evaluates again.
    """
    module, train_metrics = run.trainer.model, run.metrics
    was_training = module.training
    module.eval()
    parts = {name: Metrics(run.engine.device) for name in run.val_sources}
    try:
        for name, source in run.val_sources.items():
            run.metrics = parts[name]
            measure(run, source)
    finally:
        run.metrics = train_metrics
        module.train(was_training)
    total = Metrics(run.engine.device)
    for part in parts.values():
        total.include(part)
    total.add("interrupted", float(run.signals.received is not None), 1.0)
    values = total.reduce(dist.all_reduce)
    run.stop_requested = run.stop_requested or values.pop("interrupted") > 0
    found = {f"eval_{name}": value for name, value in values.items()}
    for name in filter(None, parts):
        found |= {f"eval_{name}_{metric}": value for metric, value in parts[name].reduce(dist.all_reduce).items()}
    return found


def measure(run: "Run", source: StepSource) -> None:
    """Add the metrics of all data of `source` to the run's, until a signal comes."""
    trainer = run.trainer
    for micro_batches, _ in source.steps(0, 0):
        for batch in micro_batches:
            if isinstance(batch, Filler):  # nothing is exchanged here, so a rank without rows just waits
                continue
            run.recording, weight = True, float(trainer._loss_weight(batch))
            begin_step(run, [batch], [weight], lambda numbers: numbers)  # each batch is a step of its own
            with run.engine.precision():
                batch = trainer._prepare_batch(batch)
                loss = trainer._compute_loss(trainer._forward(batch), batch)
            run.metrics.add("loss", loss * weight, weight)
        if run.signals.received is not None:
            return
