"""Running out of memory: how it is recognised, and how what a failed forward or backward held is let go."""

import ctypes
import errno
import gc
from contextlib import suppress
from traceback import clear_frames

import torch

# What else than `torch.OutOfMemoryError` and `MemoryError` says so: torch's allocator of host memory in two versions, oneDNN,
# the C++ library, cuBLAS for its workspace, and allocators of other devices.
_SAID = (
    "can't allocate memory",
    "not enough memory",
    "could not create a memory",
    "could not create a primitive",
    "std::bad_alloc",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "out of memory",
)


class OutOfMemoryError(RuntimeError):
    """Something that cannot be cut any smaller does not fit into memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory left, on the device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAID)


def let_go(error: BaseException) -> str:
    """Free the tensors in the frames that `error` came through; what it says, in one line.

    NOTE: its traceback holds every frame of the forward that failed, and with them all activations.
    """
    said = " ".join(str(error).split())[:300]
    found: BaseException | None = error
    while found is not None:
        clear_frames(found.__traceback__)  # those that still run are left alone
        found.__traceback__ = None
        found = found.__cause__ or found.__context__
    return said or type(error).__name__


def release(device: torch.device) -> None:
    """Give back what is held and no longer used, so that it can be had in other sizes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "cpu":
        with suppress(OSError, AttributeError):  # not the C library of GNU
            ctypes.CDLL(None).malloc_trim(0)
