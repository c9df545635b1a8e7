"""A run: one trainer, its engine, where it stands, and everything that happens around its steps."""

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llm_trainer.checkpoint import CheckpointManager
from llm_trainer.checkpoint.valid import step_folders, step_of
from llm_trainer.config.env import environment, set_default
from llm_trainer.data.collate import Filler
from llm_trainer.data.stream import as_step_source
from llm_trainer.engine import dist
from llm_trainer.engine.choose import choose_engine, engine_of
from llm_trainer.engine.torch import detect_device
from llm_trainer.state import Progress
from llm_trainer.train import guards, hooks, loop, preflight, snapshot
from llm_trainer.train.metrics import ConsoleWriter, Metrics, Writer, open_writers

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings
    from llm_trainer.trainers.base import BaseTrainer


class Run:
    """See `BaseTrainer` for the arguments."""

    def __init__(
        self,
        trainer: "BaseTrainer",
        settings: "Settings",
        *,
        train_loader: Any,
        val_loader: Any,
        device: str | None,
        max_epochs: int,
        grad_accum_steps: int,
        max_grad_norm: float,
        use_amp: bool,
        use_ddp: bool | None,
        log_interval: int,
        save_dir: str,
        save_interval: int,
        hooks: Sequence[hooks.Hook],
    ) -> None:
        _check_numbers(max_epochs=max_epochs, grad_accum_steps=grad_accum_steps, log_interval=log_interval)
        self.trainer, self.settings = trainer, settings
        self.max_epochs, self.max_grad_norm, self.accumulation = max_epochs, max_grad_norm, grad_accum_steps
        self.log_interval, self.save_interval = log_interval, save_interval
        together = environment().world_size > 1 if use_ddp is None else use_ddp
        place = detect_device(device)
        if (
            place.type == "cpu"
        ):  # oneDNN keeps a kernel per shape, by default 1,024 of them: with ragged rows half a GiB
            set_default("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        if together:
            dist.start(place, settings.ddp_timeout_s)
        if together and settings.fsdp is not None and engine_of(settings) == "fsdp":
            dist.share_data(settings.fsdp.tensor_parallel_size)
        self.engine = choose_engine(settings, place, use_amp, together)
        self.driver: Callable[[Run], None] = loop.fit
        if engine_of(settings) == "hf":
            from llm_trainer.train.transformers_driver import fit

            self.driver = fit
        ranks = {"rank": dist.rank(), "world_size": dist.world_size()} if together else {}
        self.source = as_step_source(
            train_loader,
            accumulation=grad_accum_steps,
            micro_batch_tokens=settings.micro_batch_tokens,
            seed=settings.seed,
            **ranks,
        )
        loaders = val_loader if isinstance(val_loader, Mapping) else {} if val_loader is None else {"": val_loader}
        self.val_sources = {name: as_step_source(loader, **ranks) for name, loader in loaders.items()}
        self.save_dir = Path(save_dir)
        self.log_dir = Path(settings.log_dir) if settings.log_dir else self.save_dir / "log"
        self.progress = Progress()
        self.metrics = Metrics(self.engine.device)
        self.signals = loop.Signals()
        self.stop_requested = self.new_best = False
        self.recording = True
        self._writers: Sequence[Writer] = ()
        self._manager: CheckpointManager | None = None
        self._user_hooks = list(hooks)
        self._window = [0.0, 0.0]  # tokens and seconds since the last log line

    # Setting up.

    def prepare(self, module: nn.Module) -> nn.Module:
        """Place and wrap the trained module; switch on what the settings ask of it."""
        model = self.trainer.base_model
        if self.settings.gradient_checkpointing:
            if not isinstance(model, _pretrained_model()):
                raise ValueError(f"gradient_checkpointing needs a transformers model, this is {type(model).__name__}")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of a new name, which older versions do not have
                model.gradient_checkpointing_enable(  # type: ignore[operator]
                    gradient_checkpointing_kwargs={"use_reentrant": False}
                )
        if self.settings.compile:
            from llm_trainer.models.scored import ScoredModel

            if isinstance(module, ScoredModel):
                module.compile_backbone()
            else:
                module.compile()
        self.size = preflight.Size.of(self)  # now: an engine may leave nothing to count in the parameters themselves
        return self.engine.prepare(module, model, self.trainer.optimizer)

    @property
    def manager(self) -> CheckpointManager:
        """The checkpoints in `save_dir` (made at first use, on the main process only)."""
        if self._manager is None:
            self._manager = CheckpointManager(self.save_dir, self.settings.checkpoints_to_keep, self.warn)
        return self._manager

    # Running.

    def fit(self) -> dict[str, float]:
        """Train to the end: see `BaseTrainer.train`."""
        with self.signals.listening(), dist.on_duty(self._how_to_go_on):
            self._resume()
            self.stop_requested = False
            self._last_values: dict[str, float] = {}
            self._hooks = [*hooks.built_in(self, self.log_interval, self.save_interval), *self._user_hooks]
            if self.finished() and not any(hook.is_due(self) for hook in self._hooks):
                self._publish()
                why = "stopped early" if self.progress.stopped_early else "raise n_epochs (or max_steps) to go on"
                self.say(f"already finished at step {self.progress.step}, nothing to do: {why}")
                return {name: value for values in self.progress.lines for name, value in values.items()}
            self._open()
            try:
                self.after_step()  # whatever a signal left undone
                self.trainer.model.train()
                self.driver(self)
                self._publish()
                return dict(self._last_values)
            finally:
                for writer in self._writers:
                    writer.close()
                self._writers = ()

    def _open(self) -> None:
        if (broken := guards.broken_tensor(self)) is not None:
            raise guards.NonFiniteError(
                f"the weights are broken before the first step: {broken}. Expected finite numbers: load other weights, or "
                f"mend what made these"
            )
        if dist.is_main():
            self._set_aside()
            self.log_dir.mkdir(parents=True, exist_ok=True)
            if self.settings.description:
                (self.save_dir / "config.yaml").write_text(self.settings.description, encoding="utf-8")
        self.say(preflight.screen(self))
        self._writers = open_writers(
            self.log_dir,
            is_main=dist.is_main(),
            total_steps=self.total_steps(),
            last_step=self.progress.step - 1,
            extra=self.settings.writers,
            live=self.settings.progress,
            config=asdict(self.settings),
        )
        written, self.progress.lines = self.progress.lines, []
        for values in written:
            self.write(values)

    def _set_aside(self) -> None:
        """Move checkpoints that are ahead of this run out of the way: they are of another run, or damaged."""
        folder = self.manager.folder  # one that cannot be written shows here, before the first step
        ahead = [path for path in step_folders(folder) if step_of(path) > self.progress.step]
        if not ahead:
            return
        aside = next(p for n in itertools.count(1) if not (p := folder / f"set-aside-{n}").exists())
        aside.mkdir()
        for path in sorted(ahead):
            path.rename(aside / path.name)
        self.warn(f"this run starts at step {self.progress.step}; {len(ahead)} later checkpoints are now in {aside}")

    def _resume(self) -> None:
        wanted = self.settings.resume
        if wanted == "never" or self.progress.step:
            return
        path: str | None = wanted
        if wanted == "auto":
            with_checkpoints = dist.is_main() and self.save_dir.is_dir()
            newest = self.manager.latest() if with_checkpoints else None
            path = dist.broadcast_object(None if newest is None else str(newest))
        if path is not None:
            self.load(path)
            self.say(f"continuing from {path}: step {self.progress.step}, epoch {self.progress.epoch + 1}")

    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run; None when the loader does not say."""
        per_epoch = self.source.num_steps()
        total = None if per_epoch is None else per_epoch * self.max_epochs
        limits = [n for n in (total, self.settings.max_steps) if n is not None]
        return min(limits) if limits else None

    def finished(self) -> bool:
        """Whether the last step has been done."""
        limit = self.settings.max_steps
        p = self.progress
        return p.epoch >= self.max_epochs or (limit is not None and p.step >= limit) or p.stopped_early

    def after_step(self) -> None:
        """Call the hooks that are due; after a signal, save and stop the process with exit code 75."""
        for hook in self._hooks:
            if not self.stop_requested and hook.is_due(self):
                self.progress.hooks_done[hook.name] = self.progress.step
                hook.call(self)
        if self.stop_requested:
            path = self.save(is_best=self.new_best)
            self.say(f"interrupted at step {self.progress.step}: saved {path}; start the same command again to go on")
            raise loop.TrainingInterrupted(loop.EXIT_INTERRUPTED)

    after_epoch = after_step

    def note_step(self, tokens: float, seconds: float, learning_rate: float, stop_requested: bool) -> None:
        """Count a finished step."""
        self.progress.tokens += int(tokens)
        self.progress.train_seconds += seconds
        self._window[0] += tokens
        self._window[1] += seconds
        self.progress.learning_rate = learning_rate
        self.progress.lines, self.new_best = [], False
        self.stop_requested = self.stop_requested or stop_requested

    def learning_rate(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.trainer.optimizer.param_groups[0]["lr"])

    def step_schedule(self) -> None:
        """Advance the schedule by one update."""
        if self.trainer.scheduler is not None:
            self.trainer.scheduler.step()

    def observe_loss(self, loss: float) -> None:
        """Tell a schedule that watches the validation loss."""
        from llm_trainer.optim.schedules import Scheduler

        if isinstance(self.trainer.scheduler, Scheduler):
            self.trainer.scheduler.observe(loss)

    @contextmanager
    def pause_clock(self) -> Iterator[None]:
        """Evaluation, sampling and saving do not count as training time (steps are timed one by one)."""
        was_training = self.trainer.model.training
        try:
            yield
        finally:
            self.trainer.model.train(was_training)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the validation set.

        Raises:
            ValueError: there is no validation set.
        """
        if not self.val_sources:
            raise ValueError("nothing to evaluate: give a val_loader (or eval_dataset)")
        return loop.validate(self)

    # Saying.

    def say(self, message: str) -> None:
        """Print on the main process, above any progress bar."""
        if not dist.is_main():
            return
        console = next((writer for writer in self._writers if isinstance(writer, ConsoleWriter)), None)
        if console is not None:
            console.say(message)
        else:
            print(message, flush=True)

    def warn(self, message: str) -> None:
        """Print a warning on the main process."""
        self.say(f"WARNING: {message}")

    def write(self, values: dict[str, float]) -> None:
        """Give metrics to all writers."""
        self._last_values.update(values)
        self.progress.lines.append(values)
        for writer in self._writers:
            writer.write(self.progress.step, values)

    def speed(self) -> dict[str, float]:
        """Learning rate, epoch, tokens, tokens/s, and MFU where the device's peak is known; starts a new window."""
        (tokens, seconds), self._window = self._window, [0.0, 0.0]
        progress, size = self.progress, self.source.size()
        values = {
            "learning_rate": progress.learning_rate,
            "epoch": progress.epoch + (progress.position / size if size else 0.0),
            "num_tokens": float(progress.tokens),
        }
        if progress.skipped_steps:
            values["skipped_steps"] = float(progress.skipped_steps)
        if seconds:
            values["tokens_per_second"] = tokens / seconds
            if self.size.flops_per_token is not None:
                peak = preflight.peak_flops(self.engine) * dist.num_processes()
                values["mfu"] = tokens / seconds * self.size.flops_per_token / peak
        return values

    def encode_prompt(self, chat: Any, text: str) -> list[int]:
        """Ids that a sample is generated from: a user turn after SFT, plain text after pretraining."""
        if self.trainer.section == "pretrain_config":
            return chat.encode_text(text).input_ids[:-1]
        return chat.encode_prompt([{"role": "user", "content": text}])

    def keep_batches(self, micro_batches: Sequence[Any]) -> str:
        """Write this rank's micro-batches of a step that was not finite, for inspection; says where they are."""
        path = self.save_dir / "bad_steps" / f"step-{self.progress.step + 1}-rank-{dist.process_number()}.pt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save([batch for batch in micro_batches if not isinstance(batch, Filler)], path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
            return f"its batch could not be kept ({error})"
        return f"its batch is kept in {path}"

    # Saving and loading: see `snapshot`.

    def save(self, is_best: bool = False, path: str | None = None, may_fail: bool = False) -> str:
        """Save on the main process; every rank learns how it ended. See `BaseTrainer.save_checkpoint`."""
        return snapshot.save(self, is_best, path, may_fail)

    def load(self, path: str) -> None:
        """Restore everything from a checkpoint folder or `.pt` file, on every rank."""
        snapshot.load(self, path)

    def last_checkpoint(self) -> str:
        """The newest valid checkpoint, for messages."""
        newest = self.manager.latest("sizes") if dist.is_main() else None
        return "none" if newest is None else str(newest)

    def _how_to_go_on(self) -> str:
        """For the message of a run that a lost rank stops, on any rank."""
        newest = next(iter(step_folders(self.save_dir)), None) if self.save_dir.is_dir() else None
        found = "no checkpoint yet" if newest is None else f"the newest checkpoint is {newest}"
        how = (
            "the same command goes on from it" if self.settings.resume == "auto" else "load_checkpoint goes on from it"
        )
        return f"Of this run, {found}{'' if newest is None else f'; {how}'}"

    def _publish(self) -> None:
        if dist.is_main():
            self.manager.publish()


def _check_numbers(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected an integer of at least 1")


def _pretrained_model() -> type:
    from transformers import PreTrainedModel

    return PreTrainedModel
