"""Values that parameters had at some time, kept beside them, and put in their place for a while."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llm_trainer.checkpoint import CheckpointError
from llm_trainer.checkpoint.weights import first_few, of_another_shape
from llm_trainer.engine import dist
from llm_trainer.engine.follow import mix
from llm_trainer.engine.lockstep import Lockstep


class Held:
    """The values that parameters have when this is made; a part of the checkpoint.

    A process keeps of each value what it holds of the parameter itself: all of it, or a shard.

    Args:
        engine: that has prepared the parameters.
        parameters: by name.
    """

    def __init__(self, engine: "Shards", parameters: Mapping[str, nn.Parameter]) -> None:
        self._engine, self._parameters = engine, dict(parameters)
        self._shards = self._current()

    @property
    def num_bytes(self) -> int:
        """Memory that the values take in this process."""
        return sum(shard.nbytes for shard in self._shards)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The context in which the parameters have these values; after it they have their own again, bit for bit.

        All ranks enter it together. Only forwards without gradients belong inside.
        """
        current = self._current()  # before anything is changed: there may be no memory for it
        try:
            self._put(self._shards)
            yield
        finally:
            self._put(current)

    def follow(self, weight: float) -> None:
        """Values <- weight * the parameters as they are now + (1 - weight) * values."""
        for shard, parameter in zip(self._shards, self._parameters.values(), strict=True):
            mix(shard, self._engine.local_shard(parameter), weight)

    def _current(self) -> list[Tensor]:
        return [self._engine.local_shard(parameter).clone() for parameter in self._parameters.values()]

    def _put(self, shards: list[Tensor]) -> None:
        self._engine.put_shards(dict(zip(self._parameters.values(), shards, strict=True)))

    # Saving and loading. All ranks call these together.

    def state_dict(self) -> dict[str, Tensor]:
        """All of the values by name, on the main process; nothing on the others."""
        found = {}
        with self.in_place():
            for name, parameter in self._parameters.items():
                value = self._engine._full_tensor(parameter, parameter.dtype)
                if dist.is_main():
                    found[name] = value.to("cpu", copy=True)
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of `state_dict`, however many processes wrote them.

        Raises:
            CheckpointError: they are those of other parameters.
        """
        shapes = {name: self._engine.full_shape(parameter) for name, parameter in self._parameters.items()}
        problems = {
            "missing": [name for name in shapes if name not in state],
            "unexpected": [name for name in state if name not in shapes],
            "of another shape": of_another_shape(state, shapes),
        }
        if any(problems.values()):
            raise CheckpointError(
                f"was made by a run that trains other parameters, so that its reference does not fit: {first_few(problems)}. "
                f"Train the same ones, or start a new run from its weights (init_weights_path)"
            )
        with torch.no_grad():
            for shard, (name, parameter) in zip(self._shards, self._parameters.items(), strict=True):
                shard.copy_(self._engine.shard_of(state[name], parameter))


class Shards(ABC):
    """What an engine knows of the parameters that it has prepared, of which this process may hold a shard.

    Attributes:
        held: earlier values of parameters, which a checkpoint holds too; None: there are none.
    """

    held: Held | None = None
    _lockstep: Lockstep | None = None  # of engines whose forward needs all ranks

    def hold(self, parameters: Mapping[str, nn.Parameter], caller: nn.Module) -> Held:
        """Keep values of prepared parameters; see `machine.Machine.hold`."""
        self._keep_in_step(caller)
        held = Held(self, parameters)
        if parameters:
            self.held = held
        return held

    def local_shard(self, parameter: Tensor) -> Tensor:
        """What this process holds of a parameter."""
        return parameter.detach()

    def put_shards(self, shards: Mapping[nn.Parameter, Tensor]) -> None:
        """Give parameters other values: of each what `local_shard` would give. All ranks do it together.

        Those that the optimizer keeps beside them, in more bits, stay as they are.
        """
        for parameter, shard in shards.items():
            self._put_shard(parameter, shard)
        torch.clear_autocast_cache()  # what it has cast is of the values before

    def _put_shard(self, parameter: nn.Parameter, shard: Tensor) -> None:
        parameter.data.copy_(shard)

    def shard_of(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        """Of a whole `value` of a parameter, what this process would hold; every rank has all of it."""
        return value

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """The shape of a whole parameter."""
        return parameter.shape

    @abstractmethod
    def _full_tensor(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """All of a tensor of the model in `dtype`, detached."""

    def _keep_in_step(self, module: nn.Module) -> None:
        """Let all ranks run the forward of a module, which calls the prepared one, as often as one of them does."""
        if self._lockstep is not None:
            self._lockstep.add(module, (), calls_others=True)
