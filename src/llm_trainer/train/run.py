"""A run: the conductor of everything around the loop. What lies below takes values, or a protocol of `algorithm` or `hooks`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.config.env import environment
from llm_trainer.data.loader_workers import workers_needed
from llm_trainer.data.rollout_source import RolloutSource, nothing_learned
from llm_trainer.data.stream import StepSource, innermost
from llm_trainer.engine import dist
from llm_trainer.engine.buffers import SharedBuffers
from llm_trainer.engine.choose import choose_driver, choose_engine, engine_of, join_processes
from llm_trainer.engine.device import choose_precision, detect_device, precision_choice
from llm_trainer.engine.out_of_memory import is_out_of_memory, let_go, release
from llm_trainer.engine.recompute import recompute_activations
from llm_trainer.engine.threads import settle_threads
from llm_trainer.image_batch import num_pixels
from llm_trainer.kernels import compile_after
from llm_trainer.model_group import members_of
from llm_trainer.models.quantize import keep_layout
from llm_trainer.optim import schedules
from llm_trainer.optim.multipliers import rate_of_run
from llm_trainer.optim.optimizers import slow_kernel
from llm_trainer.state import Choice, Horizon, Progress, StepDone, Stopped
from llm_trainer.train import guards, preflight, sizing, snapshot
from llm_trainer.train.before_hook import BeforeHook
from llm_trainer.train.budget import Budget, may_cut
from llm_trainer.train.compiling import KERNELS, Compiling, steps_left
from llm_trainer.train.configured import ConfiguredOptimizer
from llm_trainer.train.evaluate import answer, chat_of, evaluate, prompts_of, unmeasured
from llm_trainer.train.first_rows import begin_adapters
from llm_trainer.train.hooks import Hook, with_names_of_their_own
from llm_trainer.train.learning import Learning
from llm_trainer.train.machine import RunMachine
from llm_trainer.train.metrics import Clock, Metrics
from llm_trainer.train.probing import probe_file
from llm_trainer.train.reporter import Reporter
from llm_trainer.train.retry import one_message, recall
from llm_trainer.train.rows import LaidOut
from llm_trainer.train.saving import Wanted
from llm_trainer.train.signals import EXIT_INTERRUPTED, Signals, TrainingInterrupted
from llm_trainer.train.size import Size, shares_of_peak
from llm_trainer.train.sources import open_sources
from llm_trainer.train.work import Work

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings


class Run:
    """Everything that happens around the steps of a trainer; see `BaseTrainer` for the arguments.

    Attributes:
        engine: executes the steps.
        source: where they come from.
        val_sources: validation data by name.
        progress: where the run stands.
        driver: the loop, or another library's.
    """

    def __init__(
        self,
        trainer: Algorithm,
        settings: "Settings",
        *,
        train_loader: Any,
        val_loader: Any,
        device: str | None,
        max_epochs: int,
        grad_accum_steps: int,
        max_grad_norm: float | None,
        use_amp: bool,
        use_ddp: bool | None,
        log_interval: int,
        save_dir: str,
        save_interval: int,
        hooks: Sequence[Hook],
    ) -> None:
        counts = {"max_epochs": max_epochs, "grad_accum_steps": grad_accum_steps, "log_interval": log_interval}
        preflight.check_numbers(max_grad_norm, **counts)
        self.trainer, self.settings = trainer, settings
        self.max_epochs, self.accumulation = max_epochs, grad_accum_steps
        self.log_interval, self.save_interval = log_interval, save_interval
        self.save_dir = Path(save_dir)
        self.log_dir = Path(settings.log_dir) if settings.log_dir else self.save_dir / "log"
        self._user_hooks = with_names_of_their_own(hooks)

        # The machine: device, processes, engine, driver.
        place = detect_device(device)
        self._is_together = together = environment().world_size > 1 if use_ddp is None else use_ddp
        if together:
            join_processes(place, engine_of(settings), settings.fsdp, settings.ddp_timeout_s)
        self.engine = choose_engine(settings, place, use_amp, together)
        self.driver: Callable[..., None] = choose_driver(settings)

        # Where the run stands, and what it remembers between two log lines.
        self.progress = Progress()
        self.signals = Signals()
        self.stop_requested = self.new_best = False
        self.values: dict[str, float] = {}
        self._last_batch: Any = None
        self._metrics = Metrics(self.engine.device)
        self._clock = Clock()
        self._learning = Learning(self.say)
        self._reporter = Reporter(dist.is_main(), self.progress)
        keep = settings.checkpoints_to_keep
        self.checkpoints = snapshot.Checkpoints(self.engine, self.save_dir, keep, self._reporter.warn)
        self.compiling = Compiling(settings.compile, self.engine, engine_of(settings))
        self._max_grad_norm = max_grad_norm or 0.0

        # What the algorithm may ask; its sources of steps may ask it too.
        self.machine = RunMachine(
            self.engine,
            settings,
            self.compiling,
            self.progress,
            self._metrics,
            self.save_dir,
            self.signals.stop,
            self.say,
        )
        self.machine.trainer, trainer.machine = trainer, self.machine

        # The data: this rank's share of the training data, and of every validation set.
        with self._on_duty():
            threads = settle_threads(together)
            read_once = max_epochs == 1 or settings.max_steps is not None
            training = {"accumulation": grad_accum_steps, "read_once": read_once}
            source, val_sources = open_sources(
                train_loader, val_loader, settings, self.engine, together, trainer.sides, training
            )
            self.source: StepSource = trainer._build_source(source, training=True)
            self.val_sources: dict[str, StepSource] = {}
            for name, val_source in val_sources.items():
                self.val_sources[name] = trainer._build_source(val_source, training=False)
            machine = sizing.describe_machine(self.engine, self._is_together)
        precision = None
        is_open = settings.precision == "auto" and use_amp
        if is_open and choose_precision("auto", place) == self.engine.precision_name:  # not what a DeepSpeed JSON says
            precision = precision_choice(self.engine.precision_name, place.type)
        for choice in (precision, *settings.choices, threads):
            if choice is not None:
                self.chosen(choice)
        sources = [self.source, *self.val_sources.values()]
        self.budget = Budget(settings.micro_batch_tokens, sources, machine, may_cut(trainer))
        self.machine.budget = self.budget
        self.machine.rows = LaidOut(settings.packing, self.source, trainer, self.engine, together)

    def prepare(self, module: nn.Module) -> nn.Module:
        """Place and wrap the trained module; switch on what the settings ask of it."""
        model = self.trainer.saved_model
        preflight.check_optimizer(self.trainer.optimizer, model, module)
        preflight.check_adapters(model, self.settings, self.engine)
        with self._on_duty():
            begin_adapters(self.work, module, self._is_together)
        keep_layout(module)
        if self.settings.gradient_checkpointing:
            recompute_activations(members_of(model).values(), self.engine.device, self.settings)
        self.compiling.add(module)
        # Now: an engine may leave nothing to count in the parameters themselves.
        with self._on_duty():
            saved_bytes = self.checkpoints.bases.look_at(model)
        lengths = preflight.mean_row_length(self.source), preflight.mean_patches(self.source)
        self.size = Size.of(model, self.trainer.optimizer, lengths[0], saved_bytes, lengths[1])
        with self._on_duty():
            prepared = self.engine.prepare(module, model, self.trainer.optimizer)
        self._configured = ConfiguredOptimizer(self.trainer)
        self._buffers = SharedBuffers(model)
        return prepared

    @property
    def work(self) -> Work:
        """What a driver is given."""
        return Work(
            algorithm=self.trainer,
            engine=self.engine,
            source=self.source,
            val_sources=self.val_sources,
            budget=self.budget,
            compiling=self.compiling,
            metrics=self._metrics,
            horizon=self.horizon,
            run=self,
            stop_requested=self.signals.stop,
            seed=self.settings.seed,
            max_grad_norm=self._max_grad_norm,
        )

    @property
    def horizon(self) -> Horizon:
        """How far the run goes."""
        return Horizon(self.max_epochs, self.settings.max_steps, self.source.num_steps())

    # Running.

    def fit(self) -> dict[str, float]:
        """Train to the end: see `BaseTrainer.train`."""
        folder, on_duty, explained = self.checkpoints, self._on_duty(), self.compiling.explained()
        with folder.alone(), self.signals.listening(), workers_needed(), folder.saved_at_the_end(), on_duty, explained:
            self._resume()
            self._choose_kernels()
            recall(self.budget, self.save_dir)
            self.stop_requested = False
            self.values = {}
            for values in self.progress.lines:
                self.values.update(values)
            # A checkpoint of a step holds what all hooks did there: a run that goes on from it calls none of them again.
            *own, save = self._built_in_hooks()
            self._hooks = [*own, *self._user_hooks, save]
            if self.finished() and not any(hook.is_due(self, finished=True) for hook in self._hooks):
                return self._nothing_to_do()
            sizing.settle(self.work, self.size, self.settings)
            self._open()
            try:
                self._call_hooks()  # whatever a signal left undone
                if not self.finished():
                    self.trainer.model.train()
                    self._buffers.begin()
                    self._drive()
                if not self.finished():  # the driver of another library ends when a callback of it says so
                    self.stop("training was ended before its last step")
                    self._call_hooks()
                self.checkpoints.saving.finish()
                self.checkpoints.publish()
                return dict(self.values)
            finally:
                rollouts = innermost(self.source)
                if isinstance(rollouts, RolloutSource):
                    rollouts.stop()
                self._reporter.close()

    def _drive(self) -> None:
        """Let the driver take steps until the run is over, or a source of steps has stopped for a signal."""
        try:
            with one_message():
                self.driver(self.work, self.progress, self.after)
        except Stopped:  # between two steps: no step and no epoch is to be counted
            self.stop_requested = True
            self._call_hooks()

    def _on_duty(self) -> AbstractContextManager[None]:
        """The context in which the ranks of this run need each other."""
        if not self._is_together:
            return nullcontext()
        return dist.on_duty(lambda: self.checkpoints.how_to_go_on(self.settings.resume))

    def finished(self) -> bool:
        """Whether the last step has been done."""
        return self.horizon.reached(self.progress)

    def after(self, done: StepDone | None) -> bool:
        """Note a step, or with None the end of an epoch, and call the hooks that are due; whether the run is over.

        Raises:
            NonFiniteError: `max_bad_steps` steps in a row were not finite. Nothing was updated by any of them.
            TrainingInterrupted: a signal came; the state is saved.
            NothingLearned: the last epoch ends, and there was no step in any.
            NothingCounts: the run is over, and nothing counted in any of its steps.
        """
        if done is None:
            self._end_epoch()
        else:
            self._account(done)
            self._choose_kernels()
        if self.finished():
            self._learning.check(self.progress.step, is_over=True)
        self._call_hooks()
        return self.finished()

    def _end_epoch(self) -> None:
        source, rollout = innermost(self.source), 0
        if isinstance(source, RolloutSource):
            rollout = source.following  # the last ones of the epoch may have given no step, and are not made again
        self.progress.next_epoch(rollout)
        if self.finished() and not self.progress.step:
            raise nothing_learned(source)

    def _account(self, done: StepDone) -> None:
        """Note a finished step, in `progress`, in the metrics and in the schedule."""
        said = self._buffers.share()
        if said:
            self.say(said)
        progress = self.progress
        progress.tokens += done.tokens
        progress.train_seconds += done.seconds + done.waited
        progress.learning_rate = rate_of_run(self.trainer.optimizer)  # the one that the step was taken with
        progress.lines, progress.words = [], ""
        pixels = sum(num_pixels(micro_batch.batch) for micro_batch in done.batches if micro_batch.counts)
        self._clock.add(done.tokens, done.seconds + done.waited, pixels)
        if isinstance(innermost(self.source), RolloutSource):
            self._metrics.add("seconds/learn", done.seconds)
            self._metrics.add("tokens_per_second/learn", done.tokens, done.seconds)
        self._learning.note(done)
        self._last_batch = done.batches[-1].batch
        self.new_best = False
        self.stop_requested = self.stop_requested or done.stop
        if done.finite:
            progress.bad_steps = 0
            world = dist.world_size()
            self._metrics.add("loss", done.loss, 1 / world)
            self._metrics.add("grad_norm", done.grad_norm / world, 1 / world)
            schedules.after_update(self.trainer.scheduler)
            self.trainer.regulariser.after_update()  # after `share`, which is for what forwards change
        else:
            self._skip(done)
        progress.advance(done.position)
        self._reporter.note_learning_rate(progress.step, progress.learning_rate)
        self._note(self.compiling.after(done, steps_left(self.horizon, progress)))
        has_grown = self.budget.compiled(self.compiling.is_on)
        if has_grown:
            release(self.engine.device)  # buffers of the size of before leave holes that those to come do not fill
        choice = self.budget.choice()
        if choice is not None:
            self.chosen(choice, is_said=not has_grown)  # a smaller one was said when something did not fit

    def _choose_kernels(self) -> None:
        """Compile the kernels of head and attention as the user says, or once the run is long enough to earn it back."""
        per_token, wanted = self.size.flops_per_token, self.settings.compile
        if wanted is False:
            compile_after(0.0)
        elif wanted is True or per_token is None:
            compile_after(None)
        elif compile_after(per_token * self.progress.tokens) and self.engine.device.type == "cpu":
            self.chosen(KERNELS)

    def _skip(self, done: StepDone) -> None:
        """Count a step whose gradient was not finite, keep its batches for inspection, stop after too many in a row."""
        progress = self.progress
        progress.bad_steps += 1
        progress.skipped_steps += 1
        step, loss = progress.step + 1, dist.all_reduce(done.loss).item()
        kept = guards.keep_batches(done.batches, step, self.save_dir)
        message = f"step {step}: loss {loss:g}, gradient not finite; the update was skipped, {kept}"
        self._reporter.warn(message)
        limit = self.settings.max_bad_steps
        if self.engine.state_dict()["scaler"]:
            limit += 20  # fp16 finds its loss scale so
        if progress.bad_steps >= limit:
            cause = guards.likely_cause(loss, guards.broken_tensor(self.engine, self.trainer.saved_model))
            raise guards.NonFiniteError(
                f"{message}. {progress.bad_steps} steps in a row were not finite, so the run stops; nothing was updated "
                f"by them. Likely cause: {cause}. Last valid checkpoint: {self.checkpoints.newest_for_messages()}"
            )

    def _call_hooks(self) -> None:
        """Call the hooks that are due; after a signal, save and stop the process with exit code 75."""
        was_finished = self.finished()
        for hook in self._hooks:
            if self.stop_requested or not hook.is_due(self, self.finished()):
                continue
            self._call(hook)
            if self.finished() and not was_finished:
                return self._call_hooks()  # this hook ended the run: those before it may be due at the end
        if self.stop_requested:
            path = self.save(is_best=self.new_best)
            self.say(f"interrupted at step {self.progress.step}: saved {path}; start the same command again to go on")
            raise TrainingInterrupted(EXIT_INTERRUPTED)

    def _call(self, hook: Hook) -> None:
        """Call a hook. If it fails, on all ranks alike, the step before it is saved; a run that goes on calls it again."""
        before = BeforeHook(self.progress, self._metrics)
        place = f"step {self.progress.step}, hook {hook.name}"
        self.progress.hooks_done[hook.name] = self.progress.step
        dist.reached(place)
        try:
            hook.call(self)
        except Stopped:
            raise
        except Exception as error:
            if hook.name != "save" and dist.all_fail(place, error):
                before.go_back()
                self._save_after(error, place)
            raise

    def _save_after(self, error: Exception, place: str) -> None:
        """Save before `error` ends the run; if that fails too, it is a warning, since `error` matters more."""
        failed = f"{place}, failed with {type(error).__name__}"
        if is_out_of_memory(error):
            let_go(error)
            release(self.engine.device)
        try:
            path = self.save(is_best=self.new_best)
        except Exception as another:
            why = " ".join(str(another).split())[:300]
            self._reporter.warn(f"{failed}, and what came before it could not be saved: {why}")
            return
        how = snapshot.ways_on(self.settings.resume)
        self.say(f"{failed}; all before it is saved in {path}: {how}, beginning with this hook")

    # Before the first step.

    def _resume(self) -> None:
        wanted = self.settings.resume
        if wanted == "never" or self.progress.step:
            return
        path = self.checkpoints.newest() if wanted == "auto" else wanted
        if path is not None:
            self.load(path)
            self.say(f"continuing from {path}: step {self.progress.step}, epoch {self.progress.epoch + 1}")

    def _nothing_to_do(self) -> dict[str, float]:
        """Say so; returns the last metrics."""
        self.checkpoints.publish()
        why = "stopped early" if self.progress.stopped_early else "raise n_epochs (or max_steps) to go on"
        self.say(f"already finished at step {self.progress.step}, nothing to do: {why}")
        return dict(self.values)

    def _open(self) -> None:
        """Check the weights, show what is about to happen, and open the logs."""
        schedules.check(self.trainer.scheduler, is_evaluated=bool(self.val_sources))
        guards.check_weights(self.engine, self.trainer.saved_model)
        if self.save_interval or self.settings.save_interval_steps:
            self._may_save_behind()
        self.checkpoints.set_later_aside(self.progress.step, self.log_dir)  # an unwritable folder shows here
        self.checkpoints.describe(self.settings.description)
        self._note(self.compiling.choice(steps_left(self.horizon, self.progress)))
        facts = preflight.facts(self.work, self.size, self.settings, self.accumulation)
        folders = {"checkpoints": str(self.save_dir), "logs": str(self.log_dir)}
        slow = slow_kernel(self.trainer.optimizer)
        if slow:
            facts["optimizer"] = slow
        if self._configured.changes:
            facts["changed"] = f"since the checkpoint: {', '.join(self._configured.changes)}"
        for choice in (self.machine.layout.choice, self.budget.choice()):
            if choice is not None:
                self.chosen(choice)
        own = {name: str(value) for name, value in self.trainer._get_extra_config_info().items()}
        self.say(preflight.screen(facts | folders | own, self.settings.ledgers, [*self.choices.values()]))
        if self.size.adapters is not None:
            self._reporter.facts["adapters"] = self.size.adapters.as_dicts()
        self._reporter.open(self.log_dir, self.save_dir, self.settings, self.horizon.total())

    # The hooks of every run.

    def _built_in_hooks(self) -> list[Hook]:
        """In the order in which they are called; saving is the last one."""
        eval_steps, save_steps = self.settings.eval_interval, self.settings.save_interval_steps
        eval_epochs = 1 if eval_steps is None else None
        save_epochs = self.save_interval if save_steps is None else None
        hooks = [Hook("log", lambda run: self._log(), self.log_interval, at_end=True)]
        if self.val_sources:
            hooks.append(Hook("evaluate", lambda run: self._evaluate(), eval_steps, eval_epochs, at_end=True))
        may_show = self.trainer.eval_prompts and self.trainer.processor is not None
        if self.trainer.eval_image_tags or may_show:
            prompts_of(self.trainer, chat_of(self.trainer))  # what is wrong with them is an error now
        if self.trainer.eval_prompts:
            hooks.append(Hook("sample", lambda run: self.sample(), eval_steps, eval_epochs, at_end=True))
        save = Hook(
            "save", lambda run: self._save(), save_steps, save_epochs, at_end=True, when=lambda run: self.new_best
        )
        return [*hooks, save]

    def _log(self) -> None:
        """Write the metrics since the last call."""
        self._learning.check(self.progress.step, is_over=False)
        values = self._metrics.reduce(dist.all_reduce)
        if not values:
            return
        if self.size.flops_per_pixel:
            (self._clock.pixels,) = dist.sum_numbers([self._clock.pixels], self.engine.device)  # of all ranks
        shares = shares_of_peak(self.size, self.engine)
        self.write(values | self._clock.read(self.progress, self.source.size(), shares))
        words = "" if self._last_batch is None else self.trainer._get_extra_log_info(self._last_batch)
        if words:
            self._reporter.note_words(words)

    def _evaluate(self) -> None:
        """Evaluate; remember the best, lower a plateau schedule, stop early after too many evaluations without progress."""
        values = self.evaluate()
        progress, settings = self.progress, self.settings
        if self.stop_requested:
            progress.hooks_done.pop("evaluate", None)  # cut short by a signal: a resumed run evaluates again
            return
        if values:
            self.write(values)
        for name in unmeasured(self.val_sources, values):
            self._reporter.warn(
                f"step {progress.step}: {name} could not be measured, since nothing in this validation data counts in the "
                "loss; expected labels that are not all -100: look at its rows, and at what truncation leaves of them"
            )
        name, highest = self.trainer.best_metric, self.trainer.best_is_highest
        value = values.get(name)
        if value is None:
            return  # nothing was measured, which is no lack of progress
        if progress.note_loss(value, settings.early_stopping_min_delta, highest):
            self.new_best = True
        sign = -1 if highest else 1
        schedules.after_evaluation(self.trainer.scheduler, sign * value)
        patience = settings.early_stopping_patience
        if patience is not None and progress.evals_without_progress >= patience:
            self.stop(
                f"stopped early: {patience} evaluations without progress, best {name} {progress.best_loss} at step "
                f"{progress.best_step}"
            )

    def sample(self) -> None:
        """Answer `eval_prompts` with the model as it is now, and show the answers."""
        if self.engine.in_lockstep:
            return self._show_answers()
        failure = None
        if dist.is_main():
            try:
                self._show_answers()
            except Exception as error:
                failure = error
        dist.fail_together(failure)  # the others wait, so that what comes before it can be saved

    def _show_answers(self) -> None:
        answers = answer(self.trainer, self.engine, self.settings.sampling, self.settings.seed)
        for prompt, text in zip(self.trainer.eval_prompts, answers, strict=True):
            self._reporter.note_answer(self.progress.step, prompt, text)

    def _save(self) -> None:
        """Save a checkpoint; a disk that is full now is reported and tried again at the next turn, except at the end."""
        goes_on = not self.finished()
        self.save(is_best=self.new_best, may_fail=goes_on, background=goes_on and self._may_save_behind())

    def _may_save_behind(self) -> bool:
        """Whether checkpoints may be written while training goes on; the memory for it is then taken."""
        needed = self.engine.bytes_to_copy(self.size.saved_bytes, self.size.optimizer_bytes)
        if self.engine.held is not None:
            needed += self.engine.held.num_bytes
        return self.settings.save_in_background and self.checkpoints.saving.has_memory(needed)

    @property
    def choices(self) -> Mapping[str, Choice]:
        """What was left to the machine, by name."""
        return self._reporter.choices

    def chosen(self, choice: Choice, is_said: bool = False) -> None:
        """Show what the machine chose before the first step, or say it at once if training is under way, and log it.

        Args:
            is_said: it was said in other words.
        """
        if not self.settings.description:
            choice = choice.as_keyword()
        self._reporter.note_choice(choice, is_said)

    def _note(self, choice: Choice | None) -> None:
        if choice is not None:
            self.chosen(choice)

    # What hooks may ask (`hooks.RunView`), besides `trainer`, `progress` and `values`; trainers ask it too.

    def say(self, message: str) -> None:
        """Print on the main process, above any progress bar."""
        self._reporter.say(message)

    def write(self, values: dict[str, float]) -> None:
        """Give metrics to all writers."""
        self.values.update(values)
        self._reporter.write(values)

    def evaluate(self) -> dict[str, float]:
        """Metrics of the validation set.

        Raises:
            ValueError: there is no validation set.
        """
        if not self.val_sources:
            raise ValueError("nothing to evaluate: give a val_loader (or eval_dataset)")
        with self.compiling.explained():
            values, interrupted = evaluate(self.work)
        self.stop_requested = self.stop_requested or interrupted
        return values

    def save(
        self, is_best: bool = False, path: str | None = None, may_fail: bool = False, background: bool = False
    ) -> str:
        """Save on the main process; every rank learns how it ended. See `BaseTrainer.save_checkpoint`.

        Args:
            is_best: this is the best checkpoint so far.
            path: write only a single `.pt` file there.
            may_fail: a full disk is a warning, not an error.
            background: it is written while training goes on; that it could not be is a warning at the next save.

        Returns:
            Path of what was written, on every rank; empty where nothing could be.
        """
        self.checkpoints.finish_last()
        state = snapshot.state_of(self.work, self.progress, self._configured, self.settings)
        if path is not None:
            return self.checkpoints.save_file(path, self.trainer.saved_model, state)
        best_loss = self.progress.best_loss if is_best else None
        best_file = is_best and self.settings.best_file
        beside: dict[str, bytes] = {}
        # At its last step an epoch is not over yet.
        is_last = self.finished() or self.progress.step == self.horizon.total()
        if (is_best or is_last) and not self.stop_requested:  # what `model` in the folder may lead to
            beside = probe_file(self.trainer, self.engine, self.progress.step)
        wanted = Wanted(self.progress.step, is_best, best_loss, best_file, background, beside)
        saved = self.checkpoints.save(self.trainer, state, wanted, may_fail)
        if saved:
            self.new_best = False
            self.progress.hooks_done["save"] = self.progress.step
        return saved

    def stop(self, reason: str) -> None:
        """End the run after this hook, as if it had reached its last step."""
        self.progress.stopped_early = True
        self.progress.hooks_done.pop("save", None)  # a checkpoint of this step must say so
        self.say(reason)

    def load(self, path: str) -> None:
        """Restore everything from a checkpoint folder or `.pt` file, on every rank."""
        parts = snapshot.parts_of(self.work, self.progress, self._configured)
        self.checkpoints.load(path, self.trainer.saved_model, parts)
