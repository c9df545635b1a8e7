"""Copies of tensors in host memory, of which a checkpoint is written while training goes on."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of a container that shows its own limit there


def host_copy(tensor: Tensor) -> Tensor:
    """A copy in host memory that nothing else writes to; one of a GPU's is there after `finish_copies`."""
    tensor = tensor.detach()
    if tensor.device.type == "cpu":
        return tensor.clone(memory_format=torch.contiguous_format)
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type == "cuda")
    return copy.copy_(tensor, non_blocking=True)


def finish_copies(device: torch.device) -> None:
    """Wait for the copies of what lies on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> int | None:
    """Bytes of host memory that can be taken without anything being swapped or killed; None: the system does not say."""
    try:
        lines = MEMORY.read_text().splitlines()
    except OSError:
        return None
    sizes = dict(line.split(":", 1) for line in lines)
    free = int(sizes["MemAvailable"].split()[0]) * 1024
    with suppress(OSError, ValueError, KeyError):  # no limit, or none that is shown here
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = dict(line.split() for line in (GROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cache["inactive_file"]))
    return free


def fits(processes: Sequence[tuple[str, int, int | None]]) -> bool:
    """Whether there is memory for the copies of all processes: of each its host, the bytes it copies, and those free there."""
    for host, _, free in processes:
        needed = sum(size for other, size, _ in processes if other == host)
        if free is not None and needed > 0.9 * free:
            return False
    return True
