"""BaseTrainer: an algorithm (`algorithm.py` says what that is) with everything that a user calls."""

import inspect
from abc import ABCMeta
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.config.errors import fields_of
from llm_trainer.config.options import Settings
from llm_trainer.config.table import ALGORITHMS
from llm_trainer.layout import Packing, takes_images
from llm_trainer.models.inside import is_kind_of
from llm_trainer.models.packing import packing_of
from llm_trainer.models.scored import ScoredModel
from llm_trainer.models.seeing import see_in_every_batch
from llm_trainer.trainers.building import DataRequest
from llm_trainer.trainers.experts import regulariser_for

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build, Sketch


class TrainerMeta(ABCMeta):
    """The door of the config style: `X(train_config=c, **more)` means `X(**{**assemble(c, X), **more})`."""

    def __call__(cls, *args: Any, train_config: "TrainConfig | None" = None, **kwargs: Any) -> Any:
        if train_config is not None:
            from llm_trainer.assemble import assemble

            described = assemble(train_config, cast("type[BaseTrainer]", cls), given=kwargs)
            kwargs = {**described, **kwargs}  # explicit keywords win

        from llm_trainer.train.objects import check_objects

        check_objects(cls.__name__, dict(zip(["model"], args, strict=False)) | kwargs)
        return super().__call__(*args, **kwargs)


