"""How much memory a process may still take, under every kind of limit."""

import resource
from pathlib import Path

import pytest
import torch

from llm_trainer.engine import room

GB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 64 GB with 48 GB available, and a process that has mapped 3 GB, 2 of them data."""
    monkeypatch.setattr(room, "ROOT", tmp_path)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    write(tmp_path, "proc/meminfo", f"MemTotal: {64 * GB // 1024} kB\nMemAvailable: {48 * GB // 1024} kB\n")
    write(tmp_path, "proc/self/status", f"Name: python\nVmSize: {3 * GB // 1024} kB\nVmData: {2 * GB // 1024} kB\n")
    return tmp_path


def write(root: Path, name: str, text: object) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def found() -> tuple[float, float, str]:
    free, total, limit = room.room_on(torch.device("cpu"))
    return free / GB, total / GB, limit


def test_without_limits_it_is_what_the_machine_has_free(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found() == (48, 64, "free memory")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert found() == (12, 16, "free memory") and room.free_memory() == 48 * GB  # of all four


@pytest.mark.parametrize("path", ["/", "/pods/one"])
def test_containers_of_version_2(machine: Path, path: str) -> None:
    """A limit of a group around this one holds as well; a path of the host is not to be seen from inside."""
    write(machine, "proc/self/cgroup", f"0::{path}")
    write(machine, "sys/fs/cgroup/memory.max", 16 * GB)
    write(machine, "sys/fs/cgroup/memory.current", 10 * GB)
    write(machine, "sys/fs/cgroup/memory.stat", f"anon 1\ninactive_file {4 * GB}")
    assert found() == (10, 16, "the container's limit")
    write(machine, "sys/fs/cgroup/memory.max", "max")
    assert found() == (48, 64, "free memory")


def test_containers_of_version_1(machine: Path) -> None:
    write(machine, "proc/self/cgroup", "5:cpu,cpuacct:/\n4:memory:/pods/one\n0::/")
    write(machine, "sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    write(machine, "sys/fs/cgroup/memory/memory.usage_in_bytes", 20 * GB)
    write(machine, "sys/fs/cgroup/memory/pods/one/memory.limit_in_bytes", 8 * GB)
    write(machine, "sys/fs/cgroup/memory/pods/one/memory.usage_in_bytes", 3 * GB)
    assert found() == (5, 8, "the container's limit") and room.free_memory() == 5 * GB


@pytest.mark.parametrize(("kind", "free"), [(resource.RLIMIT_AS, 4), (resource.RLIMIT_DATA, 5)])
def test_limits_of_the_process(machine: Path, monkeypatch: pytest.MonkeyPatch, kind: int, free: int) -> None:
    limits = {kind: (7 * GB, resource.RLIM_INFINITY)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, (resource.RLIM_INFINITY,) * 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # a limit of each process is not shared
    assert found()[:2] == (free, 7) and "ulimit" in found()[2]


def test_this_machine() -> None:
    """The numbers can be read here, and the peak of the resident memory is that since it was forgotten."""
    free, total, _ = room.room_on(torch.device("cpu"))
    assert 0 < free <= total
    if not room.forget_resident_peak():
        pytest.skip("this kernel does not forget the peak")
    before = room.resident_peak()
    some = torch.ones(16 << 20)
    grown = room.resident_peak()
    assert before is not None and grown is not None and grown - before >= 0.9 * some.nbytes
    del some
    room.forget_resident_peak()
    assert room.resident_peak() < grown
