"""`transformers.Trainer` as a second driver: it turns the wheel, and the run keeps everything that happens around a step.

Forward, backward, accumulation, wrapping (accelerate), clipping, update and schedule are called by transformers' loop;
batches, weights, metrics, evaluation, checkpoints, signals and resuming are the run's, as under `loop.fit`.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_trainer import checkpoint
from llm_trainer.config.env import environment
from llm_trainer.engine import dist
from llm_trainer.engine.torch import TorchEngine

if TYPE_CHECKING:
    from llm_trainer.data.stream import Batch
    from llm_trainer.train.loop import Step
    from llm_trainer.train.run import Run
    from llm_trainer.trainers.base import BaseTrainer

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


def train(trainer: "BaseTrainer", callbacks: Sequence[TrainerCallback] = (), **arguments: Any) -> dict[str, float]:
    """Train to the end with `transformers.Trainer`, like `trainer.train()` of a trainer with `engine="hf"`: see `fit`."""
    trainer.run.driver = partial(fit, callbacks=callbacks, **arguments)
    return trainer.train()


def fit(run: "Run", callbacks: Sequence[TrainerCallback] = (), **arguments: Any) -> None:
    """Train a run with `transformers.Trainer` in place of `loop.fit`: the same steps, losses and gradient norms.

    Args:
        run: any trainer's; its engine must not have wrapped the module (`engine="hf"`, or one process).
        callbacks: called by transformers; they also hear of the run's own logs, evaluations and saves.
        arguments: fields of `TrainingArguments`. Logging, evaluation and saving by transformers are off unless they are
            asked for here; the evaluation and the checkpoint are then the run's, at transformers' moments.

    Raises:
        ValueError: an argument contradicts the run, or transformers cannot do what the run is set to.
        NonFiniteError: see `loop.train_step`.
    """
    if run.finished():
        return
    random = checkpoint.random_state()  # transformers seeds everything anew
    driver = Driver(run, _training_arguments(run, arguments), list(callbacks))
    checkpoint.set_random_state(random)
    driver.train()
    if not run.finished():  # a callback has ended the training
        run.progress.stopped_early = True
        run.after_step()


def _training_arguments(run: "Run", given: dict[str, Any]) -> TrainingArguments:
    for name, excluded in OF_THE_RUN.items():
        for argument in given.keys() & excluded:
            raise ValueError(
                f"{argument}={given[argument]!r}: the run decides this; set the trainer's `{name}` instead"
            )
    _check_engine(run)
    model = run.trainer.model
    defaults: dict[str, Any] = {
        "output_dir": str(run.save_dir),
        "max_steps": (run.total_steps() or sys.maxsize - 1) + 1,  # never reached: the run says when it ends
        "max_grad_norm": run.max_grad_norm,
        "seed": run.settings.seed,
        "use_cpu": run.engine.device.type == "cpu",
        "use_cache": isinstance(model, transformers.PreTrainedModel) and model.config.use_cache,
        "ddp_find_unused_parameters": False,
        "logging_strategy": "no",
        "logging_nan_inf_filter": False,  # it waits for the device after every micro-batch
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = TrainingArguments(**(defaults | given))
    arguments.mixed_precision = (
        "no"  # accelerate's launcher may say something else; the run sees to it, see `compute_loss`
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one process trains on one GPU; transformers would take all it sees
    ours, theirs = run.engine.device, arguments.device
    if (ours.type, ours.index or 0) != (theirs.type, theirs.index or 0):
        raise ValueError(f"device: got {ours}, but engine 'hf' trains on {theirs}; choose it with CUDA_VISIBLE_DEVICES")
    return arguments


def _check_engine(run: "Run") -> None:
    engine, launched = run.engine, environment().world_size
    if type(engine) is not TorchEngine or engine.ddp:
        raise ValueError(
            f"engine: got {run.settings.engine!r}, whose {type(engine).__name__} has wrapped the model; transformers wraps "
            f"it by itself: make the trainer with engine='hf'"
        )
    if engine.precision_name == "fp16":
        raise ValueError("precision: engine 'hf' has no loss scale for fp16; use bf16 or fp32, or engine 'torch'")
    if launched != dist.world_size():
        raise ValueError(
            f"use_ddp=False, but engine 'hf' trains with all {launched} processes; start one, or use 'torch'"
        )


class Driver(transformers.Trainer):
    """Sees a whole optimizer step of the run as one batch, because the number of micro-batches may differ from step to step."""

    step: "Step"
    position: int  # in the data, after `step`
    learning_rate: float
    grad_norm: Tensor  # of the whole gradient before clipping, scalar fp32
    finite: bool  # whether it is
    loss_is_scaled_for_ga = True  # a share is already one of the whole step, over micro-batches and ranks

    def __init__(self, run: "Run", arguments: TrainingArguments, callbacks: list[TrainerCallback]) -> None:
        self.run = run
        super().__init__(
            model=run.trainer.model,
            args=arguments,
            eval_dataset=run.val_sources or None,  # type: ignore[arg-type]  # only asked for whether it is there
            callbacks=[RunCallback(self), *callbacks],
            optimizers=(run.trainer.optimizer, Schedule(self)),  # type: ignore[arg-type]  # called, never inspected
        )
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> Any:
        return StepLoader(self.run)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, None]:
        """The next step, unscaled by any count of transformers' own; after the last one of the epoch none."""
        step = next(epoch_iterator, None)
        self.control.should_epoch_stop = step is None
        return [] if step is None else [step], None

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of all micro-batches; `[]` the loss whose mean over ranks is the step's."""
        from llm_trainer.train.loop import Step  # which imports this package

        micro_batches, self.position = inputs
        trainer = self.run.trainer
        self.step, unwrapped = Step(self.run, micro_batches), trainer.model
        trainer.model = model
        try:
            for index, last in self.step.indices():
                with nullcontext() if last else self.accelerator.no_sync(model):
                    super().training_step(model, {"index": index})
        finally:
            trainer.model = unwrapped
        trainer._end_step(dist.all_reduce)
        self.learning_rate = self.run.learning_rate()
        self.grad_norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).float()
        self.finite = bool(self.grad_norm.isfinite())  # the one place in a step where the host waits for the device
        return self.step.loss * dist.world_size()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        with self.run.engine.precision():
            loss = self.step.share(inputs["index"])
        return loss * dist.world_size()  # DDP averages over ranks what the step adds up

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the run counts them, as MFU

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The run's evaluation, for the arguments and callbacks that ask for one."""
        values = self.run.evaluate()
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
        self.run.save()


