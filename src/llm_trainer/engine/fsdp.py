"""FSDP2 (`torch.distributed.fsdp.fully_shard`): every rank holds a shard of each parameter, gradient and optimizer state."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from llm_trainer import checkpoint
from llm_trainer.checkpoint.weights import shard_like
from llm_trainer.config.options import Fsdp
from llm_trainer.engine import dist
from llm_trainer.engine.base import EngineOptions
from llm_trainer.engine.device import DTYPES
from llm_trainer.engine.layers import layers_of
from llm_trainer.engine.lockstep import Lockstep
from llm_trainer.engine.tensor import split_layers
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.engine.unused import Unused
from llm_trainer.model_group import ModelGroup, members_of
from llm_trainer.optim.optimizers import OPTIMIZERS, recipe_of


def make(options: EngineOptions) -> TorchEngine:
    """Sharded over all ranks; alone there is nothing to shard."""
    if not options.several:
        return TorchEngine(options.device, options.precision)
    return FsdpEngine(options.device, options.precision, options.fsdp or Fsdp())


class FsdpEngine(TorchEngine):
    """Sharded over all ranks; fp32, or bf16 with master weights, sums of gradients and updates in fp32.

    A model may come on the meta device on every rank but the main one, whose weights count.
    """

    name = "fsdp"
    in_lockstep = True
    gathers_weights = True

    def __init__(self, device: torch.device, precision: str, options: Fsdp) -> None:
        if precision == "fp16":
            raise ValueError(
                "precision: got 'fp16', which FSDP does not scale losses for; use bf16, fp32 or engine: deepspeed"
            )
        super().__init__(device, precision, ddp=True)
        self.options = options
        self._root: FSDPModule
        self._placed: list[FSDPModule] = []  # the frozen ones; one that moves is saved too
        self._lockstep: Lockstep = Lockstep(device)
        self._parameters: list[Any]  # what torch keeps of each
        self._exchanges_zeros: bool  # for parameters that only some ranks have used; else these would be mixed up

    def prepare(self, module: nn.Module, base: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        recipe = recipe_of(optimizer)
        if recipe is not None and not recipe.takes_shards:
            others = ", ".join(name for name, other in OPTIMIZERS.items() if other.takes_shards)
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} cannot update matrices that are sharded (FSDP); use one of {others}, "
                "or engine: torch"
            )
        if self.options.tensor_parallel_size > 1 and isinstance(base, ModelGroup):
            names = ", ".join(members_of(base))
            raise ValueError(
                f"tensor_parallel_size: got {self.options.tensor_parallel_size}, which splits the layers of one model, and "
                f"this run trains several ({names}); expected 1: FSDP shards all of them"
            )
        self._module, self._base, self._optimizer = module, base, optimizer
        state = checkpoint.optimizer_state_by_name(base, optimizer)
        self._root = self._shard(module)
        self._parameters, self._unused = _parameters_of(module), Unused(self.device)
        self._exchanges_zeros = hasattr(self._root, "set_reduce_scatter_unused_params")  # from torch 2.13 on
        if self._exchanges_zeros:
            self._root.set_reduce_scatter_unused_params(True)
        # NOTE: sharding has put new parameters into the module.
        sharded = {checkpoint.plain_name(name): parameter for name, parameter in base.named_parameters()}
        optimizer.state.clear()
        for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
            group["params"] = [sharded[name] for name in saved["params"]]
        checkpoint.load_optimizer_state_by_name(base, optimizer, state)
        return module

    def place(self, module: nn.Module) -> None:
        self._placed.append(self._shard(module))

    def shard_fractions(self) -> tuple[float, float, float]:
        share = 1 / ((self.options.shard_size or dist.world_size()) * self.options.tensor_parallel_size)
        return share, share, share

    def follow(self, module: nn.Module, weight: float) -> None:
        self._reshard()
        super().follow(module, weight)

    def local_shard(self, parameter: Tensor) -> Tensor:
        here = parameter.detach()
        return here.to_local() if isinstance(here, DTensor) else here

    def put_shards(self, shards: Mapping[nn.Parameter, Tensor]) -> None:
        self._reshard()  # what is gathered has the values before
        super().put_shards(shards)

    def _put_shard(self, parameter: nn.Parameter, shard: Tensor) -> None:
        self.local_shard(parameter).copy_(shard)

    def shard_of(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        return self.local_shard(shard_like(value, parameter))

    def _shard(self, module: nn.Module) -> FSDPModule:
        """Shard the layers of `module`, then the rest of it, and give every rank its shards of the main one's weights."""
        full = {}
        if dist.is_main():
            full = {name: parameter.detach() for name, parameter in module.named_parameters()}
        if any(parameter.is_meta for parameter in module.parameters()):
            _allocate(module)
        mesh, layers = self._mesh(), layers_of(module)
        if self.options.tensor_parallel_size > 1:
            split_layers(module, mesh["tensor"])
        how: dict[str, Any] = {
            "mesh": mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"],
            "mp_policy": self._mixed_precision(),
            "offload_policy": CPUOffloadPolicy() if self._offloads() else OffloadPolicy(),
        }
        for layer in layers:
            fully_shard(layer, reshard_after_forward=self.options.reshard_after_forward, **how)
        fully_shard(module, reshard_after_forward=False, **how)  # what its forward ends with, its backward begins with
        self._lockstep.add(module, layers)
        self._scatter(module, full)
        for buffer in module.buffers():
            buffer.data = dist.broadcast_tensor(buffer.data.to(self.device))
        return cast(FSDPModule, module)

    def _mesh(self) -> Any:
        """All processes by (copy of the model, shard of it, part of a layer); dimensions of one are there too."""
        world, size = dist.world_size(), self.options.shard_size or dist.world_size()
        if world % size:
            raise ValueError(f"fsdp shard_size: got {size}, expected a divisor of the number of ranks, {world}")
        shape = (world // size, size, self.options.tensor_parallel_size)
        return torch.distributed.init_device_mesh(
            self.device.type, shape, mesh_dim_names=("replicate", "shard", "tensor")
        )

    def _mixed_precision(self) -> MixedPrecisionPolicy:
        if self.precision_name == "fp32":
            return MixedPrecisionPolicy()
        return MixedPrecisionPolicy(DTYPES[self.precision_name], torch.float32, cast_forward_inputs=False)

    def _offloads(self) -> bool:
        return self.options.cpu_offload and self.device.type != "cpu"

    def _scatter(self, module: nn.Module, full: Mapping[str, Tensor]) -> None:
        """Shard the main process's `full` tensors into the parameters of `module`, one tensor at a time."""
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                value = full[name] if dist.is_main() else torch.empty(parameter.shape, dtype=parameter.dtype)
                value = dist.broadcast_tensor(value.to(self.device, parameter.dtype))
                parameter.copy_(shard_like(value, parameter))

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        if not self.options.sync_each_micro_batch:
            self._root.set_requires_gradient_sync(last)
        self._root.set_requires_all_reduce(last)  # between the groups of hybrid sharding once is enough
        self._root.set_is_last_backward(last)
        with self._lockstep.together(), self.precision():
            yield

    def backward(self, loss: Tensor) -> None:
        loss = self._lockstep.before_backward(loss)
        assert self._unused is not None
        for parameter in self._parameters:
            leaf = getattr(parameter, "_unsharded_param", None)  # made by the first forward that uses its layer
            if leaf is not None and leaf.requires_grad:
                self._unused.add(parameter._param_fqn, leaf, parameter.sharded_param)
        super().backward(loss)

    def step(self, max_grad_norm: float) -> tuple[float, bool]:
        if not self._exchanges_zeros and self._unused is not None and (differences := self._unused.differences()):
            raise ValueError(
                f"fsdp: {differences}. Expected all of them in every loss (add 0 * parameter.sum()), or torch 2.13, which "
                f"can do without, or engine: torch"
            )
        return super().step(max_grad_norm)

    @contextmanager
    def inference(self) -> Iterator[None]:
        # What the base model is called without: the module around it holds embedding and head.
        root = self._root
        # Else the first layer to be called would take itself for the root.
        cast(Any, root)._get_fsdp_state()._lazy_init()
        root.unshard()
        try:
            with self._lockstep.apart(), self.precision():
                yield
        finally:
            self._reshard()

    def _reshard(self) -> None:
        """Free the full weights that a forward without a backward has left."""
        for root in (self._root, *self._placed):
            for group in _groups_of(cast(nn.Module, root)):
                states = type(group._training_state)
                # A forward that has failed would keep what is not freed after forwards.
                if group._training_state == states.FORWARD:
                    group._training_state = states.IDLE
            for module in cast(nn.Module, root).modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def optimizer_state(self) -> dict[str, Any]:
        self._reshard()
        return super().optimizer_state()

    def _stream(
        self, module: nn.Module, dtype: torch.dtype | None, names: Collection[str] | None
    ) -> Iterator[tuple[str, Tensor]]:
        self._reshard()
        yield from super()._stream(module, dtype, names)

    def _full_tensor(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return checkpoint.full_tensor(super()._full_tensor(tensor, dtype))  # fewer bytes travel where it is cast before

    def load(self, path: str | Path) -> dict[str, Any]:
        self._reshard()
        parameters = {checkpoint.plain_name(name): p for name, p in self._base.named_parameters()}

        def like(name: str) -> Tensor | None:
            return parameters.get(name.split("/")[2]) if name.startswith("optimizer/state/") else None

        return checkpoint.load_checkpoint(path, model=self._base, optimizer=self._optimizer, like=like, verify="sizes")


def _parameters_of(module: nn.Module) -> list[Any]:
    """What torch keeps of each sharded parameter of `module`."""
    found: list[Any] = []
    for group in _groups_of(module):
        found += group.fsdp_params
    return found


def _groups_of(module: nn.Module) -> list[Any]:
    """What torch keeps of each layer of `module` that is sharded by itself."""
    found: list[Any] = []
    for inner in module.modules():
        if not isinstance(inner, FSDPModule):
            continue
        state: Any = inner._get_fsdp_state()
        if hasattr(state, "_fsdp_param_groups"):
            found += state._fsdp_param_groups
        else:  # before torch 2.13
            found += filter(None, [state._fsdp_param_group])
    return found


def _allocate(module: nn.Module) -> None:
    """Give a module on the meta device memory on the host, whose pages the system hands out only when they are written."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((inner, name))
    module.to_empty(device="cpu")
    # What was shared has become several: tied weights, which transformers would not find inside adapters.
    for (first, first_name), *others in places.values():
        for inner, name in others:
            inner._parameters[name] = first._parameters[first_name]
