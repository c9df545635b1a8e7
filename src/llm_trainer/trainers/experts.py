"""What keeps the routers of a mixture of experts from sending all tokens to a few, over whole optimizer steps."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.options import Balancing
from llm_trainer.losses.experts import Routing, balance_loss, load_spread, router_z_loss, shares_of
from llm_trainer.losses.language import IGNORE
from llm_trainer.models.experts import Experts, experts_of, is_balanced_by_a_bias
from llm_trainer.regulariser import Regulariser, SumOverRanks

if TYPE_CHECKING:
    from llm_trainer.machine import Machine
    from llm_trainer.state import MicroBatch

PATIENCE = 1000  # steps without a token after which an expert is spoken of
LOOKS = 50  # steps between looks, for each of which the host waits for the device
MOST_NAMED = 5
_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_lengths", "repeats")
COUNTED_AHEAD = (
    "aux_loss_scope: this step is cut (into micro-batches, or among processes), so its tokens are routed once before, without "
    "gradients, and the balance of experts is that of the whole step. That forward takes about a third of the time of a "
    "training step. previous_step balances by the step before and costs nothing; larger micro-batches (batch_size, "
    "micro_batch_tokens) may leave a step whole"
)


class OfExperts(Protocol):
    """What is asked of a trainer, a `BaseTrainer`, whose experts are balanced."""

    model: nn.Module
    machine: "Machine"

    @property
    def _policy_waits(self) -> bool: ...

    def record(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None: ...

    def _prepare_batch(self, batch: Any) -> Any: ...

    def _policy_rows(self, batch: Any) -> Any: ...

    def _count_routed(self, batch: Any) -> int: ...


def regulariser_for(trainer: OfExperts, model: nn.Module, options: Balancing, balances: bool) -> Regulariser:
    """What balances the experts of `model`; nothing where there are none, or where a trainer says nothing of them.

    Args:
        trainer: it is being made, and has no model and no machine yet.
        model: that it will train.
        options: of the run.
        balances: whether it says `balances_experts`.

    Raises:
        ConfigError: an option was changed, and has no meaning for this model or trainer.
    """
    experts = experts_of(model)
    if experts is not None and balances:
        return Balance(trainer, experts, options)
    why = f"{type(model).__name__} has no experts whose routers can be seen"
    if is_balanced_by_a_bias(model):
        why = f"the routers of {type(model).__name__} are balanced by a bias, and not by a loss"
    elif experts is not None:
        why = f"{type(trainer).__name__} does not say that it balances experts (balances_experts)"
    for name, field in fields_of(Balancing).items():
        value = getattr(options, name)
        if value != field.default and value != 0:
            raise ConfigError(f"{name}: got {value!r}, but {why}; leave it out, or train a mixture of experts")
    return Regulariser(couples_rows=experts is not None)


class Balance(Regulariser):
    """`aux_loss_coef` times the balance loss of the routers, and `router_z_loss_coef` times their z-loss, over a step's tokens.

    The balance loss needs f, how often a token is sent to each expert, of more tokens than a micro-batch has:

    - `step`: of the whole step. Where it is cut, all its micro-batches are routed before the first of them trains, with the
      same noise. So the gradient does not depend on how it is cut.
    - `previous_step`: of the step before; before the first one all experts count alike, which balances nothing yet.
    - `micro_batch`: of each micro-batch alone, as transformers does. It depends on how a step is cut.
    """

    def __init__(self, trainer: OfExperts, experts: Experts, options: Balancing) -> None:
        self.couples_rows = options.couples_rows
        self.costs_when_cut = options.aux_loss_scope == "step" and options.aux_loss_coef > 0
        self._trainer, self._experts, self._options = trainer, experts, options
        self._counted: Tensor | None = None  # [L, E] assignments of the step under way on all ranks, counted ahead
        self._seen: Tensor | None = None  # the same of this rank's micro-batches that have run so far
        self._last: Tensor | None = None  # of the step before, on all ranks
        self._idle: Tensor | None = None  # [L, E] steps since each expert last had a token
        self._has_warned = self._has_told = False

    def weigh(self, batch: Any) -> float:
        return float(self._trainer._count_routed(batch))

    # Before the first micro-batch.

    def begin(self, batches: "list[MicroBatch]", sum_over_ranks: SumOverRanks) -> None:
        if not self._trainer.model.training:
            return
        self._counted = self._seen = None
        is_cut = self._trainer.machine.world_size > 1 or sum(batch.counts for batch in batches) > 1
        if self.costs_when_cut and is_cut:
            self._counted = sum_over_ranks(self._count(batches))
            if not self._has_told:
                self._has_told = True
                self._trainer.machine.say(COUNTED_AHEAD)

    def _count(self, batches: "list[MicroBatch]") -> Tensor:
        """`[L, E]` assignments of this rank's micro-batches. No random number is consumed: their noise is still to come."""
        device = self._trainer.machine.device
        on_device = [device] if device.type == "cuda" else []
        found = []
        with torch.random.fork_rng(on_device):
            for batch in batches:  # fillers too: they draw noise in their turn
                found.append(self._route(batch.batch).assigned * batch.counts)
        return torch.stack(found).sum(0)

    def _route(self, batch: Any) -> Routing:
        """What the routers do with a micro-batch; without labels, so that the head has nothing to do."""
        prepare = self._trainer._prepare_batch
        for kind in type(self._trainer).__mro__:
            if "_policy_rows" in vars(kind):
                prepare = self._trainer._policy_rows
            if "_policy_rows" in vars(kind) or "_prepare_batch" in vars(kind):  # a subclass may prepare other rows
                break
        rows = prepare(batch)
        inputs = {name: rows[name] for name in _INPUTS if name in rows}
        outputs = self._trainer.model(**inputs, labels=torch.full_like(rows["input_ids"], IGNORE))
        routing: Routing = outputs.routing
        return routing

    # A micro-batch.

    def mean(self, outputs: Any, counts: bool) -> Tensor | None:
        routing: Routing = outputs.routing
        is_training = self._trainer.model.training
        if is_training:
            own = routing.assigned * counts
            self._seen = own if self._seen is None else self._seen + own
        balance, z_loss = balance_loss(routing, self._shares(routing)), router_z_loss(routing)
        self._trainer.record("aux_loss", balance.detach() * routing.tokens, routing.tokens)
        self._trainer.record("router_z_loss", z_loss.detach() * routing.tokens, routing.tokens)
        if not is_training:
            return None
        weight = 0.0 if self._trainer._policy_waits else 1.0  # not left out: engines want a gradient of every parameter
        return weight * (self._options.aux_loss_coef * balance + self._options.router_z_loss_coef * z_loss)

    def _shares(self, routing: Routing) -> Tensor:
        """`[E]` f, by which the experts of a micro-batch are balanced."""
        per_token = self._experts.per_token
        if self._trainer.model.training:
            if self._counted is not None:
                return shares_of(self._counted, per_token)
            if self._options.aux_loss_scope == "previous_step":
                before = self._last if self._last is not None else torch.ones_like(routing.assigned)
                return shares_of(before.to(routing.assigned), per_token)
        return shares_of(routing.assigned, per_token)

    # After the last.

    def end(self, sum_over_ranks: SumOverRanks) -> None:
        assert self._seen is not None  # every rank has run a micro-batch, if only a filler
        assigned = sum_over_ranks(self._seen) if self._counted is None else self._counted
        self._last, self._counted, self._seen = assigned, None, None
        for name, value in load_spread(assigned).items():
            self._trainer.record(f"experts/{name}", value)
        self._note_idle(assigned)

    def _note_idle(self, assigned: Tensor) -> None:
        """Count steps without a token, and warn of the first experts that have none for `PATIENCE` of them."""
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
            f"experts, counted from 0). They learn nothing. What helps: a larger aux_loss_coef (now "
            f"{self._options.aux_loss_coef:g}), or a lower learning rate"
        )

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        last = None if self._last is None else self._last.tolist()
        idle = None if self._idle is None else self._idle.tolist()
        return {"last": last, "idle": idle, "has_warned": self._has_warned}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        if not state:  # of a version that did not balance over steps
            return
        device = self._trainer.machine.device
        self._last, self._idle = None, None
        if state["last"] is not None:
            self._last = torch.tensor(state["last"], device=device)
            self._idle = torch.tensor(state["idle"], device=device)
        self._has_warned = state["has_warned"]
