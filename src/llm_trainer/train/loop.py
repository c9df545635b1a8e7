"""The one training loop. It drives any trainer on any engine and knows neither."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llm_trainer.data.collate import Filler
from llm_trainer.data.stream import Batch, StepSource, mix
from llm_trainer.engine import dist
from llm_trainer.train.guards import refuse, share_of_nothing
from llm_trainer.train.metrics import Metrics

if TYPE_CHECKING:
    from llm_trainer.train.run import Run

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: "try again later", so that a scheduler requeues the job


class TrainingInterrupted(SystemExit):
    """A signal stopped the run after its state was saved; the process exits with code 75."""


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
    progress = run.progress
    while not run.finished():
        steps = run.trainer._train_steps(run.source, progress.epoch, progress.position)
        for micro_batches, position in steps:
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
    step, engine = Step(run, micro_batches), run.engine
    for index, last in step.indices():
        with engine.micro_step(last):
            engine.backward(step.share(index))
    run.trainer._end_step(dist.all_reduce)
    learning_rate = run.learning_rate()
    if step.end(engine.step(run.max_grad_norm), learning_rate):
        run.step_schedule()


class Step:
    """An optimizer step as every driver takes it: what its micro-batches weigh, their losses, and what is noted after it.

    Attributes:
        loss: `[]` the sum of this rank's shares so far, detached.
    """

    def __init__(self, run: "Run", micro_batches: list[Batch]) -> None:
        # The noise of a step is a function of (seed, step, rank): a resumed run continues bit for bit.
        torch.manual_seed(mix(run.settings.seed, run.progress.step, dist.rank()))
        trainer, device, self._started = run.trainer, run.engine.device, time.perf_counter()
        self._run, self._batches = run, fill_up(run, micro_batches)
        self._weights = [0.0 if isinstance(b, Filler) else float(trainer._loss_weight(b)) for b in self._batches]
        tokens = sum(0 if isinstance(b, Filler) else trainer._count_tokens(b) for b in self._batches)
        exact = torch.float32 if device.type == "mps" else torch.float64
        shared = torch.tensor([sum(self._weights), float(tokens), float(run.signals.received is not None)], dtype=exact)
        total, self._tokens, stop = dist.all_reduce(shared.to(device)).tolist()
        self._total, self._stop = max(total, 1.0), stop > 0
        self.loss = torch.zeros((), device=device)
        begin_step(run, self._batches, self._weights, dist.all_reduce)

    def indices(self) -> Iterator[tuple[int, bool]]:
        """The number of each micro-batch, and whether it is the last."""
        return ((index, index == len(self._batches) - 1) for index in range(len(self._batches)))

    def share(self, index: int) -> torch.Tensor:
        """`[]` what a micro-batch contributes to the step's loss, to be backpropagated; shares ADD, over ranks as well."""
        batch, weight, trainer = self._batches[index], self._weights[index], self._run.trainer
        self._run.recording = not isinstance(batch, Filler)
        batch = trainer._prepare_batch(batch.batch if isinstance(batch, Filler) else batch)
        outputs = trainer._forward(batch)
        loss = trainer._compute_loss(outputs, batch)
        loss = loss * (weight / self._total) if weight else share_of_nothing(outputs, trainer.model)
        self.loss += loss.detach()
        return loss

    def end(self, grad_norm: torch.Tensor, learning_rate: float) -> bool:
        """Note the step; whether the gradient was finite, so that there was an update (see `train_step`)."""
        run, world = self._run, dist.world_size()
        run.note_step(self._tokens, time.perf_counter() - self._started, learning_rate, stop_requested=self._stop)
        if not math.isfinite(grad_norm.item()):
            refuse(run, self._batches, dist.all_reduce(self.loss).item())
            return False
        run.progress.bad_steps = 0
        run.metrics.add("loss", self.loss, 1 / world)
        run.metrics.add("grad_norm", grad_norm / world, 1 / world)
        return True


def fill_up(run: "Run", micro_batches: list[Batch]) -> list[Batch]:
    """The micro-batches of a step, and in lockstep as many fillers as another rank has more of them."""
    if not run.engine.in_lockstep:
        return micro_batches
    filler = micro_batches[0] if isinstance(micro_batches[0], Filler) else Filler(micro_batches[0])
    return micro_batches + [filler] * (dist.largest(len(micro_batches), run.engine.device) - len(micro_batches))


@torch.no_grad()
def begin_step(run: "Run", micro_batches: list[Batch], weights: list[float], sum_over_ranks: Any) -> None:
    """Let the trainer see all micro-batches of a step before the first of them runs."""
    batches = [batch.batch if isinstance(batch, Filler) else batch for batch in micro_batches]
    with run.engine.precision():
        run.trainer._begin_step(batches, weights, sum_over_ranks)


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
    trainer, lockstep = run.trainer, run.engine.in_lockstep
    for micro_batches, _ in source.steps(0, 0):
        for batch in fill_up(run, micro_batches):
            run.recording = not isinstance(batch, Filler)
            if not run.recording and not lockstep:  # then nothing is exchanged, and a rank without rows just waits
                continue
            batch = batch.batch if isinstance(batch, Filler) else batch
            weight = float(trainer._loss_weight(batch))
            begin_step(run, [batch], [weight], lambda numbers: numbers)  # each batch is a step of its own
            with run.engine.precision():
                batch = trainer._prepare_batch(batch)
                loss = trainer._compute_loss(trainer._forward(batch), batch)
            if run.recording:
                run.metrics.add("loss", loss * weight, weight)
        received = int(run.signals.received is not None)
        if dist.largest(received, run.engine.device) if lockstep else received:
            return
