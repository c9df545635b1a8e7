"""How many threads the matrix products of this process run on: its share of the cores, unless the user has said.

Threads of OpenMP spin while they wait for each other. Two processes that each start a thread per core of their machine
spin against each other, and torchrun's answer to that is one thread per process, however many cores there are.
"""

import socket
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from llm_trainer.config.env import environment, set_default
from llm_trainer.config.errors import counted
from llm_trainer.cores import allowed_cpus, cpu_quota, physical_cores
from llm_trainer.engine import dist
from llm_trainer.state import Choice

KEY = "OMP_NUM_THREADS"


class Place(NamedTuple):
    """Where a process computes.

    Attributes:
        machine: whoever says the same shares its CPUs: containers have names of their own, and their own quotas.
        cpus: that it may run on.
        cores: among them.
        quota: cores' worth of time for all processes there; None: no limit.
    """

    machine: str
    cpus: frozenset[int]
    cores: int
    quota: float | None

    @classmethod
    def here(cls) -> "Place":
        """That of this process."""
        cpus = allowed_cpus()
        return cls(socket.gethostname(), cpus, physical_cores(cpus), cpu_quota())


class _Settled(NamedTuple):
    processes: int
    choice: Choice | None
    threads: int


_settled: _Settled | None = None  # what was decided for this process, and among how many


def settle_threads(together: bool) -> Choice | None:
    """Give this process its share of the cores; None: the user has said how many threads it has.

    Said is a number in `OMP_NUM_THREADS` or `MKL_NUM_THREADS` that is not torchrun's own, or one that torch was given by
    `torch.set_num_threads`, as far as it differs from torch's default.

    Args:
        together: this process trains with others, which all call this.
    """
    global _settled
    processes = dist.num_processes() if together else 1
    if _settled is None or _settled.processes != processes:
        here = Place.here()
        everyone = dist.gather_objects(here) if together else [here] * environment().local_world_size
        # The number of before is the user's, unless it is what was decided here, among other processes.
        is_ours = _settled is not None and _settled.threads == torch.get_num_threads()
        choice = None
        if is_ours or not _is_said(here):
            choice = _settle(here, everyone)
        _settled = _Settled(processes, choice, torch.get_num_threads())
    if _settled.threads != torch.get_num_threads():  # the user has said it since
        return None
    return _settled.choice


def _is_said(here: Place) -> bool:
    """Whether the user has said how many threads this process has."""
    told = environment()
    if told.threads is not None:
        return True
    defaults = {str(len(here.cpus)), str(here.cores)}  # of OpenMP, of MKL
    if told.launchers_threads is not None:
        defaults = {told.launchers_threads}
    return str(torch.get_num_threads()) not in defaults


def _settle(here: Place, everyone: Sequence[Place]) -> Choice:
    before, threads = torch.get_num_threads(), share_of(here, everyone)
    if threads != before:
        torch.set_num_threads(threads)
    neighbours = sum(place.machine == here.machine for place in everyone)
    if neighbours > 1:  # for libraries that would decide it themselves, such as accelerate
        set_default(KEY, str(threads))
    return Choice("threads", str(threads), _reason(here, neighbours), f"{KEY}=N")


def share_of(here: Place, everyone: Sequence[Place]) -> int:
    """Threads for the process at `here`, at least 1, where `everyone` are the places of all processes, it included.

    A CPU that several may run on is shared by them, and so is a quota: whoever binds each process to CPUs of its own, as
    SLURM does, has divided them already.
    """
    neighbours = [place for place in everyone if place.machine == here.machine]
    users = Counter[int]()
    for place in neighbours:
        users.update(place.cpus)
    cpus = sum(1 / users[cpu] for cpu in here.cpus)
    cores = cpus * here.cores / len(here.cpus)
    if here.quota is not None:
        cores = min(cores, round(here.quota) / len(neighbours))
    return max(1, int(cores + 1e-6))  # sums of thirds end a little below


def _reason(here: Place, neighbours: int) -> str:
    cores = counted(here.cores, "core")
    if here.quota is not None and here.quota < here.cores:
        cores = f"{here.quota:g} of {cores} that its container is given"
    if neighbours == 1:
        return f"{cores} for this process"
    return f"{cores} for {neighbours} processes on this machine"
