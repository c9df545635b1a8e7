"""What keeps the routers of a mixture of experts from sending all tokens to a few, over whole optimizer steps."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.options import Balancing
from llm_trainer.losses.experts import Routing, balance_loss, router_z_loss, shares_of
from llm_trainer.losses.language import IGNORE
from llm_trainer.models.experts import BALANCING_BIAS, Experts, biased_routers, experts_of, is_balanced_by_a_bias
from llm_trainer.models.inside import has_adapters
from llm_trainer.regulariser import Regulariser, SumOverRanks
from llm_trainer.trainers.expert_loads import Loads, OfExperts
from llm_trainer.trainers.routes import routes_of

if TYPE_CHECKING:
    from llm_trainer.state import MicroBatch

NEW_MODELS_SPEED = 0.001  # of DeepSeek-V3, until its last half trillion tokens (arXiv:2412.19437, 4.2)
OF_A_LOSS = ("aux_loss_coef", "router_z_loss_coef", "aux_loss_scope")
OF_A_BIAS = ("bias_update_speed",)
_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_lengths", "repeats")
COUNTED_AHEAD = (
    "aux_loss_scope: this step is cut (into micro-batches, or among processes), so its tokens are routed once before, without "
    "gradients, and the balance of experts is that of the whole step. That forward takes about a fifth of the time of a "
    "training step. previous_step balances by the step before and costs nothing; larger micro-batches (batch_size, "
    "micro_batch_tokens) may leave a step whole"
)


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
    experts, routers, kind = experts_of(model), biased_routers(model), type(model).__name__
    if balances and experts is not None:
        _refuse(options, OF_A_BIAS, f"the routers of {kind} are balanced by a loss (aux_loss_coef), and not by a bias")
        return Balance(trainer, experts, options)
    if balances and routers:
        _refuse(
            options, OF_A_LOSS, f"the routers of {kind} are balanced by a bias (bias_update_speed), and not by a loss"
        )
        return BiasBalance(trainer, model, routers, options.bias_update_speed)
    why = f"{kind} has no experts whose routers can be seen"
    if experts is not None or routers:
        why = f"{type(trainer).__name__} does not say that it balances experts (balances_experts)"
    elif is_balanced_by_a_bias(model):
        why = f"the routers of {kind} are balanced by a bias that is elsewhere than in them, and that is not moved here"
    _refuse(options, (*OF_A_LOSS, *OF_A_BIAS), why)
    return Regulariser(couples_rows=experts is not None)


def _refuse(options: Balancing, names: Iterable[str], why: str) -> None:
    """
    Raises:
        ConfigError: one of these options was changed.
    """
    for name in names:
        value, default = getattr(options, name), fields_of(Balancing)[name].default
        if value != default and value != 0:
            raise ConfigError(
                f"{name}: got {value!r}, but {why}; leave it out, or train a mixture of experts that has it"
            )


class Balance(Loads):
    """`aux_loss_coef` times the balance loss of the routers, and `router_z_loss_coef` times their z-loss, over a step's tokens.

    The balance loss needs f, how often a token is sent to each expert, of more tokens than a micro-batch has:

    - `step`: of the whole step. Where it is cut, all its micro-batches are routed before the first of them trains, with the
      same noise. So the gradient does not depend on how it is cut.
    - `previous_step`: of the step before; before the first one all experts count alike, which balances nothing yet.
    - `micro_batch`: of each micro-batch alone, as transformers does. It depends on how a step is cut.
    """

    def __init__(self, trainer: OfExperts, experts: Experts, options: Balancing) -> None:
        super().__init__(trainer)
        self.couples_rows = options.couples_rows
        self.costs_when_cut = options.aux_loss_scope == "step" and options.aux_loss_coef > 0
        self._experts, self._options = experts, options
        self._counted: Tensor | None = None  # [L, E] assignments of the step under way on all ranks, counted ahead
        self._last: Tensor | None = None  # of the step before, on all ranks
        self._has_told = False

    def weigh(self, batch: Any) -> float:
        return float(self._trainer._count_routed(batch))

    # Before the first micro-batch.

    def begin(self, batches: "list[MicroBatch]", sum_over_ranks: SumOverRanks) -> None:
        super().begin(batches, sum_over_ranks)
        if not self._trainer.model.training:
            return
        self._counted = None
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
        routes = routes_of(rows)
        if routes is not None:
            inputs["routes"] = routes
        outputs = self._trainer.model(**inputs, labels=torch.full_like(rows["input_ids"], IGNORE))
        routing: Routing = outputs.routing
        return routing

    # A micro-batch.

    def mean(self, outputs: Any, counts: bool) -> Tensor | None:
        routing: Routing = outputs.routing
        is_training = self._trainer.model.training
        if is_training:
            self._see(routing.assigned, counts)
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
        cure = f"a larger aux_loss_coef (now {self._options.aux_loss_coef:g})"
        self._close(assigned, cure)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        last = None if self._last is None else self._last.tolist()
        return super().state_dict() | {"last": last}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        super().load_state_dict(state)
        if not state:  # of a version that did not balance over steps
            return
        self._last = None
        if state["last"] is not None:
            self._last = torch.tensor(state["last"], device=self._trainer.machine.device)


class BiasBalance(Loads):
    """Moves the bias on what routers choose by: after a step up for experts with fewer tokens than the mean, else down.

    b_e <- b_e + speed * sign(mean load - load of e), of a layer, over all tokens of the step (Wang et al. 2024,
    arXiv:2408.15664, algorithm 1; DeepSeek-V3, arXiv:2412.19437, 2.1.2). The weights of the chosen experts have no bias in
    them, so nothing is added to the loss. The biases are buffers of the model and lie in its checkpoints.

    Args:
        routers: of `model`, by name and in the order of the layers.
        speed: None: `NEW_MODELS_SPEED` where all biases are 0, as in a new model; else, and under adapters, whose base stays
            as it is, they are not moved.

    Raises:
        ConfigError: the biases of a base under adapters are to be moved.
    """

    def __init__(
        self, trainer: OfExperts, model: nn.Module, routers: dict[str, nn.Module], speed: float | None
    ) -> None:
        super().__init__(trainer)
        self._routers = list(routers.values())
        if speed and has_adapters(model):
            raise ConfigError(
                f"bias_update_speed: got {speed:g}, but the biases ({BALANCING_BIAS}) are in the base, which stays as it is "
                f"under adapters; leave it out"
            )
        self._is_open, self._is_agreed, self.speed = speed is None, speed is not None, speed or 0.0
        if speed is None and not has_adapters(model):
            is_new = not any(bool(_bias_of(router).any()) for router in self._routers if not _bias_of(router).is_meta)
            self.speed = NEW_MODELS_SPEED if is_new else 0.0

    def describe(self) -> str:
        if self.speed:
            return f"balanced by biases of their routers, moved by {self.speed:g} after each step (bias_update_speed)"
        if self._is_open:
            return "balanced by biases of their routers, which stay as they are (bias_update_speed: 0.001 moves them)"
        return "balanced by biases of their routers, which stay as they are (bias_update_speed: 0)"

    def mean(self, outputs: Any, counts: bool) -> Tensor | None:
        if self._trainer.model.training:
            self._see(outputs.routing.assigned, counts)
        return None

    def end(self, sum_over_ranks: SumOverRanks) -> None:
        assert self._seen is not None  # every rank has run a micro-batch, if only a filler
        self._seen = sum_over_ranks(self._seen)
        self._close(self._seen, f"a larger bias_update_speed (now {self.speed:g})")

    @torch.no_grad()
    def after_update(self) -> None:
        assert self._seen is not None
        if not self._is_agreed:  # where first weights are sharded, the main process alone has had the biases
            self._is_agreed, self.speed = True, self._trainer.machine.gather(self.speed)[0]
        if not self.speed or self._trainer._policy_waits:
            return
        # The counts are whole numbers on every rank, so that all ranks move their copies alike, to the bit.
        surplus = self._seen * self._seen.shape[1] - self._seen.sum(1, keepdim=True)  # [L, E]
        for router, of_layer in zip(self._routers, surplus, strict=True):
            bias = _bias_of(router)
            bias -= self.speed * of_layer.sign().to(bias)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"speed": self.speed}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        super().load_state_dict(state)
        if state and self._is_open:  # goes on as it began: the biases are no longer 0 now
            self.speed = state["speed"]


def _bias_of(router: nn.Module) -> Tensor:
    bias = router._buffers[BALANCING_BIAS]
    assert bias is not None
    return bias
