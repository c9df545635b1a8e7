"""What both ends of a transfer of weights know: the hash of a tensor, what is announced, and the group that broadcasts.

Rollout servers import this file in an environment of their own, where nothing of ours is but its neighbours: it needs torch
and numpy, and safetensors inside of functions.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_WORD = 8  # bytes that are mixed at once
_AT_ONCE_ON_CPU = 1 << 14  # words; few enough for a core's cache
_AT_ONCE = 1 << 24


def _signed(number: int) -> int:
    """A number of 64 bits as torch has it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


# Of SplitMix64 (Steele et al. 2014).
_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


class Hashes:
    """64-bit hashes of tensors by name: of every bit at its place, and of shape and type. Made where the tensors lie."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, str]] = {}

    @torch.no_grad()
    def note(self, name: str, tensor: Tensor) -> None:
        """Hash a tensor; what is done to it afterwards does not matter."""
        self._found[name] = (_mixed_sum(tensor), f"{tuple(tensor.shape)} {tensor.dtype}")

    def read(self) -> dict[str, int]:
        """The hashes; the host waits for the device once."""
        sums = [found.cpu() for found, _ in self._found.values()]
        hashes = {}
        for (name, (_, facts)), number in zip(self._found.items(), sums, strict=True):
            digest = hashlib.blake2b(f"{int(number)} {facts}".encode(), digest_size=8).digest()
            hashes[name] = int.from_bytes(digest, "big")
        return hashes


def _mixed_sum(tensor: Tensor) -> Tensor:
    """`[]` int64, a sum over words of 8 bytes, each mixed with its place: it does not depend on the order of addition."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if len(data) % _WORD or data.storage_offset() % _WORD:
        data = F.pad(data, (0, -len(data) % _WORD))
        data = data.clone() if data.storage_offset() % _WORD else data
    words = data.view(torch.int64)
    if words.device.type == "cpu":
        return torch.tensor(_mixed_sum_on_cpu(words.numpy()))
    return _mixed_sum_of_words(words)


def _mixed_sum_of_words(words: Tensor) -> Tensor:
    """`[]` of `words` int64, by torch."""
    places = torch.arange(1, 1 + min(_AT_ONCE, len(words)), device=words.device) * _GOLDEN
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for first in range(0, len(words), _AT_ONCE):
        mixed = words[first : first + _AT_ONCE] + places[: len(words) - first]
        mixed += _signed(first * _GOLDEN)
        mixed ^= mixed >> 32
        mixed *= _FIRST
        mixed ^= mixed >> 29
        mixed *= _SECOND
        mixed ^= mixed >> 32
        total += mixed.sum()
    return total


def _mixed_sum_on_cpu(words: np.ndarray) -> int:
    """The same number, by numpy, which multiplies 64-bit integers two to three times as fast, in memory that stays."""
    at_once = min(_AT_ONCE_ON_CPU, len(words))
    places = np.arange(1, 1 + at_once) * _GOLDEN
    both = np.empty((2, at_once), dtype=np.int64)
    total = 0
    for first in range(0, len(words), at_once or 1):
        block = words[first : first + at_once]
        mixed, shifted = both[:, : len(block)]
        np.add(block, places[: len(block)], out=mixed)
        mixed += _signed(first * _GOLDEN)
        mixed ^= np.right_shift(mixed, 32, out=shifted)
        mixed *= _FIRST
        mixed ^= np.right_shift(mixed, 29, out=shifted)
        mixed *= _SECOND
        mixed ^= np.right_shift(mixed, 32, out=shifted)
        total += int(mixed.sum())
    return _signed(total)


@dataclass
class Joining:
    """How a worker joins a group with the trainer, whose rank is 0.

    Attributes:
        backend: "nccl", or "gloo" on CPUs.
        host, port: of the trainer's store.
        first_rank: of this server's workers.
        world_size: the trainer and all workers of all servers.
    """

    backend: str = ""
    host: str = ""
    port: int = 0
    first_rank: int = 1
    world_size: int = 2


