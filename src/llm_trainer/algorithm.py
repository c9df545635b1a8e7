"""What an algorithm says to the machinery, and what it may ask of it. `trainers/` implements one, `train/run.py` the other."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from llm_trainer.layout import Layout, Packing
    from llm_trainer.state import MicroBatch

M = TypeVar("M", bound=nn.Module)
PromptFormat = Literal["chat", "text"]
SumOverRanks = Callable[[Tensor], Tensor]
Step = tuple[list["MicroBatch"], int]  # this rank's micro-batches of an optimizer step, and the position after it


class Source(Protocol):
    """Where optimizer steps come from; see `data.stream.StepSource`."""

    def steps(self, epoch: int, position: int) -> Iterator[Step]:
        """The steps of an epoch from a position on."""


class Machine(Protocol):
    """What an algorithm may ask of the machinery that runs it.

    Attributes:
        device: where this process computes.
        precision_name: 'fp32', 'bf16' or 'fp16'.
        seed: of the run; all noise follows from it.
        step: optimizer steps done.
        is_distributed: whether several processes train together.
        rank: which part of the data this process sees, from 0.
        is_main: true in the one process that prints and saves.
        layout: whether `_prepare_batch` is to lay padded rows flat (`trainers.answers.lay_flat` does).
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def precision_name(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def is_distributed(self) -> bool: ...

    @property
    def rank(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    @property
    def layout(self) -> "Layout": ...

    def reads_rows(self, try_out: Callable[[], "Packing"]) -> None:
        """Say that a model sees the rows of micro-batches: they are laid flat only if all such models keep them apart.

        Args:
            try_out: finds that out (`models.packing.packing_of`); called in the main process, and only where it matters.
        """

    def place(self, frozen: nn.Module) -> None:
        """Place a frozen module (a reference, a teacher) as the trained one is: sharded and compiled where that is."""

    def generating(self) -> AbstractContextManager[None]:
        """The context in which the trained model itself may be called, with other lengths on every rank."""

    def record(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to a metric: its logged value is sum of totals / sum of counts, over steps and ranks."""


class Algorithm(ABC):
    """One algorithm: three methods that it must write, and others that it may.

    Attributes:
        takes_flat: whether its methods take batches laid flat (`[1, N]`, without padding) as well as padded ones, and its
            loss does not depend on how a step is cut. Said by, or below, the class that writes them (`layout.takes_flat`).
        sides: answers of a sample, of which a joined batch holds all first ones, then all second ones.
        base_model: the user's model.
        model: the module that `_forward` calls: `base_model`, or what `_build_module` and the engine put around it.
        optimizer: of its parameters.
        scheduler: stepped once per update; None: the learning rate stays.
        tokenizer: saved with the model; None: there is none.
        eval_prompts: answered at every evaluation.
        machine: what runs it.
        prompt_format: whether a prompt for a sample answer is a user's turn in a chat, or the beginning of a text.
    """

    prompt_format: ClassVar[PromptFormat] = "chat"
    takes_flat: ClassVar[bool] = False
    sides: ClassVar[int] = 1

    base_model: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    tokenizer: Any
    eval_prompts: list[str]
    machine: Machine

    # What an algorithm must say.

    @abstractmethod
    def _prepare_batch(self, batch: Any) -> Any:
        """Everything before autograd: move to the device, join, score with frozen models."""

    @abstractmethod
    def _forward(self, batch: Any) -> Any:
        """What autograd sees: the forward of `self.model`."""

    @abstractmethod
    def _compute_loss(self, outputs: Any, batch: Any) -> Tensor:
        """The micro-batch's loss, scalar: a MEAN over as many terms as `_loss_weight` counts."""

    # What an algorithm may say.

    def _loss_weight(self, batch: Any) -> float | Tensor:
        """Number of terms that the loss of `batch` is a mean of, or the sum of their weights, which may be fractions.

        1 gives the textbook loss / accumulation.
        """
        return 1.0

    def _count_tokens(self, batch: Any) -> int:
        """Tokens of a micro-batch, for tokens/s."""
        return batch["input_ids"].numel()

    def _begin_step(self, batches: list[Any], weights: list[float], sum_over_ranks: SumOverRanks) -> None:
        """See all micro-batches of an optimizer step before the first of them runs, without gradients.

        For a loss with a second denominator, or with an estimate that is made from the whole step. A step that runs out of
        memory is begun anew, cut smaller: what is added up during a step starts at zero here.

        Args:
            batches: this rank's micro-batches, as they came from the loader.
            weights: `_loss_weight` of each; 0 for a batch that only keeps a rank without rows in step.
            sum_over_ranks: sums a tensor over the processes; in evaluation, where every batch is a step, it does not.
        """

    def _end_step(self, sum_over_ranks: SumOverRanks) -> None:
        """Act after the last backward of a training step, before the update."""

    def _train_steps(self, source: Source, epoch: int, position: int) -> Iterator[Step]:
        """Optimizer steps as (micro-batches of this rank, position after them); reinforcement learning overrides it."""
        return source.steps(epoch, position)

    def _build_module(self, model: nn.Module) -> nn.Module:
        """The module that the engine wraps and `_forward` calls: `model` itself, or around it."""
        return model

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