class BaseTrainer(Algorithm, metaclass=TrainerMeta):
    """One algorithm, trained by the one loop.

    A subclass must write `_prepare_batch`, `_forward` and `_compute_loss`; it may write the other underscored methods
    of `Algorithm`. It never overrides `train`.

    Args:
        model: the module to train.
        optimizer: an optimizer of its parameters.
        train_loader: iterable of micro-batches, re-iterable once per epoch.
        val_loader: evaluated each epoch (or every `eval_interval` steps); the best model is kept. Several, by name, are
            evaluated together, and each by itself as `eval_<name>_loss`, ....
        scheduler: anything with `step()`, `state_dict()` and `load_state_dict()`; stepped once per optimizer step, and
            torch's `ReduceLROnPlateau` with `eval_loss` after every evaluation.
        device: a torch device or its name; None detects.
        max_epochs: passes over `train_loader`.
        grad_accum_steps: micro-batches per optimizer step and rank.
        max_grad_norm: the gradient is scaled down to this norm; 0 or None does not clip.
        use_amp: mixed precision where the hardware has it (see `Settings.precision`).
        use_ddp: None detects torchrun; False trains alone whatever the environment says.
        log_interval: steps between log lines.
        save_dir: where checkpoints and logs go.
        save_interval: epochs between checkpoints; 0: none but the last.
        tokenizer: saved with the model; needed for `eval_prompts`. Of a vision-language model its processor.
        eval_prompts: prompts answered at every evaluation.
        eval_image_tags: for each of them the path of the image that its `<image>` shows, or several paths in a list.
        image_format: a `data.vision.ImageFormat`; None: made of the processor.
        hooks: `Hook`s called by the loop, besides the built-in ones.
        **options: fields of `Settings`.
    """

    section: ClassVar[str] = ""  # the key of its options in a configuration, such as "sft_config"
    rows: ClassVar[tuple[str, ...]] = ("conversations",)  # kinds of `data/kinds`: the first that the first file fits
    # Whether only the main process needs the first weights, where they are then sharded: False if anything else is made of
    # them before, such as a copy to compare with.
    shards_first_weights: ClassVar[bool] = False
    # Whether the experts of a mixture are balanced: `_forward` returns something with `routing`, as a `ScoredModel` does, and
    # `model` may be called with the rows of `_policy_rows` and labels alone.
    balances_experts: ClassVar[bool] = False
    # Whether its batches may have images: `_forward` hands `images` and what else belongs to them to the model.
    takes_images: ClassVar[bool] = False
    # Whether its rows are there before the first step, and its methods work on the model as `_build_module` gave it, before
    # an engine prepares it: adapters may then begin with what such rows say.
    learns_from_rows_alone: bool = False
    reader: ClassVar[Callable[..., Any]] = (
        ScoredModel  # what makes a model's numbers per token (`models.packing.Reader`)
    )

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
        max_grad_norm: float | None = 1.0,
        use_amp: bool = True,
        use_ddp: bool | None = None,
        log_interval: int = 10,
        save_dir: str = "./checkpoints",
        save_interval: int = 1,
        *,
        tokenizer: Any = None,
        eval_prompts: Sequence[str] = (),
        eval_image_tags: Sequence[str | list[str]] = (),
        image_format: Any = None,
        hooks: Sequence[Any] = (),
        **options: Any,
    ) -> None:
        from llm_trainer.train.run import Run

        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"{type(self).__name__}: got {type(optimizer).__name__} as optimizer, expected a torch.optim.Optimizer, as "
                "configure_optimizer makes; by position come model, optimizer, train_loader, val_loader"
            )
        settings = Settings.of(type(self).__name__, options, partial(_keywords, type(self)))
        self.regulariser = regulariser_for(self, model, settings, self.balances_experts)
        self.base_model = model
        self.optimizer, self.scheduler = optimizer, scheduler
        self.tokenizer, self.eval_prompts = tokenizer, list(eval_prompts)
        self.eval_image_tags, self.image_format = list(eval_image_tags), image_format
        if is_kind_of(tokenizer, "transformers.", "ProcessorMixin"):
            self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer
        device_name = None if device is None else str(device)
        self.run = Run(
            self,
            settings,
            train_loader=train_loader,
            val_loader=val_loader,
            device=device_name,
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
        self._reads_rows(model)
        module = self._build_module(model)
        if takes_images(type(self)) and self.machine.shows_images:
            see_in_every_batch(module)
        self.model = self.run.prepare(module)

    def _reads_rows(self, model: nn.Module) -> None:
        """Let the machine try out what `model` makes of rows laid flat, where it has the choice."""

        def try_out() -> Packing:
            packing = packing_of(model, type(self).reader, self.device)
            couples = self.regulariser.couples_rows or self.couples_rows
            return packing._replace(couples_rows=packing.couples_rows or couples)

        self.machine.reads_rows(try_out)

    @property
    def _policy_waits(self) -> bool:
        """Whether something else learns alone still."""
        return False

    def _policy_rows(self, batch: Any) -> Any:
        """What of a prepared batch `model` sees: as `_prepare_batch`, but for what other models say of the rows."""
        return self._prepare_batch(batch)

    def _count_routed(self, batch: Any) -> int:
        """Tokens of a micro-batch that `model` sees in training, without padding: a prompt once for each of its answers."""
        tokens = self._count_tokens(batch)
        if "prompt_attention_mask" in batch:
            tokens += (self.sides - 1) * int(batch["prompt_attention_mask"].sum())
        return tokens

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        """Keywords of this algorithm's own constructor, from `build.section`; models and data are asked of `build`."""
        return {}

    @classmethod
    def _data_from_config(cls, section: Any) -> DataRequest:
        """What rows it learns from, as its section says; by default of the kinds `rows`."""
        return DataRequest(cls.rows)

    @classmethod
    def _steps_per_epoch(cls, stream: Any, section: Any) -> int:
        """Optimizer steps of an epoch over a `data.stream.SampleStream`, by which a schedule is made; those of rollouts are
        updates (`data.rollout_source.num_updates`).
        """
        return stream.num_steps()

    @classmethod
    def _model_from_config(cls, config: "TrainConfig", build: "Build") -> nn.Module:
        """The model to train, if the caller does not give one."""
        return build.model()

    @classmethod
    def _extend_optimizer(cls, optimizer: torch.optim.Optimizer, own: dict[str, Any], section: Any) -> None:
        """Give the optimizer of a configuration, which has the model's parameters, what else learns of the keywords `own`."""

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        """What this algorithm costs beyond the forward and backward of its model, as keywords of `plan.shapes.Job`.

        That is `rows_per_sample`, sequences per row of data; `has_head`, False for a model that gives one number in place
        of a distribution over the vocabulary; and what `sketch.frozen` says of references and teachers.
        """
        return {}

    # What everybody can ask and call.

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.machine.device

    @property
    def is_distributed(self) -> bool:
        """Whether several processes train together."""
        return self.machine.is_distributed

    @property
    def rank(self) -> int:
        """Which part of the data this process sees, from 0."""
        return self.machine.rank

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and saves."""
        return self.machine.is_main

    def record(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float = 1.0) -> None:
        """Add to the metric `name`: its logged value is sum of totals / sum of counts, over steps and ranks."""
        self.machine.record(name, total, count)

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


def _keywords(kind: type[BaseTrainer]) -> set[str]:
    """What the constructor of a trainer takes by name, beside `Settings`."""
    found = set[str]()
    for base in kind.__mro__:
        if "__init__" in vars(base):
            found.update(inspect.signature(vars(base)["__init__"]).parameters)
    entry = ALGORITHMS.get(kind.section.removesuffix("_config"))
    return found if entry is None else found.union(fields_of(entry.section))
