"""Memory that runs out when a test wants it to, anywhere in the forward or backward of some micro-batches."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

OF_HOST = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "137438953472 bytes. Error code 12 (Cannot allocate memory)"
)
OF_DEVICE = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
PLACES = ("begin", "prepare", "forward", "loss", "backward")
Fails = Callable[[dict[str, Any]], str]


def num_rows(batch: dict[str, Any]) -> int:
    """Rows of a micro-batch, padded or laid flat."""
    lengths = batch.get("document_lengths")
    return len(batch["input_ids"]) if lengths is None else len(lengths)


def at_random(seed: int, share: float = 0.6) -> Fails:
    """Memory that suffices for single rows, and for others sometimes."""
    chance = random.Random(seed)

    def fails(batch: dict[str, Any]) -> str:
        unlucky = num_rows(batch) > 2 and chance.random() < share
        return chance.choice(PLACES[1:]) if unlucky else ""

    return fails


class FailingMemory:
    """Raises while a trainer trains, as often as `fails` says.

    Args:
        trainer: whose steps it is.
        layer: in whose forward or backward the memory runs out: there some things have been computed and others not.
        fails: where it does with this batch, one of `PLACES`; empty: it does not.
        error: what is raised.

    Attributes:
        failures: so far.
    """

    def __init__(self, trainer: Any, layer: nn.Module, fails: Fails, error: Exception = OF_HOST) -> None:
        self.fails, self.error = fails, error
        self.failures = 0
        self._where = ""
        self._prepare, self._loss, self._begin = trainer._prepare_batch, trainer._compute_loss, trainer._begin_step
        self._base = trainer.base_model
        trainer._prepare_batch, trainer._compute_loss, trainer._begin_step = self.prepare, self.loss, self.begin
        layer.register_forward_hook(self._act)

    def begin(self, batches: list[Any], *rest: Any) -> None:
        if self._base.training and "begin" in [self.fails(batch) for batch in batches]:
            self._fail()
        self._begin(batches, *rest)

    def prepare(self, batch: Any) -> Any:
        self._where = self.fails(batch) if self._base.training else ""
        if self._where == "prepare":
            self._fail()
        return self._prepare(batch)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        if self._where == "loss":
            self._fail()
        return self._loss(outputs, batch)

    def _act(self, layer: nn.Module, inputs: Any, outputs: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if self._where == "forward":
            self._fail()
        elif self._where == "backward":
            output: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
            output.register_hook(lambda gradient: self._fail())

    def _fail(self) -> None:
        self._where = ""
        self.failures += 1
        raise type(self.error)(str(self.error))
