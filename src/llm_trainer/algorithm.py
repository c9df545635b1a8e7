"""What an algorithm says to the machinery, which `trainers/` implement. What it may ask of it is a `machine.Machine`."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from llm_trainer.machine import Machine
from llm_trainer.model_group import ModelGroup
from llm_trainer.regulariser import Regulariser

if TYPE_CHECKING:
    from llm_trainer.position import Position
    from llm_trainer.state import MicroBatch

PromptFormat = Literal["chat", "text"]
SumOverRanks = Callable[[Tensor], Tensor]
# This rank's micro-batches of an optimizer step, and the position after it.
Step = tuple[list["MicroBatch"], "Position"]


class StepLoss(ABC):
    """A loss of an optimizer step: a mean over the terms of all its micro-batches, on all ranks."""

    @abstractmethod
    def _prepare_batch(self, batch: Any) -> Any:
        """Everything before autograd: move to the device, join, score with frozen models."""

    @abstractmethod
    def _forward(self, batch: Any) -> Any:
        """What autograd sees: the forward of `self.model`."""

    @abstractmethod
    def _compute_loss(self, outputs: Any, batch: Any) -> Tensor:
        """The micro-batch's loss, scalar: a MEAN over as many terms as `_loss_weight` counts."""

    def _loss_weight(self, batch: Any) -> float | Tensor:
        """Number of terms that the loss of `batch` is a mean of, or the sum of their weights, which may be fractions.

        1 gives the textbook loss / accumulation.
        """
        return 1.0

    def _count_tokens(self, batch: Any) -> int:
        """Tokens of a micro-batch, for tokens/s."""
        return batch["input_ids"].numel()


class Algorithm(StepLoss):
    """One algorithm: three methods that it must write, and others that it may.

    Attributes:
        takes_flat: whether its methods take batches laid flat (`[1, N]`, without padding) as well as padded ones, and its
            loss does not depend on how a step is cut. Said by, or below, the class that writes them (`layout.takes_flat`).
        couples_rows: what a row contributes to its loss depends on the others of its micro-batch, which stays as it comes.
        sides: answers of a sample, of which a joined batch holds all first ones, then all second ones.
        base_model: the user's model.
        model: the module that `_forward` calls: `base_model`, or what `_build_module` and the engine put around it.
        optimizer: of its parameters.
        scheduler: stepped once per update; None: the learning rate stays.
        tokenizer: saved with the model; None: there is none.
        processor: of a vision-language model, saved in its place, for the tokenizer is in it; None: another model.
        eval_prompts: answered at every evaluation.
        eval_image_tags: of each prompt the image that it shows, or several; empty: none shows any.
        image_format: what makes tokens and numbers of images (`data.vision.ImageFormat`); None: `processor` alone says it.
        regulariser: what is added to its loss.
        machine: what runs it; there from `_build_source` on.
        prompt_format: whether a prompt for a sample answer is a user's turn in a chat, or the beginning of a text.
        best_metric: of the validation data, by which the best model is known.
        best_is_highest: whether that is the one with the highest value; else the lowest.
    """

    prompt_format: ClassVar[PromptFormat] = "chat"
    takes_flat: ClassVar[bool] = False
    sides: ClassVar[int] = 1
    best_metric: ClassVar[str] = "eval_loss"
    best_is_highest: ClassVar[bool] = False
    # (prompts, generate) -> what becomes of `eval_prompts` in several turns; None: they have one
    _play: ClassVar[Any] = None

    couples_rows: bool = False
    base_model: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    tokenizer: Any
    processor: Any = None
    eval_prompts: list[str]
    answer_ends: tuple[str, ...] = ()  # texts that end an answer to one of them, besides what the chat template has
    eval_image_tags: "list[str | list[str]]"
    image_format: Any = None
    regulariser: Regulariser = Regulariser()
    machine: Machine

    # What an algorithm may say.

    def _further_losses(self) -> Mapping[str, StepLoss]:
        """Losses that are added to its own, by the name of their micro-batches, which `_build_source` puts into steps."""
        return {}

    def loss_of(self, micro_batch: "MicroBatch") -> StepLoss:
        """Which loss a micro-batch is for."""
        return self._further_losses()[micro_batch.loss] if micro_batch.loss else self

    def _begin_step(self, batches: list[Any], weights: list[float], sum_over_ranks: SumOverRanks) -> None:
        """See all micro-batches of its own of an optimizer step before the first of them runs, without gradients.

        For a loss with a second denominator, or with an estimate that is made from the whole step. A step that runs out of
        memory is begun anew, cut smaller: what is added up during a step starts at zero here.

        Args:
            batches: this rank's micro-batches, as they came from the loader.
            weights: `_loss_weight` of each; 0 for a batch that only keeps a rank without rows in step.
            sum_over_ranks: sums a tensor over the processes; in evaluation, where every batch is a step, it does not.
        """

    def _end_step(self, sum_over_ranks: SumOverRanks) -> None:
        """Act after the last backward of a training step, before the update."""

    def _build_source(self, source: Any, training: bool) -> Any:
        """The `data.stream.StepSource` whose steps are taken, around that of the user's data.

        Reinforcement learning makes its rollouts there. Called before the model is prepared; `machine` is there.

        Args:
            source: a `data.stream.StepSource`.
            training: False: of validation data.
        """
        return source

    def _build_module(self, model: nn.Module) -> nn.Module:
        """The module that the engine wraps and `_forward` calls: `model` itself, or around it."""
        return model

    def _other_models(self) -> dict[str, nn.Module]:
        """Models that a checkpoint holds beside `base_model`, by name: a critic that learns too, a reference that moves.

        Asked once, before the engine wraps anything; what of them learns is inside of `_build_module` and in the optimizer.
        """
        return {}

    @cached_property
    def saved_model(self) -> nn.Module:
        """All that has weights to save: `base_model`, or a group of it and `_other_models`."""
        others = self._other_models()
        return ModelGroup(self.base_model, others) if others else self.base_model

    # What it says to people and to checkpoints.

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
