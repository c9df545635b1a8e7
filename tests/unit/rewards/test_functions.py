"""Reward functions: what they are given, and what becomes of what they return."""

import asyncio
import math
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards.calling import Judged, arguments, call_function
from llm_trainer.rewards.functions import RewardError, RewardFunctions
from llm_trainer.rewards.returned import Missing, read_returned
from llm_trainer.rewards.workers import Interrupted

PROMPTS, COMPLETIONS, ANSWERS = ["p", "q", "r"], ["a", "bb", "ccc"], ["1", None, "3"]
COLUMNS = {"level": [1, 2, 3], "source": ["x", "y", "z"]}
JUDGED = Judged(PROMPTS, COMPLETIONS, ANSWERS, COLUMNS, lengths=[10, 20, 30])


def takes_by_name(completions: list[str], level: list[int]) -> list[float]:
    return [len(text) * number for text, number in zip(completions, level, strict=True)]


def takes_all(completions: list[str], **columns: Any) -> list[float]:
    return [len(columns)] * len(completions)


def takes_keyword(p: list[str], c: list[str], a: list[str], *, level: list[int], scale: float = 2.0) -> list[float]:
    return [scale * number for number in level]


async def waits(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [len(text) for text in completions]


GOOD = {
    "contract": (lambda prompts, completions, answers: [len(text) for text in completions], [1, 2, 3]),
    "other names": (lambda p, c, a: [float(answer or 0) for answer in a], [1, 0, 3]),
    "by position": (lambda *three: [len(three)] * 3, [3, 3, 3]),
    "columns by name": (takes_by_name, [1, 4, 9]),
    "all columns": (takes_all, [4, 4, 4]),  # prompts, answers, level, source
    "a keyword": (takes_keyword, [2, 4, 6]),
    "async": (waits, [1, 2, 3]),
    "None": (lambda p, c, a: [1, None, 3], [1, math.nan, 3]),
    "bool": (lambda p, c, a: (True, False, True), [1, 0, 1]),
    "array": (lambda p, c, a: np.array([1, 2, 3], dtype=np.float32), [1, 2, 3]),
    "numpy scalars": (lambda p, c, a: [np.float32(1), np.int64(2), 3], [1, 2, 3]),
    "lengths": (lambda completions, lengths: lengths, [10, 20, 30]),
    "per token": (lambda p, c, a: [[0.1] * 10, [0.5] * 20, None], [1, 10, math.nan]),
}


@pytest.mark.parametrize("name", GOOD)
def test_values(name: str) -> None:
    function, expected = GOOD[name]
    returned = call_function(name, function, JUDGED)
    np.testing.assert_array_equal(returned.values, expected)
    assert returned.errors == {}


BAD = {
    "count": (lambda: [1.0], "count", "returned 1 rewards for 3 completions (a list: [1.0])", 3),
    "None": (lambda: None, "type", "returned None, expected a list of 3 numbers", 3),
    "a number": (lambda: 1.0, "type", "returned a float: 1.0, expected a list of 3 numbers", 3),
    "a generator": (lambda: (1.0 for _ in range(3)), "type", "returned a generator: ", 3),
    "a string": (lambda: "good", "type", "returned a str: 'good', expected a list of 3 numbers", 3),
    "strings": (lambda: [1.0, "good", 2.0], "type", "returned a str: 'good' for a completion, expected a number", 1),
    "NaN": (lambda: [1.0, math.nan, 2.0], "not_finite", "returned nan for a completion, expected a finite number", 1),
    "infinity": (lambda: [1.0, -math.inf, 2.0], "not_finite", "returned -inf for a completion", 1),
    "too large": (lambda: [1.0, 10**400, 2.0], "type", "for a completion, expected a number", 1),
    "NaN per token": (
        lambda: [[1.0] * 10, [math.nan] * 20, [2.0] * 30],
        "not_finite",
        "returned nan for a completion",
        1,
    ),
    "raises": (lambda: 1 / 0, "raised", "raised ZeroDivisionError: division by zero (test_functions.py, line ", 3),
    "exits": (lambda: exit(3), "exited", "called exit (3)", 3),
    "missing": (lambda: [1.0, Missing("could not be asked"), 2.0], "unavailable", "could not be asked", 1),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_a_number_is_missing_and_says_why(name: str) -> None:
    function, cause, message, count = BAD[name]
    returned = call_function("mine", lambda p, c, a: function(), JUDGED)
    assert len(returned.errors) == count == sum(map(math.isnan, returned.values))
    assert returned.errors[1][0] == cause
    assert returned.errors[1][1].startswith("reward function 'mine'") and message in returned.errors[1][1]


def test_a_list_per_token_has_the_length_of_the_completion() -> None:
    returned = read_returned("mine", [[1.0, 2.0], [1.0]], 2, lengths=[2, 3])
    assert returned.tokens == {0: [1.0, 2.0]} and returned.values[0] == 3.0
    cause, message = returned.errors[1]
    assert (
        cause == "count" and "'mine' returned 1 numbers for a completion of 3 tokens, expected one for each" in message
    )


def test_messages_are_short() -> None:
    def fails(p: Any, c: Any, a: Any) -> Any:
        raise ValueError("x" * 10_000_000)

    message = call_function("mine", fails, JUDGED).errors[0][1]
    assert len(message) < 1000 and message.endswith("characters)")


@pytest.mark.parametrize(
    "function", [lambda x: [1.0], lambda completions, difficulty: [1.0], lambda p, c, a, difficulty: [1.0]]
)
def test_a_column_that_is_not_there_is_the_users_mistake(function: Any) -> None:
    with pytest.raises(ConfigError, match=r"'mine' takes (x|difficulty), which .* columns of the data: level, source"):
        arguments("mine", function, JUDGED)


# With processes.


def pid_of(p: Any, completions: list[str], a: Any) -> list[float]:
    return [os.getpid()] * len(completions)


@pytest.fixture(scope="module")
def functions() -> Iterator[RewardFunctions]:
    factor = 2
    calls: list[int] = []

    def counts(p: Any, c: list[str], a: Any) -> list[int]:
        calls.append(1)
        print("hello from the function")
        return [len(calls)] * len(c)

    def cannot_be_pickled(p: Any, c: list[str], a: Any) -> Any:
        return (number for number in c)

    several = {
        "closure": lambda p, c, a: [factor * len(text) for text in c],
        "pid": pid_of,
        "here": pid_of,
        "counts": counts,
        "per_token": lambda completions: [[1.0] * len(text) for text in completions],
        "generator": cannot_be_pickled,
        "async": waits,
    }
    made = RewardFunctions(several, weights={"closure": 0.5}, in_process=["here"], max_failed=1.0, say=said.append)
    yield made
    made.close()


said: list[str] = []


def test_functions_run_in_processes_that_stay(functions: RewardFunctions) -> None:
    first = functions(PROMPTS, COMPLETIONS, ANSWERS, COLUMNS)
    second = functions(PROMPTS, COMPLETIONS, ANSWERS, COLUMNS)
    by_name = dict(zip(functions.names, second.values.T.tolist(), strict=True))
    assert by_name["closure"] == [2, 4, 6]
    assert by_name["here"][0] == os.getpid() != by_name["pid"][0]
    assert by_name["pid"] == first.values.T[functions.names.index("pid")].tolist()
    assert by_name["counts"] == [2, 2, 2]  # its closure lives on between calls
    assert by_name["async"] == [1, 2, 3]
    assert [numbers.tolist() for numbers in second.tokens["per_token"] if numbers is not None] == [
        [1],
        [1, 1],
        [1, 1, 1],
    ]
    assert second.causes == {"type": 3} and list(second.errors[0]) == ["generator"]
    assert functions.weights[0] == 0.5 and functions.weights[1] == 1.0
    assert "reward function 'counts' printed: hello from the function" in said


def test_no_completions(functions: RewardFunctions) -> None:
    assert functions([], [], [], {}).values.shape == (0, 7)


def test_a_large_batch(functions: RewardFunctions) -> None:
    """More than any pipe holds, in both directions."""
    count, text = 200, "x" * 5000
    rewards = functions([text] * count, [text] * count, [None] * count)
    assert rewards.values[:, 0].tolist() == [10_000.0] * count
    assert sum(len(numbers) for numbers in rewards.tokens["per_token"] if numbers is not None) == count * 5000


def test_asked_to_stop() -> None:
    functions = RewardFunctions(lambda p, c, a: time.sleep(60))
    began = time.monotonic()
    with pytest.raises(Interrupted):
        functions(["p"], ["c"], [None], stop=lambda: time.monotonic() > began + 0.3)
    assert time.monotonic() - began < 5
    functions.close()


def test_too_many_failures_stop_the_run() -> None:
    functions = RewardFunctions(lambda p, c, a: [None, "bad", 1.0, 1.0], in_process=True, max_failed=0.2)
    for _ in range(7):
        functions(["p"] * 4, ["c"] * 4, [None] * 4)  # 7 failures are too few to judge by
    with pytest.raises(
        RewardError, match=r"8 of the last 32 rewards of 'reward' are missing.* 8 x type: .* a str: 'bad'"
    ):
        functions(["p"] * 4, ["c"] * 4, [None] * 4)


def test_failures_long_ago_do_not_stop_the_run() -> None:
    fails = [True] * 3 + [False] * 50
    functions = RewardFunctions(lambda p, c, a: ["bad" if fails.pop(0) else 1.0] * 4, in_process=True, max_failed=0.9)
    functions.max_failed = 1.0
    for _ in range(40):
        functions(["p"] * 4, ["c"] * 4, [None] * 4)
    functions.max_failed = 0.1
    functions(["p"] * 4, ["c"] * 4, [None] * 4)


def test_what_runs_is_said() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    functions = RewardFunctions(lambda p, c, a: [1.0])
    done.set()
    thread.join()
    assert "were forked while" in functions.notes[0] and "Python threads" in functions.notes[0]
    assert functions(["p"], ["c"], [None]).values.tolist() == [[1.0]]
    functions.close()


def test_where_no_process_can_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    functions = RewardFunctions(pid_of)
    assert functions(["p"], ["c"], [None]).values.tolist() == [[os.getpid()]]
    assert functions.notes == [
        "reward functions pid_of run in the process that trains, without limits of time and memory: on darwin a process with "
        "threads cannot be forked"
    ]


@pytest.mark.parametrize(
    ("functions", "options", "message"),
    [
        ([], {}, "got no reward function"),
        ([pid_of, 3], {}, "got a int, expected a function"),
        ([pid_of], {"weights": [1.0, 2.0]}, r"got 2 reward weights for 1 functions \(pid_of\)"),
        ([pid_of], {"weights": {"other": 1.0}}, "got other, expected names of functions: pid_of"),
        ([pid_of], {"in_process": ["other"]}, "in_process: got other, expected names of reward functions: pid_of"),
    ],
)
def test_what_does_not_fit_is_said(functions: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardFunctions(functions, **options)


def test_names_differ() -> None:
    functions = RewardFunctions([pid_of, pid_of, lambda p, c, a: [1.0]], in_process=True)
    assert functions.names == ("pid_of", "pid_of_2", "reward")
