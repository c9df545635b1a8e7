"""Collectives that are no-ops in one process, so that nothing else asks whether it runs alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm_trainer.config.env import environment
from llm_trainer.engine import watch
from llm_trainer.engine.watch import Watch

T = TypeVar("T")
_patient: dist.ProcessGroup | None = (
    None  # for waits as long as data takes to be prepared, or a checkpoint to be written
)
_behind: dist.ProcessGroup | None = None  # for threads that write a checkpoint while training goes on
# For agreements on the host. Not that of tensors: a rank that is elsewhere must not take the one for the other.
_agreements: dist.ProcessGroup | None = None
_watch: Watch | None = None
_place = "the beginning"
_same_data = 1  # neighbouring processes that see the same data, because each has a part of every layer
_data: dist.ProcessGroup | None = None  # one process of each such neighbourhood; None: all


def start(device: torch.device, timeout_s: float = 600) -> None:
    """Join the process group that torchrun describes; nothing happens in one process or when it is already joined."""
    global _patient, _behind, _agreements, _watch
    if environment().world_size == 1 or _patient is not None:
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # what is offloaded is reduced on the CPU
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where NCCL keeps what it exchanges besides tensors
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **_meeting_point())
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    _behind = dist.new_group(
        backend="gloo", timeout=timedelta(seconds=max(timeout_s, 1800))
    )  # ranks write equally long
    _agreements = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    _watch = watch.start(process_number(), environment().master_addr, gather_objects, num_processes(), timeout_s)


def _meeting_point() -> dict[str, Any]:
    """Where the processes exchange addresses.

    torchrun keeps its store when it starts the processes again, and a new one would find the addresses of the dead there.
    """
    here = environment()
    if not here.agent_store:
        return {}
    store = dist.TCPStore(here.master_addr, here.master_port, is_master=False)
    kept_apart = dist.PrefixStore(f"start-{here.restarts}", store)
    return {"store": kept_apart, "rank": here.rank, "world_size": here.world_size}


def stop() -> None:
    """Leave the process group."""
    global _patient, _behind, _agreements, _watch, _same_data, _data
    if dist.is_initialized():
        dist.destroy_process_group()
    if _watch is not None:
        _watch.close()
    _patient = _behind = _agreements = _watch = _data = None
    _same_data = 1


def share_data(size: int) -> None:
    """Let neighbouring processes, `size` at a time, see the same data and count as one rank (tensor parallelism).

    Raises:
        ValueError: the number of processes is no multiple of `size`.
    """
    global _same_data, _data
    if size == _same_data:
        return
    if num_processes() % size:
        raise ValueError(
            f"tensor_parallel_size: got {size}, expected a divisor of the number of processes, {num_processes()}"
        )
    groups = [dist.new_group(range(first, num_processes(), size)) for first in range(size)]
    _same_data, _data = size, groups[process_number() % size]


def on_duty(last_words: Callable[[], str]) -> AbstractContextManager[None]:
    """The context in which all ranks need each other: one that dies stops the others with a `RankLostError` naming it.

    Args:
        last_words: says how to go on, at the end of the message.
    """
    return nullcontext() if _watch is None else _watch.on_duty(last_words)


def reached(place: str) -> None:
    """Note that this process begins something, such as `step 3, micro-batch 1`: for the message if ranks wait in vain."""
    global _place
    _place = place
    if _watch is not None:
        _watch.reached(place)


def place() -> str:
    """What this process began last, as `reached` was told."""
    return _place


def passed(place: str) -> None:
    """Note something that all ranks must do in the same order since they began what `reached` says."""
    if _watch is not None:
        _watch.passed(place)


def process_number() -> int:
    """Number of this process among all, 0 for the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def num_processes() -> int:
    """Number of processes, and so of devices, that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which part of the data this process sees, of `world_size` parts."""
    return process_number() // _same_data


