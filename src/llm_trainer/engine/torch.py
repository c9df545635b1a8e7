"""The plain PyTorch engine: one process, or DistributedDataParallel over gloo or NCCL."""

import inspect
import math
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from llm_trainer import checkpoint
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine, EngineOptions
from llm_trainer.engine.device import DTYPES
from llm_trainer.engine.unused import Unused

# The forward need not exchange buffers; torch 2.13 renamed the switch and warns of the old name.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
DDP_OPTIONS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


def make(options: EngineOptions) -> "TorchEngine":
    """One process, or DDP where there are several."""
    return TorchEngine(options.device, options.precision, ddp=options.several)


def clip(parameters: Collection[nn.Parameter], max_grad_norm: float, device: torch.device) -> tuple[float, bool]:
    """Scale gradients down to `max_grad_norm` (0: never) if they are finite; their norm before, and whether they are."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = get_total_norm(grads).float() if grads else torch.zeros(())
    norm = checkpoint.full_tensor(norm).to(device)
    grad_norm = norm.item()  # the one place in a step where the host waits for the device
    finite = math.isfinite(grad_norm)
    if finite and max_grad_norm > 0:
        clip_grads_with_norm_(parameters, max_grad_norm, norm)
    return grad_norm, finite


def make_unwrapped(options: EngineOptions) -> "TorchEngine":
    """For transformers' Trainer, which wraps the module by itself."""
    return TorchEngine(options.device, options.precision)


class TorchEngine(Engine):
    """One process or DDP; fp32, bf16 autocast, or fp16 autocast with a loss scaler."""

    name = "torch"

    def __init__(self, device: torch.device, precision: str = "fp32", ddp: bool = False) -> None:
        self.device = device
        self.precision_name = precision
        self.ddp = ddp
        self._scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
        self._module: nn.Module
        self._optimizer: torch.optim.Optimizer
        self._unused: Unused | None = None  # where gradients are exchanged
        self._is_last = True  # whether the backward under way is the one in which DDP exchanges gradients
        self._exchanges = False  # whether that backward has begun

    def prepare(self, module: nn.Module, base: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        module.to(self.device)
        self._base, self._optimizer = base, optimizer
        if self.ddp:
            index = [self.device.index] if self.device.type == "cuda" else None
            self._unused = Unused(self.device)
            self._unused.add_all(module)
            module = DistributedDataParallel(module, device_ids=index, gradient_as_bucket_view=True, **DDP_OPTIONS)
        self._module = module
        return module

    def precision(self) -> AbstractContextManager[None]:
        if self.precision_name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision_name])

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        # DDP decides in its forward whether this backward will reduce, so the context has to begin before the forward.
        module, self._is_last = self._module, last
        quiet = module.no_sync() if isinstance(module, DistributedDataParallel) and not last else nullcontext()
        with quiet, self.precision():
            yield

    def backward(self, loss: Tensor) -> None:
        # DDP averages gradients over ranks; a step's loss is a sum of shares, so the average is multiplied back.
        if self.ddp:
            loss = loss * dist.world_size()
        if self._unused is not None:
            self._unused.begin()
        self._exchanges = self._is_last
        self._scaler.scale(loss).backward()
        if isinstance(self._module, DistributedDataParallel) and self._unused is not None and self._is_last:
            self._unused.complete()
        self._exchanges = False

    def give_up_step(self) -> None:
        if isinstance(self._module, DistributedDataParallel) and self._unused is not None:
            self._unused.make_up(self._module, self._exchanges)
        self._exchanges = False

    def drop_gradients(self) -> None:
        if self._unused is not None:
            self._unused.in_step()
        # DDP's gradients lie in its buckets, for good: without them the next ones would be allocated beside the buckets.
        self._optimizer.zero_grad(set_to_none=not isinstance(self._module, DistributedDataParallel))

    def step(self, max_grad_norm: float) -> tuple[float, bool]:
        if self._unused is not None:
            self._unused.drop()
        self._scaler.unscale_(self._optimizer)
        parameters: list[nn.Parameter] = sum((group["params"] for group in self._optimizer.param_groups), [])
        grad_norm, finite = clip(parameters, max_grad_norm, self.device)
        if finite:
            self._scaler.step(self._optimizer)
        self._scaler.update()
        self.drop_gradients()
        return grad_norm, finite

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])

    def optimizer_state(self) -> dict[str, Any]:
        return checkpoint.optimizer_state_by_name(self._base, self._optimizer)

    def load(self, path: str | Path) -> dict[str, Any]:
        return checkpoint.load_checkpoint(path, model=self._base, optimizer=self._optimizer, verify="sizes")
