"""What reward functions do wrong: each call ends within its limit plus a second, the run goes on, the count is right."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_trainer.rewards.functions import RewardFunctions, Rewards

LIMIT = 0.5
PATIENCE = 5.0  # where others use both cores; alone a second is enough (docs/results.md)
ROWS = 4


def raises(p: Any, c: Any, a: Any) -> Any:
    raise KeyError("level")


def sleeps(p: Any, c: Any, a: Any) -> Any:
    while True:
        time.sleep(1)


def ignores_sigterm(p: Any, c: Any, a: Any) -> Any:
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1)


def computes(p: Any, c: Any, a: Any) -> Any:
    while True:
        pass


def allocates(p: Any, c: Any, a: Any) -> Any:
    held = []
    while True:
        held.append(bytearray(1 << 24))


def allocates_in_children(p: Any, c: Any, a: Any) -> Any:
    """Each of them within the limit of a process."""
    for _ in range(8):
        if os.fork() == 0:
            held = bytearray(os.urandom(1 << 20) * 100)
            time.sleep(60)
            del held
    time.sleep(60)


def forks(p: Any, c: Any, a: Any) -> Any:
    while True:
        os.fork()


def forks_away(p: Any, c: Any, a: Any) -> Any:
    """Children that leave the group, and outlive what started them."""
    while True:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(60)
            os._exit(0)
        time.sleep(0.001)


def exits(p: Any, c: Any, a: Any) -> Any:
    sys.exit(3)


def ends_its_process(p: Any, c: Any, a: Any) -> Any:
    os._exit(3)


def crashes(p: Any, c: Any, a: Any) -> Any:
    os.environ["PYTHONFAULTHANDLER"] = ""
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    ctypes.string_at(0)


def kills_its_group(p: Any, c: Any, a: Any) -> Any:
    os.killpg(0, signal.SIGKILL)


printed: list[int] = []  # of calls, in the process of the function


def prints(p: Any, c: Any, a: Any) -> Any:
    """A gigabyte in the first call."""
    line = "x" * (1 << 20)
    for _ in range(20 if printed else 1000):
        print(line)
    printed.append(1)
    return [1.0] * ROWS


def prints_for_ever(p: Any, c: Any, a: Any) -> Any:
    while True:
        print("x" * 10_000)


def closes_everything(p: Any, c: Any, a: Any) -> Any:
    os.closerange(0, 1000)
    return [1.0] * ROWS


def raises_at_length(p: Any, c: Any, a: Any) -> Any:
    raise ValueError("x" * (1 << 24))


def recurses(p: Any, c: Any, a: Any) -> Any:
    return recurses(p, c, a)


def wrong_count(p: Any, c: Any, a: Any) -> Any:
    return [1.0] * (ROWS + 1)


def strings(p: Any, c: Any, a: Any) -> Any:
    return ["1.0"] * ROWS


def not_a_number(p: Any, c: Any, a: Any) -> Any:
    return [float("nan")] * ROWS


def good(p: Any, c: Any, a: Any) -> Any:
    return [1.0] * ROWS


# function: the cause that is counted, a part of the message, and whether it is ended by its limit of time
BAD: dict[Callable[..., Any], tuple[str, str, bool]] = {
    raises: ("raised", "raised KeyError: 'level' (test_rewards.py, line ", False),
    sleeps: ("time", "did not return within 0.5 s", True),
    ignores_sigterm: ("time", "did not return within 0.5 s", True),
    computes: ("time", "did not return within 0.5 s", True),
    allocates: ("memory", "memory", False),
    allocates_in_children: ("memory", "GB of memory, more than 0.3 GB", False),
    forks: ("processes", "processes, more than", False),
    forks_away: ("processes", "processes, more than", False),
    exits: ("exited", "called exit (3)", False),
    ends_its_process: ("exited", "ended its process (exit code 3)", False),
    crashes: ("exited", "ended its process (SIGSEGV)", False),
    kills_its_group: ("exited", "ended its process (SIGKILL)", False),
    prints_for_ever: ("time", "did not return within 0.5 s", True),
    closes_everything: ("exited", "ended its process (exit code 1)", False),
    raises_at_length: ("raised", "raised ValueError: xxx", False),
    recurses: ("raised", "raised RecursionError", False),
    wrong_count: ("count", "returned 5 rewards for 4 completions", False),
    strings: ("type", "returned a str: '1.0'", False),
    not_a_number: ("not_finite", "returned nan", False),
}
GOOD = (good, prints)


class Limited:
    """A function whose calls may take `seconds`."""

    def __init__(self, function: Callable[..., Any], seconds: float) -> None:
        self.function, self.seconds, self.__name__ = function, seconds, function.__name__

    def __call__(self, prompts: Any, completions: Any, answers: Any) -> Any:
        return self.function(prompts, completions, answers)

    def seconds_for(self, count: int) -> float:
        return self.seconds


def judge(functions: RewardFunctions) -> Rewards:
    return functions(["p"] * ROWS, ["c"] * ROWS, [None] * ROWS)


@pytest.fixture(scope="module")
def outcome() -> Iterator[tuple[list[Rewards], list[str]]]:
    """Two calls of all functions together, and what was printed."""
    said: list[str] = []
    several = [Limited(function, LIMIT) for function in BAD if BAD[function][2]]
    several += [Limited(function, 30.0) for function in [*GOOD, *BAD] if function in GOOD or not BAD[function][2]]
    functions = RewardFunctions(several, memory_gb=0.3, max_failed=1.0, say=said.append)
    both = [judge(functions), judge(functions)]
    functions.close()
    yield both, said


@pytest.mark.parametrize("call", [0, 1])
def test_the_run_goes_on_and_the_count_is_right(call: int, outcome: tuple[list[Rewards], list[str]]) -> None:
    rewards = outcome[0][call]
    by_name = dict(zip(rewards.names, rewards.values.T, strict=True))
    for function in GOOD:
        assert by_name[function.__name__].tolist() == [1.0] * ROWS
    expected: dict[str, int] = {}
    for function, (cause, message, _) in BAD.items():
        assert np.isnan(by_name[function.__name__]).all(), function.__name__
        assert message in rewards.errors[0][function.__name__]
        expected[cause] = expected.get(cause, 0) + ROWS
    assert rewards.causes == expected


def test_what_is_printed_is_cut(outcome: tuple[list[Rewards], list[str]]) -> None:
    assert any(
        "reward function 'prints' printed: xxx" in text and "more bytes were left out" in text for text in outcome[1]
    )
    assert max(map(len, outcome[1])) < 3000


@pytest.mark.parametrize("function", [ignores_sigterm, computes, prints_for_ever, forks, forks_away])
def test_a_call_ends_soon_after_its_limit(function: Callable[..., Any]) -> None:
    functions = RewardFunctions(function, seconds=LIMIT, max_failed=1.0, say=lambda text: None)
    began = time.monotonic()
    assert sum(judge(functions).causes.values()) == ROWS
    assert time.monotonic() - began < LIMIT + PATIENCE
    functions.close()


LIVES = """
import os, sys, time, threading
from llm_trainer.rewards.functions import RewardFunctions

