"""How many tokens each expert of a mixture has in a step: counted over micro-batches and ranks, shown, and remembered."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llm_trainer.losses.experts import load_spread
from llm_trainer.regulariser import Regulariser, SumOverRanks

if TYPE_CHECKING:
    from llm_trainer.machine import Machine
    from llm_trainer.state import MicroBatch

PATIENCE = 1000  # steps without a token after which an expert is spoken of
LOOKS = 50  # steps between looks, for each of which the host waits for the device
MOST_NAMED = 5


class OfExperts(Protocol):
    """What is asked of a trainer, a `BaseTrainer`, whose experts are balanced."""

    model: nn.Module
    base_model: nn.Module
    machine: "Machine"

    @property
    def _policy_waits(self) -> bool: ...

    def record(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None: ...

    def _prepare_batch(self, batch: Any) -> Any: ...

    def _policy_rows(self, batch: Any) -> Any: ...

    def _count_routed(self, batch: Any) -> int: ...


class Loads(Regulariser):
    """Counts the assignments of each step to experts; whoever derives from it balances by them."""

    def __init__(self, trainer: OfExperts) -> None:
        super().__init__()
        self._trainer = trainer
        self._seen: Tensor | None = None  # [L, E] assignments of this rank's micro-batches that have run so far
        self._idle: Tensor | None = None  # [L, E] steps since each expert last had a token
        self._has_warned = False

    def begin(self, batches: "list[MicroBatch]", sum_over_ranks: SumOverRanks) -> None:
        if self._trainer.model.training:
            self._seen = None

    def _see(self, assigned: Tensor, counts: bool) -> None:
        """Add what a micro-batch has assigned, `[L, E]`; nothing of a filler."""
        own = assigned * counts
        self._seen = own if self._seen is None else self._seen + own

    def _close(self, assigned: Tensor, cure: str) -> None:
        """Show the assignments of a whole step, and warn of the first experts that have none for `PATIENCE` of them.

        Args:
            assigned: `[L, E]`, of all ranks.
            cure: what helps against idle experts, in words.
        """
        for name, value in load_spread(assigned).items():
            self._trainer.record(f"experts/{name}", value)
        idle = torch.zeros_like(assigned) if self._idle is None else self._idle.to(assigned)
        self._idle = torch.where(assigned > 0, 0.0, idle + 1)
        is_time = (self._trainer.machine.step + 1) % LOOKS == 0
        if self._has_warned or not is_time:
            return
        found = (self._idle >= PATIENCE).nonzero().tolist()
        if not found:
            return
        self._has_warned = True
        named = ", ".join(f"{expert} of layer {layer}" for layer, expert in found[:MOST_NAMED])
        more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        self._trainer.machine.say(
            f"warning: no token has been sent to {len(found)} experts for {PATIENCE:,} steps: {named}{more} (layers with "
            f"experts, counted from 0). They learn nothing. What helps: {cure}, or a lower learning rate"
        )

    def state_dict(self) -> dict[str, Any]:
        idle = None if self._idle is None else self._idle.tolist()
        return {"idle": idle, "has_warned": self._has_warned}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        if not state:  # of a version that did not count
            return
        self._idle = None
        if state["idle"] is not None:
            self._idle = torch.tensor(state["idle"], device=self._trainer.machine.device)
        self._has_warned = state["has_warned"]
