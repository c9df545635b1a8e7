"""`transformers.Trainer` as a second driver: it turns the wheel, and the run keeps everything that happens around a step.

Forward, backward, accumulation, wrapping (accelerate), clipping, update and schedule are called by transformers' loop;
batches, weights, metrics, evaluation, checkpoints, signals and resuming are the run's, as under `loop.fit`.
"""

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_trainer import checkpoint
from llm_trainer.config.env import environment
from llm_trainer.data.stream import mix_seeds
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.engine.unused import Unused
from llm_trainer.position import Position
from llm_trainer.state import MicroBatch, Progress, StepDone
from llm_trainer.train.retry import Attempt, DoesNotFit, Steps
from llm_trainer.train.terms import Totals, count_terms, fill_up, share_of_step
from llm_trainer.train.work import Work

# What the run says already -> the fields of TrainingArguments that would say something else.
OF_THE_RUN = {
    "grad_accum_steps": ("gradient_accumulation_steps",),
    "max_epochs": ("num_train_epochs",),
    "max_steps": ("max_steps",),
    "max_grad_norm": ("max_grad_norm",),
    "seed": ("seed", "data_seed"),
    "save_dir": ("push_to_hub",),
    "checkpoints_to_keep": ("save_total_limit", "save_only_model", "enable_jit_checkpoint"),
    "resume": ("resume_from_checkpoint", "ignore_data_skip", "load_best_model_at_end"),
    "precision": ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval"),
    "device": ("use_cpu",),
    "engine": ("deepspeed", "fsdp", "fsdp_config", "parallelism_config", "accelerator_config", "ddp_backend"),
    "compile": ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
    "gradient_checkpointing": ("gradient_checkpointing", "activation_checkpointing"),
    "optimizer": ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    "scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    "train_loader": (
        "per_device_train_batch_size",
        "auto_find_batch_size",
        "train_sampling_strategy",
        "remove_unused_columns",
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_pin_memory",
    ),
    "val_loader": ("per_device_eval_batch_size",),
    "model": ("neftune_noise_alpha", "use_liger_kernel", "use_cache"),
    "_compute_loss": ("label_smoothing_factor", "average_tokens_across_devices"),
    "_count_tokens": ("include_num_input_tokens_seen",),
}


After = Callable[[StepDone | None], bool]


def train(trainer: Any, callbacks: Sequence[TrainerCallback] = (), **arguments: Any) -> dict[str, float]:
    """Train to the end with `transformers.Trainer`, like `trainer.train()` of a trainer with `engine="hf"`: see `fit`."""
    trainer.run.driver = partial(fit, callbacks=callbacks, **arguments)
    return trainer.train()


def fit(
    work: Work, progress: Progress, after: After, callbacks: Sequence[TrainerCallback] = (), **arguments: Any
) -> None:
    """Train with `transformers.Trainer` in place of `loop.fit`: the same steps, losses and gradient norms.

    Args:
        work: its engine must not have wrapped the module (`engine="hf"`, or one process).
        progress: where the run stands.
        after: see `loop.fit`.
        callbacks: called by transformers; they also hear of the run's own logs, evaluations and saves.
        arguments: fields of `TrainingArguments`. Logging, evaluation and saving by transformers are off unless they are
            asked for here; the evaluation and the checkpoint are then the run's, at transformers' moments.

    Raises:
        ValueError: an argument contradicts the run, or transformers cannot do what the run is set to.
        NonFiniteError: see `Run.after`.
    """
    # transformers imports DeepSpeed where it is installed, and this run does not use it.
    logging.getLogger("DeepSpeed").addFilter(_is_not_about_its_choice)
    random = checkpoint.random_state()  # transformers seeds everything anew
    driver = Driver(work, progress, after, _training_arguments(work, arguments), list(callbacks))
    checkpoint.set_random_state(random)
    driver.train()  # a callback may end it early; the run notices


