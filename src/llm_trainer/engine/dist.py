"""Collectives that are no-ops in one process, so that nothing else asks whether it runs alone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from llm_trainer.config.env import environment
from llm_trainer.engine import watch
from llm_trainer.engine.watch import Watch

T = TypeVar("T")
_patient: dist.ProcessGroup | None = None  # for waits as long as the data takes to be prepared
_watch: Watch | None = None


def start(device: torch.device, timeout_s: float = 600) -> None:
    """Join the process group that torchrun describes; nothing happens in one process or when it is already joined."""
    global _patient, _watch
    if environment().world_size == 1 or _patient is not None:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # what is offloaded is reduced on the CPU
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL keeps what it exchanges besides tensors
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    _watch = watch.start(rank(), environment().master_addr, gather_objects, world_size())


def stop() -> None:
    """Leave the process group."""
    global _patient, _watch
    if dist.is_initialized():
        dist.destroy_process_group()
    if _watch is not None:
        _watch.close()
    _patient = _watch = None


def on_duty(last_words: Callable[[], str]) -> AbstractContextManager[None]:
    """The context in which all ranks need each other: one that dies stops the others with a `RankLostError` naming it.

    Args:
        last_words: says how to go on, at the end of the message.
    """
    return nullcontext() if _watch is None else _watch.on_duty(last_words)


def rank() -> int:
    """Number of this process, 0 for the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that prints and saves."""
    return rank() == 0


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` (any shape) over the processes; the tensor itself in one process."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def broadcast_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The main process's `tensor`, everywhere, written into what the others pass (of its shape and dtype)."""
    if dist.is_initialized():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


def largest(value: int, device: torch.device) -> int:
    """The largest `value` of any process; they compare them on `device`."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def gather_objects(value: object) -> list:
    """The `value` of every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T, group: dist.ProcessGroup | None = None) -> T:
    """The main process's `value`, everywhere (the ranks exchange it in `group`, by default the one of training)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=group)
    return box[0]


@contextmanager
def main_process_first() -> Iterator[None]:
    """The main process runs the block first (it may write files); the others wait and then find its files.

    However long it takes: tokenizing may outlast the timeout of training. If the main process fails, the others fail too.
    """
    failure: Exception | None = None
    if is_main():
        try:
            yield
        except Exception as error:
            failure = error
    failure = broadcast_object(failure, _patient)
    if failure is not None:
        raise failure
    if not is_main():
        yield
