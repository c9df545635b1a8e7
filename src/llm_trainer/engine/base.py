"""What every engine can do: five verbs of training, shaped by the hardest implementation, and what saving asks of it."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from llm_trainer.checkpoint.weights import tensors_by_name
from llm_trainer.engine import dist
from llm_trainer.engine.follow import follow, mix
from llm_trainer.engine.held import Shards
from llm_trainer.engine.room import checkpoint_copy
from llm_trainer.model_group import MODEL, members_of
from llm_trainer.models.experts import dtype_when_sent

if TYPE_CHECKING:
    from llm_trainer.config.options import Fsdp


SumOverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is made from.

    Attributes:
        device: where this process computes.
        precision: 'fp32', 'bf16' or 'fp16'.
        several: whether this process trains with others.
        fsdp: options of FSDP; None: none were given.
        deepspeed: DeepSpeed's own configuration (its JSON); None: none was given.
    """

    device: torch.device
    precision: str
    several: bool
    fsdp: "Fsdp | None" = None
    deepspeed: Mapping[str, Any] | None = None


class Engine(Shards):
    """Executes the steps of one trainer on some machinery (one process, DDP, FSDP2, DeepSpeed).

    Attributes:
        device: where this process computes.
        precision_name: 'fp32', 'bf16' or 'fp16'.
        name: of its line in `config.engines.ENGINES`.
        in_lockstep: whether a forward or backward needs all ranks, so that each must run as many as the others.
        takes_trials: whether a forward and backward that is followed by no step leaves nothing behind, but for gradients
            that `drop_gradients` forgets.
        gathers_weights: whether `weights` are copies in the main process's host memory.
        gathers_state: whether `optimizer_state` is a copy in the main process's host memory.
    """

    device: torch.device
    precision_name: str
    name: ClassVar[str]
    in_lockstep: ClassVar[bool] = False
    takes_trials: ClassVar[bool] = True
    gathers_weights: bool = False
    gathers_state: ClassVar[bool] = False
    _base: nn.Module

    @abstractmethod
    def prepare(self, module: nn.Module, base: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Place and wrap `module` together with the optimizer of its parameters; the result is what a trainer calls.

        Args:
            base: the user's model in it, by whose parameter names everything is saved.
        """

    def place(self, module: nn.Module) -> None:
        """Place a frozen `module` (a reference, a teacher) where it can be called, sharded where the trained one is."""
        module.to(self.device)

    def follow(self, module: nn.Module, weight: float) -> None:
        """w <- weight * w of the run's model + (1 - weight) * w, for all weights of a placed `module`; all ranks call it."""
        local = self.local_shard
        follow(module, members_of(self._base)[MODEL], lambda here, there: mix(local(here), local(there), weight))

    def shard_fractions(self) -> tuple[float, float, float]:
        """The fraction of the weights, the gradients and the optimizer state that one process holds between steps."""
        return 1.0, 1.0, 1.0

    @abstractmethod
    def precision(self) -> AbstractContextManager[None]:
        """The context that a forward without gradients runs in."""

    def inference(self) -> AbstractContextManager[None]:
        """The context in which `base` itself may be called, for generation; in lockstep all ranks do the same in it."""
        return self.precision()

    def together(self) -> AbstractContextManager[None]:
        """The context of forwards outside of `micro_step`, which each rank runs as often as its data asks for."""
        return nullcontext() if self._lockstep is None else self._lockstep.together()

    def joined(self, sum_over_ranks: SumOverRanks) -> SumOverRanks:
        """`sum_over_ranks` for use inside `together`."""
        return sum_over_ranks if self._lockstep is None else self._lockstep.joined(sum_over_ranks)

    @abstractmethod
    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """The context around forward AND backward of a micro-batch; only the `last` one of a step must talk to other ranks."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Backpropagate a scalar `loss` that is this micro-batch's share of the whole step's loss (shares ADD over ranks)."""

    @abstractmethod
    def step(self, max_grad_norm: float) -> tuple[float, bool]:
        """Unscale, clip, and update unless the gradient is not finite; zero the gradients.

        The norm is read on the host before the update is queued: the one place in a step where the host waits.

        Returns:
            Norm of the whole gradient before clipping, and whether it is finite; if not, nothing was updated.
        """

    def give_up_step(self) -> None:
        """After a forward or backward has failed on this rank: take part, with zeros, in what the other ranks wait for."""
        assert not self.in_lockstep, "a rank that fails in a forward cannot keep up with the others"

    def drop_gradients(self) -> None:
        """Forget what the backwards of a step have added up."""
        assert not self.in_lockstep

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the engine itself must remember: `scaler`, the fp16 scale, empty without one."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""

    # Saving and loading. All ranks call these together.

    def stream_weights(
        self, dtype: torch.dtype | None = None, every_model: bool = False, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights of the run's model, whole, on every rank: one tensor at a time, with its name in checkpoints.

        Parameters, frozen ones too, and persistent buffers; of tied weights one, under the first of its names. All ranks
        go through all of them. A tensor may be the model's own memory: it is read before the next one is asked for, or
        copied.

        Args:
            dtype: of the tensors of floating-point numbers but biases that balance routers; None: that of the model.
            every_model: all models of a group, by their names in it.
            names: only these, the same ones on every rank; None: all.
        """
        module = self._base if every_model else members_of(self._base)[MODEL]
        return self._stream(module, dtype, names)

    def _stream(
        self, module: nn.Module, dtype: torch.dtype | None, names: Collection[str] | None
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `base` or of a part of it; see `stream_weights`."""
        tensors = tensors_by_name(module)
        first_names: dict[int, str] = {}
        for name, tensor in tensors.items():
            first_names.setdefault(id(tensor), name)
        wanted_ids = set(first_names)
        if names is not None:
            wanted_ids = {id(tensors[name]) for name in names}
        for key, name in first_names.items():
            if key not in wanted_ids:
                continue
            tensor = tensors[name]
            yield name, self._full_tensor(tensor, dtype_when_sent(name, tensor, dtype))

    def _full_tensor(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """All of a tensor of `base`, of which this process may hold a shard, in `dtype` and detached."""
        return tensor.detach().to(dtype)

    def weights(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The full tensors of `base` by name, on the main process; nothing on the others. See `gathers_weights`.

        Args:
            names: only these are gathered, the same ones on every rank; None: all.
        """
        whole = {}
        for name, tensor in self.stream_weights(every_model=True, names=names):
            if dist.is_main():
                whole[name] = tensor.to("cpu", copy=True) if self.gathers_weights else tensor
        if not dist.is_main():
            return {}
        first_names: dict[int, str] = {}
        found = {}
        for name, tensor in tensors_by_name(self._base).items():
            first = first_names.setdefault(id(tensor), name)
            if names is None or name in names:
                found[name] = whole[first]
        return found

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state by parameter name (see `checkpoint.optimizer_state_by_name`), this rank's shards of it."""

    def bytes_to_copy(self, weights: int, optimizer: int) -> int:
        """Host memory for what this process copies for a checkpoint, where weights and optimizer take so many bytes in all."""
        return checkpoint_copy(
            weights,
            optimizer,
            gathers_weights=self.gathers_weights,
            gathers_state=self.gathers_state,
            share=self.shard_fractions()[2],
            is_main=dist.is_main(),
        )

    @abstractmethod
    def load(self, path: str | Path) -> dict[str, Any]:
        """Restore weights and optimizer from a checkpoint that has been verified; returns the rest of its state."""
