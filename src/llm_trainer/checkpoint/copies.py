"""Copies of tensors in host memory, of which a checkpoint is written while training goes on."""

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 1 << 30  # bytes


class HostMemory:
    """Room for copies in host memory, kept from one save to the next.

    Memory that is new to a process takes several times longer to write than what it has written before, and memory that a
    GPU copies into by itself (pinned) still longer to get.

    Args:
        device: where the tensors lie that are copied.

    Attributes:
        size: bytes in all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.size = 0
        self._blocks: list[Tensor] = []
        self._block = self._offset = 0  # where the next copy goes

    def reserve(self, size: int) -> None:
        """Get `size` bytes in all, and write to them."""
        while self.size < size:
            self._insert(len(self._blocks), min(size - self.size, BLOCK))

    def _insert(self, position: int, size: int) -> None:
        pinned = self.device.type == "cuda"
        self._blocks.insert(position, torch.zeros(size, dtype=torch.uint8, pin_memory=pinned))
        self.size += size

    def start_over(self) -> None:
        """Let the next copies take the place of those that were made so far."""
        self._block = self._offset = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy that nothing else writes to; one of a GPU's tensor is there after `finish`."""
        place = self._take(tensor.nbytes)[: tensor.nbytes]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

    def _take(self, size: int) -> Tensor:
        aligned = -(-size // 64) * 64
        while True:
            is_new = self._block == len(self._blocks)
            if is_new or (self._offset == 0 and len(self._blocks[self._block]) < aligned):
                self._insert(self._block, max(aligned, 64))
            block, start = self._blocks[self._block], self._offset
            if start + aligned <= len(block):
                self._offset += aligned
                return block[start:]
            self._block, self._offset = self._block + 1, 0

    def finish(self) -> None:
        """Wait for the copies of what lies on a GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def fits(processes: Sequence[tuple[str, int, int | None]]) -> bool:
    """Whether there is memory for the copies of all processes: of each its host, the bytes it copies, and those free there."""
    for host, _, free in processes:
        needed = sum(size for other, size, _ in processes if other == host)
        if free is not None and needed > 0.9 * free:
            return False
    return True