def _is_not_about_its_choice(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's log says more than which kind of device it has found."""
    return "Setting accelerator to" not in record.getMessage()


def _training_arguments(work: Work, given: dict[str, Any]) -> TrainingArguments:
    for name, excluded in OF_THE_RUN.items():
        for argument in given.keys() & excluded:
            raise ValueError(
                f"{argument}={given[argument]!r}: the run decides this; set the trainer's `{name}` instead"
            )
    engine = work.engine
    _check_engine(engine)
    model = work.algorithm.model
    defaults: dict[str, Any] = {
        "output_dir": str(work.run.save_dir),
        "max_steps": (work.horizon.total() or sys.maxsize - 1) + 1,  # never reached: the run says when it ends
        "max_grad_norm": work.max_grad_norm,
        "seed": work.seed,
        "use_cpu": engine.device.type == "cpu",
        "use_cache": isinstance(model, transformers.PreTrainedModel) and model.config.use_cache,
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # ranks may run different numbers of forwards
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # it waits for the device after every micro-batch
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**(defaults | given))
    # accelerate's launcher may say something else; the run sees to precision, see `compute_loss`.
    arguments.mixed_precision = "no"
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process trains on one GPU; transformers would take all it sees
    ours, theirs = engine.device, arguments.device
    if (ours.type, ours.index or 0) != (theirs.type, theirs.index or 0):
        raise ValueError(f"device: got {ours}, but engine 'hf' trains on {theirs}; choose it with CUDA_VISIBLE_DEVICES")
    return arguments


def _check_engine(engine: Engine) -> None:
    launched = environment().world_size
    if type(engine) is not TorchEngine or engine.ddp:
        raise ValueError(
            f"engine: got {engine.name!r}, whose {type(engine).__name__} has wrapped the model; transformers wraps it by "
            f"itself: make the trainer with engine='hf'"
        )
    if engine.precision_name == "fp16":
        raise ValueError("precision: engine 'hf' has no loss scale for fp16; use bf16 or fp32, or engine 'torch'")
    if launched != dist.world_size():
        raise ValueError(
            f"use_ddp=False, but engine 'hf' trains with all {launched} processes; start one, or use 'torch'"
        )


class Driver(transformers.Trainer):
    """Sees a whole optimizer step of the run as one batch, because the number of micro-batches may differ from step to step."""

    micro_batches: list[MicroBatch]  # of the step under way
    totals: Totals  # terms of that step's losses, over all ranks
    started: float  # when that step began, as `time.perf_counter` says it
    _exchanges: bool  # whether the backward in which DDP exchanges gradients has begun
    done: StepDone  # that step, but for its seconds
    loss_is_scaled_for_ga = True  # a share is already one of the whole step, over micro-batches and ranks

    def __init__(
        self,
        work: Work,
        progress: Progress,
        after: After,
        arguments: TrainingArguments,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.work, self.progress, self.after = work, progress, after
        self.ddp = dist.world_size() > 1
        self._unused = Unused(work.engine.device)
        self._unused.add_all(work.algorithm.model)
        self.loader = StepLoader(work, progress)
        optimizer = work.run.trainer.optimizer
        super().__init__(
            model=work.algorithm.model,
            args=arguments,
            eval_dataset=work.val_sources or None,  # type: ignore[arg-type]  # only asked for whether it is there
            callbacks=[RunCallback(self), *callbacks],
            optimizers=(optimizer, Schedule(optimizer)),  # type: ignore[arg-type]  # called, never inspected
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Any:
        return self.loader

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next step, unscaled by any count of transformers' own; after the last one of the epoch none."""
        step = next(epoch_iterator, None)
        self.control.should_epoch_stop = step is None
        return [] if step is None else [step], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all micro-batches, as in `loop.train_step`; `[]` the loss whose mean over ranks is the
        step's.
        """
        while True:
            try:
                return self._try_step(model, *inputs)
            except DoesNotFit as failure:
                self.loader.steps.again(failure)  # cut smaller; nothing has happened yet
                inputs = next(self.loader.steps)

    def _try_step(self, model: nn.Module, micro_batches: list[MicroBatch], position: Position) -> Tensor:
        algorithm, engine = self.work.algorithm, self.work.engine
        self.started = time.perf_counter()
        dist.reached(f"step {self.progress.step + 1}, beginning")
        torch.manual_seed(mix_seeds(self.work.seed, self.progress.step, dist.rank()))
        self.micro_batches = fill_up(engine, micro_batches)
        self.totals, tokens, stop = count_terms(algorithm, engine, self.micro_batches, self.work.stop_requested())
        self._unused.in_step()  # forget what an attempt before has used
        attempt = Attempt(self.work, partial(self._give_up, model))
        attempt.begin(self.micro_batches)
        self.loss_sum = torch.zeros((), device=engine.device)
        unwrapped, algorithm.model = algorithm.model, model
        try:
            for number in range(len(self.micro_batches)):
                dist.reached(f"step {self.progress.step + 1}, micro-batch {number + 1}")
                is_last = number == len(self.micro_batches) - 1
                self._unused.begin()
                self._exchanges = False
                quiet = nullcontext() if is_last else self.accelerator.no_sync(model)
                with attempt.part(number + 1), quiet:
                    super().training_step(model, {"number": number})
                    if self.ddp and is_last:
                        self._unused.complete()
            attempt.succeed()
        finally:
            algorithm.model = unwrapped
        dist.reached(f"step {self.progress.step + 1}, update")
        algorithm._end_step(dist.all_reduce)
        algorithm.regulariser.end(dist.all_reduce)
        if self.ddp:
            self._unused.drop()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norm = get_total_norm(gradients).float()
        grad_norm = norm.item()  # the one place in a step where the host waits for the device
        finite = math.isfinite(grad_norm)
        seconds = 0.0  # transformers' update is still to come, see `RunCallback.on_step_end`
        batches, totals = self.micro_batches, self.totals
        self.done = StepDone(self.loss_sum, grad_norm, finite, tokens, totals, seconds, stop, batches, position)
        return self.loss_sum * dist.world_size()

    def _give_up(self, model: nn.Module) -> None:
        """See `Engine.give_up_step`."""
        if isinstance(model, DistributedDataParallel):
            self._unused.make_up(model, self._exchanges)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """`[]` the share of one micro-batch, to be backpropagated by transformers."""
        work, algorithm = self.work, self.work.algorithm
        micro_batch = self.micro_batches[inputs["number"]]
        own = algorithm.loss_of(micro_batch)
        with work.engine.precision(), work.metrics.recording(micro_batch.counts):
            batch = own._prepare_batch(micro_batch.batch)
            outputs = own._forward(batch)
            loss = own._compute_loss(outputs, batch)
            share = share_of_step(loss, micro_batch, self.totals, outputs, algorithm)
        self.loss_sum += share.detach()
        # The backward is next. DDP around a single process exchanges in every one: accelerate does not hold it back there.
        self._exchanges = not self.ddp or inputs["number"] == len(self.micro_batches) - 1
        return share * dist.world_size()  # DDP averages over ranks what the step adds up

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the run counts them, as MFU

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The run's evaluation, for the arguments and callbacks that ask for one."""
        values = self.work.run.evaluate()
        self.tell(values)
        return values

    def tell(self, values: dict[str, float]) -> None:
        """Let the callbacks hear of metrics."""
        self.log(dict(values))
        if any(name.startswith("eval_") for name in values):
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        unknown = ("total_flos", "train_samples_per_second")  # of transformers' closing lines: it has seen no samples
        super().log({name: value for name, value in logs.items() if name not in unknown}, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.work.run.save()


class StepLoader:
    """What is left of the epoch that the run is in, as `(micro-batches, position after them)`."""

    steps: Steps  # of the epoch under way

    def __init__(self, work: Work, progress: Progress) -> None:
        self.work, self.progress = work, progress

    def __iter__(self) -> Steps:
        self.steps = Steps(self.work, self.progress)
        return self.steps


class Schedule:
    """The learning rates for transformers to look at; the run itself steps its schedule, after every update."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        """Called by transformers after every step."""

    def get_last_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]


class RunCallback(TrainerCallback):
    """Does around transformers' steps and epochs what `loop.fit` does around its own."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.progress = driver, driver.progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step, horizon = self.progress.step, self.driver.work.horizon
        state.global_step = self.driver._initial_global_step = self.driver._globalstep_last_logged = step
        state.max_steps, state.num_train_epochs = horizon.total() or 0, horizon.epochs

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # accelerate's optimizer leaves out an update whose gradients are not yet those of all ranks.
        self.driver.accelerator.gradient_state._set_sync_gradients(self.driver.done.finite)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = time.perf_counter() - self.driver.started
        waited = self.driver.loader.steps.waited
        self._after(replace(self.driver.done, seconds=seconds, waited=waited), args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_epoch_stop:  # else the training stops within the epoch
            self._after(None, args, state, control)

    def _after(
        self, done: StepDone | None, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """Let the run note the step and call its hooks, and the other callbacks hear of what they did."""
        progress, driver = self.progress, self.driver
        written_before = 0 if done is not None else len(progress.lines)  # a step begins new lines
        saved_before = progress.hooks_done.get("save")
        control.should_training_stop = driver.after(done)
        size = driver.work.source.size()
        epoch_share = progress.position / size if size else 0.0
        state.epoch = progress.epoch + epoch_share
        for values in progress.lines[written_before:]:
            driver.tell(values)
        if progress.hooks_done.get("save") != saved_before:
            driver.callback_handler.on_save(args, state, control)
