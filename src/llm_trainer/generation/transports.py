"""How weights come to rollout servers: as files that they read, or broadcast over a group. One interface, `Transport`."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_trainer.generation.vllm_server import Dialect, Facts
from llm_trainer.generation.worker.llm_trainer_wire import Bucket, Joining, joined, send

BUCKET_BYTES = 1 << 30  # of tensors that are announced and sent together
SHARED_MEMORY = Path("/dev/shm")
Tensors = Sequence[tuple[str, Tensor]]


class Transport(Protocol):
    """Brings weights to servers. The process that moves weights calls it, in this order."""

    def open(self, servers: Sequence[tuple[Dialect, Facts]]) -> None:
        """Be ready for an update of these servers, which have begun it."""

    def send(self, version: str, tensors: Tensors, to_all: Callable[[Callable[[Dialect], None]], Any]) -> None:
        """Bring some tensors to the servers.

        Args:
            to_all: Calls a function for every server that is left, at once, and waits for all.
        """

    def close(self) -> None:
        """The update is over, well or not."""


class Files:
    """Weights as safetensors files in a folder that trainer and servers see.

    An update lies there whole, until the servers have applied it: they touch nothing before all of it is there.

    Args:
        folder: On a file system that all of them share; None: in shared memory, for servers on this machine.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        if folder is None and not SHARED_MEMORY.is_dir():
            raise ValueError(
                "the files transport: this machine has no /dev/shm; expected weight_folder, a folder that trainer and servers "
                "see"
            )
        self.folder = Path(folder or SHARED_MEMORY)
        self._update: Path | None = None
        self._number = 0

    def open(self, servers: Sequence[tuple[Dialect, Facts]]) -> None:
        """As `Transport.open` says."""
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(self.folder)
        self._update, self._number = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_here()}-", dir=self.folder)), 0
        self._update.chmod(0o755)  # servers may be another user's

    def send(self, version: str, tensors: Tensors, to_all: Callable[[Callable[[Dialect], None]], Any]) -> None:
        """As `Transport.send` says."""
        from safetensors.torch import save_file

        assert self._update is not None
        path = self._update / f"{self._number}.safetensors"
        self._number += 1
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors}, path)
        bucket = announced(version, tensors, str(path))
        to_all(lambda server: server.update(bucket))

    def close(self) -> None:
        """As `Transport.close` says."""
        if self._update is not None:
            shutil.rmtree(self._update, ignore_errors=True)
        self._update = None


class Broadcast:
    """Weights over a group of the trainer with all workers of all servers.

    Args:
        backend: "nccl" on GPUs; "gloo" on CPUs.
        device: That the trainer's tensors are on.
        host: Of the trainer, as servers reach it; None: this machine's name, or 127.0.0.1 where all servers are on it.
    """

    def __init__(self, backend: str = "nccl", device: torch.device | None = None, host: str | None = None) -> None:
        self.backend, self.host = backend, host
        self.device = device or torch.device({"nccl": "cuda"}.get(backend, "cpu"))
        self._group: Any = None
        self._members: list[str] = []

    def open(self, servers: Sequence[tuple[Dialect, Facts]]) -> None:
        """As `Transport.open` says; servers that were started since, or went away, make a new group."""
        members = [facts.started for _, facts in servers]
        if members == self._members:
            return
        self._group, self._members = None, []
        world_size = 1 + sum(facts.num_workers for _, facts in servers)
        host, port = self.host or _name_for(servers), _free_port()
        with ThreadPoolExecutor(len(servers)) as pool:
            first_rank, waiting = 1, []
            for server, facts in servers:
                joining = Joining(self.backend, host, port, first_rank, world_size)
                waiting.append(pool.submit(server.join, joining))
                first_rank += facts.num_workers
            self._group = joined(Joining(self.backend, host, port, 1, world_size), rank=0)
            for one in waiting:
                one.result()
        self._members = members

    def send(self, version: str, tensors: Tensors, to_all: Callable[[Callable[[Dialect], None]], Any]) -> None:
        """As `Transport.send` says."""
        bucket = announced(version, tensors, "")
        # Servers answer when they have everything, so they are told in a thread, while this one broadcasts.
        with ThreadPoolExecutor(1) as pool:
            told = pool.submit(to_all, lambda server: server.update(bucket))
            send(self._group, bucket, [tensor for _, tensor in tensors], self.device)
            told.result()

    def close(self) -> None:
        """As `Transport.close` says; the group stays for the next update."""


def announced(version: str, tensors: Tensors, path: str) -> Bucket:
    """What servers are told of some tensors."""
    return Bucket(
        version,
        names=[name for name, _ in tensors],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        shapes=[list(tensor.shape) for _, tensor in tensors],
        path=path,
    )


def buckets(
    weights: Iterable[tuple[str, Tensor]], most_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, Tensor]]]:
    """Tensors in their order, together as long as they have so many bytes; a larger one goes alone."""
    found: list[tuple[str, Tensor]] = []
    num_bytes = 0
    for name, tensor in weights:
        size = tensor.numel() * tensor.itemsize
        if found and num_bytes + size > most_bytes:
            yield found
            found, num_bytes = [], 0
        # A streamed tensor may be the engine's buffer, which the next one overwrites.
        found.append((name, tensor.detach().clone()))
        num_bytes += size
    if found:
        yield found


PREFIX = "llm-trainer-weights-"
LEFT_BEHIND_SECONDS = 3600


def _here() -> str:
    """This process among those of all machines that share a folder."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _remove_left_behind(folder: Path) -> None:
    """Remove updates of processes of this machine that are gone: shared memory is not freed by their end."""
    for path in folder.glob(f"{PREFIX}{socket.gethostname()}-*"):
        number = path.name.removeprefix(f"{PREFIX}{socket.gethostname()}-").split("-")[0]
        is_gone = number.isdigit() and not Path("/proc", number).exists()
        if (
            is_gone and time.time() - path.stat().st_mtime > LEFT_BEHIND_SECONDS
        ):  # another container counts its processes anew
            shutil.rmtree(path, ignore_errors=True)


def _name_for(servers: Sequence[tuple[Dialect, Facts]]) -> str:
    """This machine, as all servers reach it."""
    if all("//127.0.0.1" in server.link.url or "//localhost" in server.link.url for server, _ in servers):
        return "127.0.0.1"
    return socket.gethostname()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
