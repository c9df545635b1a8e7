"""How much memory a process may still take: of its device, or of the host with the limits that containers and shells set."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from llm_trainer.config.env import environment
from llm_trainer.cores import control_groups

ROOT = Path("/")  # tests have one of their own
_UNLIMITED = 1 << 60  # cgroups of version 1 write a number of this size where there is no limit


class Room(NamedTuple):
    """Memory that this process may still take, its share where several processes take it from the same.

    Attributes:
        free: bytes.
        total: bytes of the device, or the lowest limit on host memory: what a machine is told apart by.
        limit: what sets it, in words.
    """

    free: int
    total: int
    limit: str


def room_on(device: torch.device) -> Room:
    """Memory of a device that this process may still take; of the CPU: of host memory."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Room(free + idle, total, "device memory")
    processes = environment().local_world_size
    limits = [Room(_UNLIMITED, _UNLIMITED, "no known limit"), *_of_process()]
    for free, total, limit in (*_of_machine(), *_of_containers()):
        limits.append(Room(free // processes, total // processes, limit))
    tightest = min(limits)
    return tightest._replace(total=min(limit.total for limit in limits))


def free_memory() -> int | None:
    """Bytes of host memory that all processes here may still take, without anything being killed; None: nobody says."""
    return min((room.free for room in (*_of_machine(), *_of_containers())), default=None)


def _of_machine() -> Iterator[Room]:
    """What the kernel calls available: free, or a cache of files that it would give up."""
    table = _table(ROOT / "proc/meminfo")
    if "MemAvailable" in table:
        yield Room(table["MemAvailable"] * 1024, table["MemTotal"] * 1024, "free memory")


def _of_containers() -> Iterator[Room]:
    """The control groups of this process and those around them, of version 2 and of version 1."""
    for folder, version in control_groups("memory", ROOT / "sys/fs/cgroup", ROOT / "proc/self/cgroup"):
        names = ("memory.max", "memory.current", "inactive_file")
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        limit, used = _number(folder / names[0]), _number(folder / names[1])
        if limit is not None and used is not None and limit < _UNLIMITED:
            cache = _table(folder / "memory.stat").get(names[2], 0)  # of files; given up before a process is killed
            yield Room(max(0, limit - used + cache), limit, "the container's limit")


def _of_process() -> Iterator[Room]:
    """What `ulimit -v` and `ulimit -d` set."""
    table = _table(ROOT / "proc/self/status")
    limits = (
        (resource.RLIMIT_AS, "VmSize", "the limit on address space (ulimit -v)"),
        (resource.RLIMIT_DATA, "VmData", "the limit on data (ulimit -d)"),
    )
    for number, name, said in limits:
        limit, _ = resource.getrlimit(number)
        if limit != resource.RLIM_INFINITY and name in table:
            yield Room(max(0, limit - table[name] * 1024), limit, said)


def resident_now() -> int:
    """Bytes of the resident size of this process; 0 where nobody says."""
    return _table(ROOT / "proc/self/status").get("VmRSS", 0) * 1024


def resident_peak() -> int | None:
    """Bytes of the largest resident size of this process since `forget_resident_peak`."""
    peak = _table(ROOT / "proc/self/status").get("VmHWM")
    return None if peak is None else peak * 1024


def forget_resident_peak() -> bool:
    """Begin to look for the largest resident size anew; whether that can be done here."""
    try:
        (ROOT / "proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _table(path: Path) -> dict[str, int]:
    """Lines such as `VmHWM:  1234 kB`, as numbers by name."""
    table = {}
    for line in _lines(path):
        words = line.replace(":", " ").split()
        if len(words) > 1 and words[1].isdigit():
            table[words[0]] = int(words[1])
    return table


def _number(path: Path) -> int | None:
    """The number in a file; None where there is none: no file, or the word `max`."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def checkpoint_copy(
    weights: float, optimizer: float, *, gathers_weights: bool, gathers_state: bool, share: float, is_main: bool
) -> int:
    """Host memory, in bytes, for what one process copies of a checkpoint that is saved in the background.

    What an engine gathers for it is in host memory anyway, whenever it is saved.

    Args:
        weights: bytes of all.
        optimizer: bytes of all its state.
        gathers_weights, gathers_state: see `base.Engine`.
        share: of the optimizer's state that one process holds.
        is_main: whether it is the main process, which alone saves what every process holds.
    """
    copied = 0.0
    if is_main and not gathers_weights:
        copied += weights
    if not gathers_state and (is_main or share < 1):
        copied += optimizer * share
    return int(copied)
