"""The cores of this process: neither those of the machine that it may not use, nor those that its container is not given."""

import os
from pathlib import Path

import pytest

from llm_trainer import cores


def groups(folder: Path, files: dict[str, str], own: str) -> float | None:
    """The quota where the control groups under `folder` hold these files, and this process is in the group `own`."""
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "own").write_text(own)
    return cores.cpu_quota(folder / "cgroup", folder / "own")


V1 = "4:cpu,cpuacct:/docker/abc\n2:cpuset:/docker/abc\n0::/\n"


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({"cpu.max": "200000 100000\n"}, "0::/\n", 2.0),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"pod/cpu.max": "50000 100000\n", "pod/a/cpu.max": "max 100000\n"}, "0::/pod/a\n", 0.5),
        ({"pod/cpu.max": "400000 100000\n", "pod/a/cpu.max": "150000 100000\n"}, "0::/pod/a\n", 1.5),
        # Mounted without the host's path, as in a container.
        ({"cpu,cpuacct/cpu.cfs_quota_us": "300000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, V1, 3.0),
        ({"cpu/docker/abc/cpu.cfs_quota_us": "-1\n", "cpu/docker/abc/cpu.cfs_period_us": "100000\n"}, V1, None),
        ({"unified/cpu.max": "800000 100000\n"}, "1:name=systemd:/\n0::/\n", 8.0),
        ({"cpu.max": "nonsense\n"}, "0::/\n", None),
        ({}, "0::/gone\n", None),
    ],
)
def test_the_quota_of_a_container(tmp_path: Path, files: dict[str, str], own: str, quota: float | None) -> None:
    assert groups(tmp_path, files, own) == quota


def test_a_machine_without_control_groups(tmp_path: Path) -> None:
    assert cores.cpu_quota(tmp_path, tmp_path / "missing") is None


def test_two_hyperthreads_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "CPUS", tmp_path)
    for cpu in range(4):
        file = tmp_path / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        file.parent.mkdir(parents=True)
        file.write_text(f"{cpu % 2},{cpu % 2 + 2}\n")
    cores.physical_cores.cache_clear()
    assert cores.physical_cores(frozenset(range(4))) == 2
    assert cores.physical_cores(frozenset({0, 1})) == 2
    assert cores.physical_cores(frozenset({7})) == 1  # of which the system says nothing
    cores.physical_cores.cache_clear()


def test_a_container_with_two_cores_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    monkeypatch.setattr(cores, "physical_cores", lambda cpus: len(cpus) // 2)
    monkeypatch.setattr(cores, "cpu_quota", lambda: None)
    assert cores.usable_cores() == 32
    monkeypatch.setattr(cores, "cpu_quota", lambda: 2.0)
    assert cores.usable_cores() == 2
    monkeypatch.setattr(cores, "cpu_quota", lambda: 0.2)
    assert cores.usable_cores() == 1
