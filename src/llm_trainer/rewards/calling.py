"""How a reward function is called: with what its signature takes, awaited where it is async, and never past an exception."""

import asyncio
import inspect
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, NamedTuple

from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards.returned import Missing, Returned, nothing, read_returned

GIVEN = ("prompts", "completions", "answers")
LENGTHS = "lengths"  # tokens of each completion, for functions that take them
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Judged(NamedTuple):
    """What reward functions are asked about: `n` completions.

    Attributes:
        prompts: As text.
        completions: As text.
        answers: The reference answer of each, or None.
        columns: What else the data says of each prompt: a list of n by name.
        lengths: Tokens of each completion; None: not known.
    """

    prompts: Sequence[str]
    completions: Sequence[str]
    answers: Sequence[str | None]
    columns: Mapping[str, Sequence[Any]]
    lengths: Sequence[int] | None = None


def arguments(name: str, function: Callable[..., Any], judged: Judged) -> tuple[list[Any], dict[str, Any]]:
    """What the function is called with: positional arguments and keywords.

    Parameters that are called prompts, completions, answers, or as a column of the data, get those; columns that the function
    does not take are left out. A function with other names gets the three by position.

    Raises:
        ConfigError: it takes something that is not there.
    """
    first = [judged.prompts, judged.completions, judged.answers]
    columns = dict(judged.columns)
    if judged.lengths is not None:
        columns.setdefault(LENGTHS, judged.lengths)
    known = {**columns, **dict(zip(GIVEN, first, strict=True))}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # written in C
        return first, {}
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = [parameter for parameter in parameters if parameter.kind in _NAMED]
    required = [parameter.name for parameter in named if parameter.default is parameter.empty]
    has_nameless = any(
        parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL) for parameter in parameters
    )

    # 1. by name
    if not has_nameless and all(parameter in known for parameter in required):
        wanted = {*GIVEN, *judged.columns}
        if not takes_all:
            wanted = {parameter.name for parameter in named}
        return [], {key: value for key, value in known.items() if key in wanted}

    # 2. the three by position, columns by name
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = [parameter for parameter in named if parameter not in by_position[:3]]
    missing = [p.name for p in rest if p.default is p.empty and p.name not in columns]
    takes_three = len(by_position) >= 3 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if missing or not takes_three:
        missing = missing or [p for p in required if p not in known] or ["too few arguments"]
        there = ", ".join(judged.columns) or "none"
        raise ConfigError(
            f"reward function {name!r} takes {', '.join(missing)}, which the data does not have; expected the signature "
            f"f(prompts, completions, answers, **columns); columns of the data: {there}"
        )
    wanted = {parameter.name for parameter in rest}
    if takes_all:
        wanted = set(judged.columns)
    return first, {key: value for key, value in columns.items() if key in wanted}


def answer_call(name: str, function: Callable[..., Any], judged: Judged) -> dict[str, Any]:
    """`call_function` as a process answers it (`serving.Kept`): what holds the memory that has run out ends with it."""
    returned = call_function(name, function, judged)
    return {**returned._asdict(), "ends": any(cause == "memory" for cause, _ in returned.errors.values())}


def call_function(name: str, function: Callable[..., Any], judged: Judged) -> Returned:
    """Call it; whatever it does, short of ending its process, becomes values that are missing."""
    count, began = len(judged.completions), time.monotonic()
    try:
        by_position, by_name = arguments(name, function, judged)
        result = awaited(function(*by_position, **by_name))
        found = read_returned(name, result, count, judged.lengths)
    except Missing as missing:  # of all completions
        found = nothing(name, count, missing.cause, str(missing))
    except MemoryError as error:
        found = nothing(name, count, "memory", f"ran out of memory{place_of(error)}")
    except SystemExit as error:
        found = nothing(name, count, "exited", f"called exit ({error.code}){place_of(error)}")
    except Exception as error:
        found = nothing(name, count, "raised", f"raised {in_words(error)}{place_of(error)}")
    return found._replace(seconds=time.monotonic() - began)


def awaited(result: Any) -> Any:
    """What a function returned, or what becomes of it where the function is async.

    In a thread of its own, where a loop runs in this one (a notebook).
    """
    if not inspect.isawaitable(result):
        return result

    async def wait() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    return _in_thread(wait())


def _in_thread(coroutine: Coroutine[Any, Any, Any]) -> Any:
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(asyncio.run(coroutine))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def in_words(error: BaseException) -> str:
    """`KeyError: 'level'`."""
    try:
        text = str(error)
    except Exception:  # of the exception's own making
        text = "it cannot be shown"
    return f"{type(error).__name__}: {text}"


def place_of(error: BaseException) -> str:
    """` (rewards.py, line 12)`: where in the user's code it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or frames[-1].filename == __file__:
        return ""
    return f" ({frames[-1].filename.rpartition('/')[2]}, line {frames[-1].lineno})"
