"""Threads of a process: its share of the cores, unless the user has said."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from llm_trainer.config.env import environment
from llm_trainer.engine import threads
from llm_trainer.engine.threads import Place, settle_threads, share_of

ALL = frozenset(range(16))
BOX = Place("box", ALL, 16, None)
OTHER_BOX = BOX._replace(machine="other")
SMT = BOX._replace(cores=8)  # 16 hyperthreads
FIRST = BOX._replace(cpus=frozenset(range(4)), cores=4)
SECOND = BOX._replace(cpus=frozenset(range(4, 8)), cores=4)


@pytest.mark.parametrize(
    ("here", "everyone", "expected"),
    [
        (BOX, [BOX], 16),
        (BOX, [BOX] * 4, 4),
        (BOX, [BOX] * 3, 5),
        (BOX, [BOX] * 40, 1),
        (BOX, [BOX, BOX, OTHER_BOX, OTHER_BOX], 8),  # two machines
        (SMT, [SMT] * 4, 2),
        (FIRST, [FIRST, SECOND], 4),  # each was bound to cores of its own
        (FIRST, [FIRST, FIRST, SECOND], 2),
        (BOX._replace(quota=2.0), [BOX._replace(quota=2.0)], 2),
        (BOX._replace(quota=6.0), [BOX._replace(quota=6.0)] * 3, 2),
        (BOX._replace(quota=0.5), [BOX._replace(quota=0.5)], 1),
        (BOX._replace(quota=100.0), [BOX._replace(quota=100.0)] * 2, 8),
    ],
)
def test_the_share_of_a_process(here: Place, everyone: list[Place], expected: int) -> None:
    assert share_of(here, everyone) == expected


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A process with 16 cores that nobody has told anything."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_settled", None)
    monkeypatch.setattr(Place, "here", classmethod(lambda cls: BOX))
    torch.set_num_threads(16)
    yield monkeypatch
    torch.set_num_threads(before)


def test_one_process_has_all_cores(box: pytest.MonkeyPatch) -> None:
    choice = settle_threads(together=False)
    assert choice is not None and torch.get_num_threads() == 16
    assert (choice.value, choice.why, choice.key) == ("16", "16 cores for this process", "OMP_NUM_THREADS=N")
    assert "OMP_NUM_THREADS" not in os.environ  # a process that is started later decides for itself


def test_a_container_is_not_the_machine(box: pytest.MonkeyPatch) -> None:
    box.setattr(Place, "here", classmethod(lambda cls: BOX._replace(quota=2.0)))
    choice = settle_threads(together=False)
    assert choice is not None and torch.get_num_threads() == 2
    assert choice.why == "2 of 16 cores that its container is given for this process"


def test_processes_that_train_apart_share_their_machine_too(box: pytest.MonkeyPatch) -> None:
    box.setenv("LOCAL_WORLD_SIZE", "4")
    assert settle_threads(together=False) is not None and torch.get_num_threads() == 4
    assert os.environ["OMP_NUM_THREADS"] == "4"  # for libraries that would decide it otherwise
    box.setenv("LOCAL_WORLD_SIZE", "1")
    again = settle_threads(together=False)
    assert again is not None and again.value == "4"  # decided once per process


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_what_the_user_says_stays(box: pytest.MonkeyPatch, variable: str) -> None:
    box.setenv(variable, "16")
    box.setenv("LOCAL_WORLD_SIZE", "4")
    assert settle_threads(together=False) is None and torch.get_num_threads() == 16


def test_what_torch_was_told_stays(box: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(3)
    assert settle_threads(together=False) is None and torch.get_num_threads() == 3


def test_what_torch_is_told_later_stays(box: pytest.MonkeyPatch) -> None:
    assert settle_threads(together=False) is not None
    torch.set_num_threads(3)
    assert settle_threads(together=False) is None and torch.get_num_threads() == 3


def test_the_one_thread_of_torchrun_is_raised(box: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    box.setenv("LOCAL_WORLD_SIZE", "4")
    told = environment()
    box.setattr(threads, "environment", lambda: type(told)(**{**vars(told), "launchers_threads": "1"}))
    choice = settle_threads(together=False)
    assert choice is not None and torch.get_num_threads() == 4
    assert choice.why == "16 cores for 4 processes on this machine"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads what Linux keeps of a process's start")
def test_torchruns_own_number_is_told_from_the_users() -> None:
    """A launcher sets the variable in itself and hands it down; the user's was there when the launcher began."""
    worker = "from llm_trainer.config.env import environment as e; print(e().threads, e().launchers_threads)"
    launcher = (
        "import os, subprocess, sys; os.environ.setdefault('OMP_NUM_THREADS', '1'); "
        f"subprocess.run([sys.executable, '-c', {worker!r}], check=True)"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}

    def seen(more: dict[str, str]) -> str:
        command = [sys.executable, "-c", launcher]
        done = subprocess.run(command, env=clean | more, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    torchrun = {"TORCHELASTIC_RUN_ID": "none"}
    assert seen(torchrun) == "None 1"
    assert seen(torchrun | {"OMP_NUM_THREADS": "1"}) == "1 None"
    assert seen({}) == "1 None"  # another launcher means what it sets
