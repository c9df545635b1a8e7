"""Reading what earlier versions wrote: tensors in the format of `torch.distributed.checkpoint`."""

import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_trainer.checkpoint.valid import CheckpointError


def read_tensors(folder: Path, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """Read all tensors that any number of ranks wrote, onto the CPU; see `state.read_tensors`."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (folder / ".metadata").open("rb") as file:
                return _MetadataUnpickler(file).load()

    reader = Reader(folder)
    tensors: dict[str, Tensor] = {}
    for name, entry in reader.read_metadata().state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            continue  # bytes would be unpickled: not ours, never read
        model, dtype = like(name), entry.properties.dtype
        if model is not None and model.shape == entry.size:
            tensors[name] = torch.empty_like(model, dtype=dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


class _MetadataUnpickler(pickle.Unpickler):
    """torch pickles the description of the tensors; a foreign checkpoint must not get to run code through it."""

    ALLOWED = re.compile(
        r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|StorageMeta|_MEM_FORMAT_ENCODING)"
        r"|torch\.distributed\.checkpoint\.metadata\.(Tensor|Bytes|Chunk)(StorageMetadata|Properties)"
        r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
        r"|torch\.(Size|float\d+\w*|bfloat16|u?int\d+|bool|complex\d+|serialization\._get_layout)"
        r"|pathlib\.(_local\.)?(PosixPath|WindowsPath)|collections\.OrderedDict"
    )

    def find_class(self, module: str, name: str) -> Any:
        if not self.ALLOWED.fullmatch(f"{module}.{name}"):
            raise CheckpointError(f"the tensors' .metadata asks for {module}.{name}, which no tensor needs: not loaded")
        return super().find_class(module, name)
