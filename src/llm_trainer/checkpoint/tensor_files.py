"""Tensors in files: written and hashed in one pass, several files at a time; read by slices, memory-mapped.

The format is safetensors (https://github.com/huggingface/safetensors#format): a header in JSON, then the bytes of one tensor
after the other. Its own writer makes a second copy, computes no hash and keeps the interpreter to itself, so that training
would stand still. Several processes may write shards of one tensor, each into a file of its own: the header then says where
in the whole tensor a shard lies.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from llm_trainer.checkpoint.valid import THREADS, CheckpointError, Written

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
SHARDS = "shards"  # in a file's metadata: {name: [shape of the whole tensor, offset of the shard that is here]}
CHUNK = 1 << 23  # bytes that are hashed and written at a time
FILE_BYTES = 1 << 30  # tensors go into another file after this many, so that several threads can write and verify


@dataclass(frozen=True)
class Shard:
    """A box of a tensor of `shape` that begins at `offset`; often all of it."""

    tensor: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> "Shard":
        return cls(tensor, tuple(tensor.shape), (0,) * tensor.ndim)


@dataclass(frozen=True)
class TensorFile:
    """What one file will hold: shards of tensors by name, and text for its header."""

    shards: Mapping[str, Shard]
    metadata: Mapping[str, str]


def own_shard(tensor: Tensor, is_main: bool) -> Shard | None:
    """What this process has to write of a tensor that all ranks hold together (FSDP2), or of one that they all have.

    Args:
        is_main: whether this is the process that writes what is not sharded.
    """
    tensor = tensor.detach()
    if type(tensor) is Tensor:  # as nearly all are; what follows takes most of a second to import
        return Shard.whole(tensor) if is_main else None
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Shard as IsSharded

    if not isinstance(tensor, DTensor):
        return Shard.whole(tensor) if is_main else None
    coordinate = tensor.device_mesh.get_coordinate() or ()
    for placement, position in zip(tensor.placements, coordinate, strict=False):
        if not isinstance(placement, IsSharded) and position > 0:
            return None  # the same as at position 0
    shape, offset = _box(tensor)
    return Shard(tensor.to_local(), tuple(tensor.shape), offset) if math.prod(shape) else None


def _box(like: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and offset of what this process holds of a sharded tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(like.shape, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def shard_files(shards: Mapping[str, Shard], rank: int) -> dict[str, TensorFile]:
    """The files, by their path in a checkpoint's folder, of what process number `rank` holds."""
    groups: list[dict[str, Shard]] = [{}]
    size = 0
    for name, shard in shards.items():
        if size > FILE_BYTES:
            groups.append({})
            size = 0
        groups[-1][name] = shard
        size += shard.tensor.nbytes
    files = {}
    for number, group in enumerate(groups):
        where = {name: [shard.shape, shard.offset] for name, shard in group.items()}
        files[f"tensors/{rank:05d}-{number:03d}.safetensors"] = TensorFile(group, {SHARDS: json.dumps(where)})
    return files if shards else {}


def write_files(folder: Path, files: Mapping[str, TensorFile]) -> dict[str, Written]:
    """Write files into `folder`, several at a time, and flush them; their sizes and hashes by name."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(THREADS) as pool:
        written = pool.map(lambda name: _write_file(folder / name, files[name]), files)
        return dict(zip(files, written, strict=True))


def _write_file(path: Path, content: TensorFile) -> Written:
    # 1. the header; the largest elements come first, so that all of them are aligned
    tensors = {name: shard.tensor for name, shard in content.shards.items()}
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(content.metadata)}
    end = 0
    for name in ordered:
        tensor = tensors[name]
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"the tensor '{name}' is of {tensor.dtype}, which a checkpoint cannot hold")
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # 2. header and tensors, hashed on their way
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:  # a process that is forked meanwhile has nothing to write a second time
        for data in (memoryview(len(text).to_bytes(8, "little") + text), *map(bytes_of, map(tensors.get, ordered))):
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                digest.update(chunk)
                while chunk:  # the system may take a part of it
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
        return Written(file.tell(), digest.hexdigest())


def bytes_of(tensor: Tensor | None) -> memoryview:
    """The bits of a tensor, one element after the other."""
    assert tensor is not None
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class TensorFolder:
    """The tensors in the files of a folder, whoever wrote which shard of them. Nothing is read before it is asked for.

    Attributes:
        shapes: of the tensors, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[tuple[Any, tuple[int, ...], tuple[int, ...]]]] = {}  # (file, offset, shape)
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            shards = json.loads((file.metadata() or {}).get(SHARDS, "{}"))
            for name in file.keys():  # noqa: SIM118  # not a mapping
                here = tuple(file.get_slice(name).get_shape())
                shape, offset = shards.get(name, [here, [0] * len(here)])
                self.shapes[name] = tuple(shape)
                self._places.setdefault(name, []).append((file, tuple(offset), here))

    def read(self, name: str) -> Tensor:
        """All of a tensor, on the CPU; mapped where one file holds it."""
        file, _, here = self._places[name][0]
        if here == self.shapes[name]:
            return file.get_tensor(name)
        return self._read_box(name, self.shapes[name], (0,) * len(here))

    def read_all(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: self.read(name) for name in self.shapes}

    def read_like(self, name: str, like: Tensor) -> Tensor:
        """A tensor sharded as `like` is, which has its shape: only this process's shard is read; all of it if that is whole."""
        from torch.distributed.tensor import DTensor

        if not isinstance(like, DTensor):
            return self.read(name)
        local = self._read_box(name, *_box(like))
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _read_box(self, name: str, shape: tuple[int, ...], offset: tuple[int, ...]) -> Tensor:
        """A box of a tensor, put together from the shards that overlap with it."""
        box: Tensor | None = None
        for file, begin, size in self._places[name]:
            first = [max(a, b) for a, b in zip(begin, offset, strict=True)]
            last = [min(a + n, b + m) for a, n, b, m in zip(begin, size, offset, shape, strict=True)]
            if any(a >= b for a, b in zip(first, last, strict=True)):
                continue
            in_shard = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, begin, strict=True))
            in_box = tuple(slice(a - s, b - s) for a, b, s in zip(first, last, offset, strict=True))
            found = file.get_slice(name)[in_shard]
            if box is None:
                box = torch.empty(shape, dtype=found.dtype)
            box[in_box] = found
        if box is None:  # a rank may hold nothing of a small tensor
            file, *_ = self._places[name][0]
            box = torch.empty(shape, dtype=file.get_tensor(name).dtype)
        return box
