"""A further mean beside the loss of an algorithm. `trainers/experts.py` has one."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from llm_trainer.state import MicroBatch

SumOverRanks = Callable[[Tensor], Tensor]


class Regulariser:
    """A further mean over the terms of a step, made of what the forward of an algorithm returned; and a part of a checkpoint.

    It is added to the loss, whatever that is and whoever wrote it, over terms of its own. This one adds nothing.

    Attributes:
        couples_rows: what a row contributes depends on the others of its micro-batch.
        costs_when_cut: a step that is cut into micro-batches takes longer than one that is not.
    """

    def __init__(self, couples_rows: bool = False) -> None:
        self.couples_rows = couples_rows
        self.costs_when_cut = False

    def weigh(self, batch: Any) -> float:
        """Number of terms of a micro-batch."""
        return 0.0

    def begin(self, batches: list["MicroBatch"], sum_over_ranks: SumOverRanks) -> None:
        """See the algorithm's own micro-batches of a step, fillers too, after `Algorithm._begin_step` and as it does."""

    def mean(self, outputs: Any, counts: bool) -> Tensor | None:
        """`[]` the mean over the terms of a micro-batch, in training; None: there is nothing to add.

        Args:
            outputs: of the algorithm's `_forward`.
            counts: whether the micro-batch does, see `MicroBatch`.
        """
        return None

    def end(self, sum_over_ranks: SumOverRanks) -> None:
        """Act after `Algorithm._end_step`."""

    def after_update(self) -> None:
        """Act after the optimizer has updated the weights; not called where it did not."""

    def describe(self) -> str:
        """A few words for the screen before training, of what is done; empty: nothing has to be said."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """What must be remembered (JSON types)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore what `state_dict` gave; None: the checkpoint is of a version that did not know."""
