"""What every engine can do: five verbs, shaped by the hardest implementation (sharded training)."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn


class Engine(ABC):
    """Executes the steps of one trainer on some machinery (one process, DDP, ...)."""

    device: torch.device
    precision_name: str  # 'fp32', 'bf16' or 'fp16'

    @abstractmethod
    def prepare(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Place and wrap `module` together with the optimizer of its parameters; the result is what a trainer calls."""

    @abstractmethod
    def precision(self) -> AbstractContextManager[None]:
        """The context that a forward without gradients runs in."""

    @abstractmethod
    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """The context around forward AND backward of a micro-batch; only the `last` one of a step talks to other ranks."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate a scalar `loss` that is this micro-batch's share of the whole step's loss (shares ADD over ranks)."""

    @abstractmethod
    def step(self, max_grad_norm: float) -> torch.Tensor:
        """Unscale, clip, and update unless the gradient is not finite; zero the gradients.

        Returns:
            Norm of the whole gradient before clipping, scalar fp32. If it is not finite nothing was updated.
        """

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What the engine itself must remember (the fp16 scale)."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`."""