def leaves_children(p, c, a):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(100)
        os._exit(0)
    return [1.0]

def hangs(p, c, a):
    time.sleep(100)

functions = RewardFunctions([leaves_children])
functions(["p"], ["c"], [None])
how = sys.argv[1]
print("ready", flush=True)
if how == "ends":
    sys.exit(0)
if how == "fails":
    raise RuntimeError
RewardFunctions([hangs], seconds=100)(["p"], ["c"], [None])
"""


@pytest.mark.parametrize("how", ["ends", "fails", "kill"])
def test_nothing_is_left_when_the_trainer_ends(how: str) -> None:
    """By itself, by an error, and when it is killed in the middle of a call."""
    command = [sys.executable, "-c", LIVES, how]
    mark = LIVES.encode()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == b"ready\n"
        if how == "kill":
            time.sleep(0.5)
            assert len(_with_command(mark)) >= 5  # trainer, two keepers, two workers
            trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + 5
    while _with_command(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _with_command(mark) == []


def test_signals_to_all_processes_are_the_trainers() -> None:
    """A scheduler sends SIGTERM to every process of a job: the functions go on until the trainer has finished its step."""
    functions = RewardFunctions(lambda p, c, a: [float(os.getpid())] * ROWS, max_failed=1.0)
    worker = int(judge(functions).values[0, 0])
    keeper = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    for pid in (worker, keeper):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(pid, number)
    assert judge(functions).values[0, 0] == worker
    functions.close()


def test_a_keeper_that_is_killed_is_made_again() -> None:
    functions = RewardFunctions(lambda p, c, a: [float(os.getppid())] * ROWS, max_failed=1.0)
    keeper = int(judge(functions).values[0, 0])
    os.kill(keeper, signal.SIGKILL)
    missing = judge(functions)
    there = judge(functions)
    assert missing.causes in ({"exited": ROWS}, {})  # it was begun before, or after, its end was noticed
    assert there.values[0, 0] != keeper and there.causes == {}
    functions.close()


def test_children_of_a_function_get_their_signals() -> None:
    def ends_a_child(p: Any, c: Any, a: Any) -> Any:
        child = subprocess.Popen(["sleep", "60"])
        child.terminate()
        return [float(child.wait(5))] * ROWS

    def ends_a_fork(p: Any, c: Any, a: Any) -> Any:
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)
        return [float(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))] * ROWS

    functions = RewardFunctions([ends_a_child, ends_a_fork])
    assert judge(functions).values.tolist() == [[-15.0, -15.0]] * ROWS
    functions.close()


def _with_command(mark: bytes) -> list[int]:
    """Processes whose command line holds `mark`, but for zombies that somebody else has to take note of."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if mark in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found