@dataclass
class Bucket:
    """Some tensors of an update.

    Attributes:
        version: of the weights.
        names, dtypes, shapes: of the tensors, in their order.
        path: of the safetensors file that holds them; "": the trainer broadcasts their bytes, end to end.
        is_last: nothing comes after it.
    """

    version: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    path: str = ""
    is_last: bool = False


def check_file(bucket: Bucket) -> None:
    """
    Raises:
        RuntimeError: a file is not there, cut short, or does not hold what was announced.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(bucket.path, framework="pt") as file:
            missing = sorted(set(bucket.names) - set(file.keys()))
    except (OSError, SafetensorError) as error:
        raise RuntimeError(
            f"{bucket.path} cannot be read here: {error}. Expected a folder that trainer and servers see at this path"
        ) from error
    if missing:
        raise RuntimeError(f"{bucket.path} does not hold {missing[0]}, which was announced")


def tensors_of(bucket: Bucket, device: torch.device) -> list[tuple[str, Tensor]]:
    """The tensors of a file, in the order in which they were announced; on a GPU they are hashed faster."""
    from safetensors.torch import load_file

    found = load_file(bucket.path, device=str(device))
    return [(name, found[name]) for name in bucket.names]


JOINING_SECONDS = 300.0  # until all have met, and for one broadcast
ALIGNED = 16  # bytes: so that every tensor of a bucket can be looked at in its own type


def _sizes(bucket: Bucket) -> list[int]:
    """Bytes of each tensor in a bucket."""
    sizes = []
    for kind, shape in zip(bucket.dtypes, bucket.shapes, strict=True):
        sizes.append(math.prod(shape) * getattr(torch, kind).itemsize)
    return sizes


def _laid_out(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Room for tensors of so many bytes, end to end, and the part of each."""
    rounded = [-(-size // ALIGNED) * ALIGNED for size in sizes]
    flat = torch.empty(sum(rounded), dtype=torch.uint8, device=device)
    return flat, [part[:size] for part, size in zip(flat.split(rounded), sizes, strict=True)]


def send(group: Any, bucket: Bucket, tensors: Sequence[Tensor], device: torch.device) -> None:
    """Broadcast the tensors of a bucket; the others `receive` them."""
    flat, parts = _laid_out(_sizes(bucket), device)
    for part, tensor in zip(parts, tensors, strict=True):
        part.copy_(tensor.detach().contiguous().flatten().view(torch.uint8))
    _broadcast(group, flat)


def receive(group: Any, bucket: Bucket, device: torch.device) -> list[tuple[str, Tensor]]:
    """The tensors of a bucket that the trainer sends."""
    flat, parts = _laid_out(_sizes(bucket), device)
    _broadcast(group, flat)
    found = []
    for name, part, kind, shape in zip(bucket.names, parts, bucket.dtypes, bucket.shapes, strict=True):
        found.append((name, part.view(getattr(torch, kind)).view(shape)))
    return found


def _broadcast(group: Any, flat: Tensor) -> None:
    group.broadcast([flat]).wait()
    if flat.is_cuda:  # NCCL only waits on the stream
        torch.cuda.current_stream(flat.device).synchronize()


def joined(joining: Joining, rank: int) -> Any:
    """A group of the trainer, rank 0, with workers of rollout servers; apart from every other group of the process."""
    from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

    limit = timedelta(seconds=JOINING_SECONDS)
    # NOTE: the trainer's store must listen before workers are told of it, so it waits for none of them.
    store = TCPStore(joining.host, joining.port, joining.world_size, rank == 0, limit, wait_for_workers=False)
    if joining.backend == "gloo":
        return ProcessGroupGloo(PrefixStore("gloo", store), rank, joining.world_size, limit)
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = limit
    return ProcessGroupNCCL(PrefixStore("nccl", store), rank, joining.world_size, options)