class StepLoader:
    """What is left of the epoch that the run is in, as `(micro-batches, position after them)`."""

    def __init__(self, run: "Run") -> None:
        self.run = run

    def __iter__(self) -> "Iterator[tuple[list[Batch], int]]":
        progress = self.run.progress
        return self.run.trainer._train_steps(self.run.source, progress.epoch, progress.position)


class Schedule:
    """The run's schedule, or the lack of one, as transformers steps it; a step that was refused does not count."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver

    def step(self) -> None:
        """Called after every step."""
        if self.driver.finite:
            self.driver.run.step_schedule()

    def get_last_lr(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [float(group["lr"]) for group in self.driver.run.trainer.optimizer.param_groups]


class RunCallback(TrainerCallback):
    """Does around transformers' steps and epochs what `loop.fit` does around its own."""

    def __init__(self, driver: Driver) -> None:
        self.driver, self.run = driver, driver.run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        progress, driver = self.run.progress, self.driver
        state.global_step = driver._initial_global_step = driver._globalstep_last_logged = progress.step
        state.max_steps, state.num_train_epochs = self.run.total_steps() or 0, self.run.max_epochs

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # accelerate's optimizer leaves out an update whose gradients are not yet those of all ranks.
        self.driver.accelerator.gradient_state._set_sync_gradients(self.driver.finite)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        progress = self.run.progress
        self.driver.step.end(self.driver.grad_norm, self.driver.learning_rate)
        progress.step, progress.position = progress.step + 1, self.driver.position
        self._after(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_epoch_stop:  # else the training stops within the epoch
            progress = self.run.progress
            progress.epoch, progress.position = progress.epoch + 1, 0
            self._after(args, state, control)

    def _after(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Call the run's hooks, and let the other callbacks hear of what they did."""
        run, driver = self.run, self.driver
        said, saved = len(run.progress.lines), run.progress.hooks_done.get("save")
        size = run.source.size()
        state.epoch = run.progress.epoch + (run.progress.position / size if size else 0.0)
        run.after_step()
        control.should_training_stop = run.finished()
        for values in run.progress.lines[said:]:
            driver.tell(values)
        if run.progress.hooks_done.get("save") != saved:
            driver.callback_handler.on_save(args, state, control)
