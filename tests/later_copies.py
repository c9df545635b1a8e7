"""Copies between a device and the host that are made as late as may be: what is used before it was waited for is wrong."""

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Copy(NamedTuple):
    """One that was begun: when, and whether to the host."""

    number: int
    outward: bool


class LaterCopies:
    """Stands in for a stream: `begin` spoils the target, `wait` makes all copies up to that one.

    The memory of a source on the "device" is not kept: where nobody else keeps it until `wait`, it is lost.
    Both memories are the CPU's; `on_host` knows which tensors are meant to be on the host.

    Attributes:
        begun: all copies, in order.
        most_leaving: the most that were on their way to the host at one time.
    """

    def __init__(self, device: torch.device) -> None:
        self.begun: list[Copy] = []
        self.most_leaving = 0
        self._host: list[weakref.ref[Tensor]] = []
        self._queue: list[tuple[Copy, Callable[[], Tensor | None], Callable[[], Tensor | None]]] = []

    def host_like(self, tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor)
        self._host.append(weakref.ref(made))
        return made

    def on_host(self, tensor: Tensor) -> bool:
        return any(made() is tensor for made in self._host)

    def begin(self, source: Tensor, target: Tensor) -> Copy:
        target.fill_(torch.nan)
        copy = Copy(len(self.begun), self.on_host(target))
        self.begun.append(copy)
        self._queue.append((copy, weakref.ref(source), weakref.ref(target)))
        leaving = [each for each, *_ in self._queue if each.outward]
        self.most_leaving = max(self.most_leaving, len(leaving))
        return copy

    def wait(self, copy: Copy) -> None:
        while self._queue and self._queue[0][0].number <= copy.number:
            _, source, target = self._queue.pop(0)
            from_here, to_there = source(), target()
            if from_here is not None and to_there is not None:
                to_there.copy_(from_here)