def world_size() -> int:
    """Number of parts that the data is divided into: of processes, unless some share their data."""
    return num_processes() // _same_data


def shares_data() -> bool:
    """Whether neighbouring processes see the same data (see `share_data`)."""
    return _same_data > 1


def is_main() -> bool:
    """True in the one process that prints and saves."""
    return process_number() == 0


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of `tensor` (any shape) over the ranks; the tensor itself in one process."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=_data)
    return tensor


def sum_numbers(values: list[float], device: torch.device) -> list[float]:
    """Sums over the ranks of numbers that the host knows, in double precision.

    With a backend for the host, as `start` makes one, the device is left alone, and the host need not wait for it.
    """
    if not dist.is_initialized():
        return values
    table = torch.tensor(values, dtype=torch.float64, device=_host_or(device))
    dist.all_reduce(table, group=_data)
    return table.tolist()


def broadcast_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The main process's `tensor`, everywhere, written into what the others pass (of its shape and dtype)."""
    if dist.is_initialized():
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


def largest(value: int, device: torch.device) -> int:
    """The largest `value` of any process, compared on the host as in `sum_numbers`."""
    if not dist.is_initialized():
        return value
    shared = torch.tensor(value, device=_host_or(device))
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return int(shared)


def extremes(values: Sequence[int]) -> list[tuple[int, int]]:
    """The least and the greatest of each of `values` over all processes, compared on the host beside other collectives."""
    if not dist.is_initialized():
        return [(value, value) for value in values]
    table = torch.tensor([*values, *(-value for value in values)])
    dist.all_reduce(table, dist.ReduceOp.MIN, group=_agreements)
    least, negated = table.view(2, -1).tolist()
    return [(low, -high) for low, high in zip(least, negated, strict=True)]


def all_equal(value: int) -> bool:
    """Whether all processes have the same `value`."""
    ((least, greatest),) = extremes([value])
    return least == greatest


def _host_or(device: torch.device) -> torch.device:
    """The host where the processes can exchange its tensors, else `device`."""
    has_host_backend = "gloo" in dist.get_backend_config()
    return torch.device("cpu") if has_host_backend else device


def all_fail(place: str, error: Exception) -> bool:
    """Whether all processes say so of the same `place` within seconds; one that has failed, with `error`, may ask alone."""
    if num_processes() == 1:
        return True
    if _watch is None or (isinstance(error, RuntimeError) and watch.is_broken_connection(error)):
        return False  # another process is lost
    return _watch.all_fail(place)


def fail_together(failure: Exception | None) -> None:
    """Go on if no process has failed, however long one of them takes to come here.

    Raises:
        Exception: `failure`, what failed in this process.
        RankLostError: it failed in another one.
    """
    said = None if failure is None else watch.in_one_line(failure)
    of_all = gather_patiently(said)
    if failure is not None:
        raise failure
    for number, words in enumerate(of_all):
        if words is not None:
            raise watch.RankLostError(f"rank {number} failed: {words}")


def gather_objects(value: object, group: dist.ProcessGroup | None = None) -> list:
    """The `value` of every process, by rank (exchanged in `group`, by default the one of training)."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * num_processes()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_patiently(value: object) -> list:
    """The `value` of every process, however long one of them takes to come here."""
    return gather_objects(value, _patient)


def gather_behind(value: object) -> list:
    """The `value` of every process, for threads beside the training, which use its groups themselves."""
    return gather_objects(value, _behind)


def broadcast_object(value: T, group: dist.ProcessGroup | None = None, source: int = 0) -> T:
    """The `value` of process `source`, everywhere (exchanged in `group`, by default the one of training)."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, group=group)
    return box[0]


def share_object(value: T, source: int) -> T:
    """The `value` of process `source`, everywhere, beside the collectives of tensors."""
    return broadcast_object(value, _agreements, source)


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
    gather_patiently(None)  # on a node that does not share the disk, the files have to be made again
