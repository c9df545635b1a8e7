"""BaseTrainer: what an algorithm must say. Everything else (loop, engines, checkpoints, logging) is elsewhere."""

from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from llm_trainer.config.options import Settings

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.data.stream import Batch, StepSource
    from llm_trainer.trainers.building import Build, Sketch


class TrainerMeta(ABCMeta):
    """The door of the config style: `X(train_config=c, **more)` means `X(**{**assemble(c, X), **more})`."""

    def __call__(cls, *args: Any, train_config: "TrainConfig | None" = None, **kwargs: Any) -> Any:
        if train_config is not None:
            from llm_trainer.assemble import assemble

            described = assemble(train_config, cast("type[BaseTrainer]", cls), given=kwargs)
            kwargs = {**described, **kwargs}  # explicit keywords win
        return super().__call__(*args, **kwargs)


class BaseTrainer(metaclass=TrainerMeta):
    """One algorithm, trained by the one loop.

    A subclass must write `_prepare_batch`, `_forward` and `_compute_loss`; it may write the other underscored methods
    of this class. It never overrides `train`.

    Args:
        model: the module to train.
        optimizer: an optimizer of its parameters.
        train_loader: iterable of micro-batches, re-iterable once per epoch.
        val_loader: evaluated each epoch (or every `eval_interval` steps); the best model is kept. Several, by name, are
            evaluated together, and each by itself as `eval_<name>_loss`, ....
        scheduler: anything with `step()`, `state_dict()` and `load_state_dict()`; stepped once per optimizer step.
        device: a torch device or its name; None detects.
        max_epochs: passes over `train_loader`.
        grad_accum_steps: micro-batches per optimizer step and rank.
        max_grad_norm: the gradient is scaled down to this norm; 0 does not clip.
        use_amp: mixed precision where the hardware has it (see `Settings.precision`).
        use_ddp: None detects torchrun; False trains alone whatever the environment says.
        log_interval: steps between log lines.
        save_dir: where checkpoints and logs go.
        save_interval: epochs between checkpoints; 0: none but the last.
        tokenizer: saved with the model; needed for `eval_prompts`.
        eval_prompts: prompts answered at every evaluation.
        hooks: `Hook`s called by the loop, besides the built-in ones.
        **options: fields of `Settings`.
    """

    section: ClassVar[str] = ""  # the key of its options in a configuration, such as "sft_config"
    # Whether only the main process needs the first weights, where they are then sharded: False if anything else is made of
    # them before, such as a copy to compare with.
    shards_first_weights: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_loader: Any,
        val_loader: Any = None,
        scheduler: Any = None,
        device: torch.device | str | None = None,
        max_epochs: int = 10,
        grad_accum_steps: int = 1,
        max_grad_norm: float = 1.0,
        use_amp: bool = True,
        use_ddp: bool | None = None,
        log_interval: int = 10,
        save_dir: str = "./checkpoints",
        save_interval: int = 1,
        *,
        tokenizer: Any = None,
        eval_prompts: Sequence[str] = (),
        hooks: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        from llm_trainer.train.run import Run

        self.base_model = model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.tokenizer, self.eval_prompts = tokenizer, list(eval_prompts)
        self.run = Run(
            self,
            Settings.of(type(self).__name__, options),
            train_loader=train_loader,
            val_loader=val_loader,
            device=None if device is None else str(device),
            max_epochs=max_epochs,
            grad_accum_steps=grad_accum_steps,
            max_grad_norm=max_grad_norm,
            use_amp=use_amp,
            use_ddp=use_ddp,
            log_interval=log_interval,
            save_dir=save_dir,
            save_interval=save_interval,
            hooks=hooks,
        )
        self.device = self.run.engine.device
        self.model = self.run.prepare(self._build_module(model))

    # What an algorithm must say.

    @abstractmethod
    def _prepare_batch(self, batch: Any) -> Any:
        """Everything before autograd: move to the device, join, score with frozen models."""

    @abstractmethod
    def _forward(self, batch: Any) -> Any:
        """What autograd sees: the forward of `self.model`."""

    @abstractmethod
    def _compute_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """The micro-batch's loss, scalar: a MEAN over as many terms as `_loss_weight` counts."""

    # What an algorithm may say.

    def _loss_weight(self, batch: Any) -> float | torch.Tensor:
        """Number of terms that the loss of `batch` is a mean of; 1 gives the textbook loss / accumulation."""
        return 1.0

    def _begin_step(
        self, batches: list[Any], weights: list[float], sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """See all micro-batches of an optimizer step before the first of them runs, without gradients.

        For a loss with a second denominator, or with an estimate that is made from the whole step.

        Args:
            batches: this rank's micro-batches, as they came from the loader.
            weights: `_loss_weight` of each; 0 for a batch that only keeps a rank without rows in step.
            sum_over_ranks: sums a tensor over the processes; in evaluation, where every batch is a step, it does not.
        """

    def _end_step(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Act after the last backward of a training step, before the update."""

    def _count_tokens(self, batch: Any) -> int:
        """Tokens of a micro-batch, for tokens/s."""
        return batch["input_ids"].numel()

    def _train_steps(self, source: "StepSource", epoch: int, position: int) -> "Iterator[tuple[list[Batch], int]]":
        """Optimizer steps as (micro-batches of this rank, position after them); reinforcement learning overrides it."""
        return source.steps(epoch, position)

    def _build_module(self, model: nn.Module) -> nn.Module:
        """The module that the engine wraps and `_forward` calls: `model` itself, or around it."""
        return model

    def _get_extra_config_info(self) -> dict[str, Any]:
        """Facts of this algorithm for the screen before training."""
        return {}

    def _get_extra_log_info(self, batch: Any) -> str:
        """A few words for the log line, from the last micro-batch."""
        return ""

    def _get_extra_checkpoint_state(self) -> dict[str, Any] | None:
        """State of this algorithm (JSON types) that a checkpoint must hold."""
        return None

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        """Restore what `_get_extra_checkpoint_state` gave."""

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        """Keywords of this algorithm's own constructor, from `build.section`; models and data are asked of `build`."""
        return {}

    @classmethod
    def _model_from_config(cls, config: "TrainConfig", build: "Build") -> nn.Module:
        """The model to train, if the caller does not give one."""
        return build.model()

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        """What this algorithm costs beyond the forward and backward of its model, as keywords of `plan.shapes.Job`.

        That is `rows_per_sample`, sequences per row of data; `has_head`, False for a model that gives one number in place
        of a distribution over the vocabulary; and what `sketch.frozen` says of references and teachers.
        """
        return {}

    # What everybody can call.

    def record(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1.0) -> None:
        """Add to the metric `name`: its logged value is sum of totals / sum of counts, over steps and ranks."""
        if self.run.recording:
            self.run.metrics.add(name, total, count)

    def train(self) -> dict[str, float]:
        """Train to the end; returns the last metrics. Stops with exit code 75 after a SIGTERM or SIGINT, state saved."""
        return self.run.fit()

    def evaluate(self) -> dict[str, float]:
        """Metrics of `val_loader` (`eval_loss`, ...)."""
        return self.run.evaluate()

    def save_checkpoint(self, is_best: bool = False, path: str | None = None) -> str:
        """Save everything needed to go on: a checkpoint folder in `save_dir`, and with `is_best` `best_model.pt` too.

        Args:
            is_best: also write the single file `save_dir`/best_model.pt.
            path: write only a single `.pt` file there.

        Returns:
            Path of what was written.
        """
        return self.run.save(is_best=is_best, path=path)

    def load_checkpoint(self, path: str) -> None:
        """Restore weights, optimizer, scheduler, progress and data position from a checkpoint folder or `.pt` file."""
        self.run.load(path)
