"""How many CPU cores this process may use: those of the machine that it may run on, as far as its container is given time."""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
CGROUPS = Path("/sys/fs/cgroup")


def usable_cores() -> int:
    """Cores that threads of this process can keep busy, at least 1.

    `os.cpu_count()` is the whole machine: a container with 2 of its 64 cores would start 64 threads.
    """
    cores = physical_cores(allowed_cpus())
    quota = cpu_quota()
    if quota is not None:
        cores = min(cores, round(quota))
    return max(1, cores)


def allowed_cpus() -> frozenset[int]:
    """Numbers of the CPUs that this process may run on, hyperthreads included."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


@lru_cache
def physical_cores(cpus: frozenset[int]) -> int:
    """Cores among `cpus`: two hyperthreads of one core share the units that matrix products keep busy."""
    cores = set()
    for cpu in cpus:
        try:
            siblings = (CPUS / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:  # not Linux, or hidden
            siblings = str(cpu)
        cores.add(siblings)
    return len(cores)


def cpu_quota(cgroups: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that the control group of this process may use, the least of all its parents; None: no limit.

    Version 2 says it in `cpu.max`, version 1 in `cpu.cfs_quota_us` and `cpu.cfs_period_us`
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html).
    """
    quotas = []
    for folder, _ in control_groups("cpu", cgroups, own):
        try:
            if (folder / "cpu.max").exists():
                allowed, period = (folder / "cpu.max").read_text().split()
            else:
                allowed = (folder / "cpu.cfs_quota_us").read_text().strip()
                period = (folder / "cpu.cfs_period_us").read_text()
        except (OSError, ValueError):
            continue
        if allowed not in ("max", "-1"):
            quotas.append(int(allowed) / int(period))
    return min(quotas, default=None)


def control_groups(controller: str, cgroups: Path, own: Path) -> Iterator[tuple[Path, int]]:
    """The folders of this process's groups for `controller`, each with its parents up to the root, and their version.

    Args:
        controller: `cpu` or `memory`.
        cgroups: where the groups are mounted.
        own: what says which they are, `/proc/self/cgroup`.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, roots = 2, [cgroups, cgroups / "unified"]
        elif controller in controllers.split(","):
            version, roots = 1, [cgroups / controllers, cgroups / controller]
        else:
            continue
        for root in dict.fromkeys(roots):
            folder = root / path.lstrip("/")
            # In a container the path may be that of the host, where only the root is mounted.
            for parent in (folder, *folder.parents):
                if parent.is_relative_to(root):
                    yield parent, version
