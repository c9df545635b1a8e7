"""What a reward function returned, as numbers. What is not a number is missing, with its cause; it is never 0."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

# Why a value is missing: the name under which it is counted, and what it means.
CAUSES = {
    "raised": "the function raised an exception",
    "count": "it returned another number of rewards than it was given completions",
    "type": "it returned something that is not a number",
    "not_finite": "it returned NaN or an infinity",
    "time": "it took longer than it may",
    "memory": "it took more memory than it may",
    "processes": "it started more processes than it may",
    "exited": "its process ended",
    "unavailable": "what it asks could not be reached, or gave no answer that can be read",
}
MOST_CHARACTERS = 600  # of a message
NAN = float("nan")
OF_COMPLETION, NUMBER = " for a completion", "number, or None: it does not apply"  # in messages


class Missing(Exception):
    """A reward that cannot be had; a function may return one in place of a number, and say why.

    Args:
        message: what happened.
        cause: one of `CAUSES`.
    """

    def __init__(self, message: str, cause: str = "unavailable") -> None:
        assert cause in CAUSES
        super().__init__(message)
        self.cause = cause


class Returned(NamedTuple):
    """What one call of one function gave.

    Attributes:
        values: A number per completion; NaN where it is missing or does not apply.
        tokens: Numbers per token, by completion, of a function that judges tokens, NaN at those that it does not judge; its
            value is their sum.
        errors: By completion: the cause and a message, where the value is missing.
        output: The beginning of what the function printed.
        seconds: That the call took.
    """

    values: list[float]
    tokens: dict[int, list[float]]
    errors: dict[int, tuple[str, str]]
    output: str = ""
    seconds: float = 0.0


class Answer(NamedTuple):
    """What the process of a function answered to a call.

    Attributes:
        fields: Of its answer; empty where there is none.
        cause: One of `CAUSES`, why there is none; else "".
        what: The same in words, to follow a name.
        output: The beginning of what was printed.
    """

    fields: Mapping[str, Any]
    cause: str = ""
    what: str = ""
    output: str = ""


def returned_of(name: str, answer: Answer, count: int) -> Returned:
    """What a reward function returned for `count` completions, from what its process answered."""
    if answer.cause:
        return nothing(name, count, answer.cause, answer.what)._replace(output=answer.output)
    fields = answer.fields
    tokens = {int(row): numbers for row, numbers in fields["tokens"].items()}
    errors = {int(row): (cause, message) for row, (cause, message) in fields["errors"].items()}
    return Returned(fields["values"], tokens, errors, answer.output, fields["seconds"])


def nothing(name: str, count: int, cause: str, what: str) -> Returned:
    """A call that gave nothing: all of its `count` values are missing; `what` follows the name in the message."""
    message = _shorten(f"reward function {name!r} {what}")
    return Returned([NAN] * count, {}, dict.fromkeys(range(count), (cause, message)))


def read_returned(name: str, returned: Any, count: int, lengths: Sequence[int] | None = None) -> Returned:
    """The numbers in what a function returned for `count` completions.

    None means that the function does not apply; a list, in the place of a number, has one number per token, or None.

    Args:
        name: of the function, for messages.
        returned: a list, a tuple, an array or a tensor.
        count: completions that the function was given.
        lengths: tokens of each completion, where they are known: as many numbers a list per token must have.
    """
    found = _as_list(returned)
    if found is None:
        return nothing(name, count, "type", f"returned {_show(returned)}, expected a list of {count} numbers")
    if len(found) != count:
        what = f"returned {len(found)} rewards for {count} completions ({_show(found)})"
        return nothing(name, count, "count", what)
    values, tokens, errors = [NAN] * count, {}, {}
    for row, value in enumerate(found):
        try:
            per_token = _as_list(value)
            if per_token is not None:
                tokens[row] = _numbers(per_token, lengths, row)
                judged = [number for number in tokens[row] if not math.isnan(number)]
                if judged:
                    values[row] = math.fsum(judged)
            elif value is not None:
                values[row] = finite(value, after=OF_COMPLETION)
        except Missing as missing:
            errors[row] = missing.cause, _shorten(f"reward function {name!r} {missing}")
    return Returned(values, tokens, errors)


def _as_list(value: Any) -> list[Any] | None:
    """The members of a list, a tuple, an array or a tensor; None: it is something else."""
    if isinstance(value, list | tuple):
        return list(value)
    to_list = getattr(value, "tolist", None)  # of arrays and tensors, which are not imported here to be known
    if callable(to_list):
        members = to_list()
        if isinstance(members, list):
            return members
    return None


def finite(value: Any, said: str = "returned", after: str = "", expected: str = NUMBER) -> float:
    """A reward that somebody has given, as a number.

    Args:
        said, after, expected: what messages say, around the value.

    Raises:
        Missing: it is none, or not finite.
    """
    if isinstance(value, Missing):
        raise value
    is_plain = type(value) is float or type(value) is int
    if not is_plain and not isinstance(value, SupportsFloat):
        raise Missing(f"{said} {_show(value)}{after}, expected a {expected}", "type")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Missing(f"{said} {_show(value)}{after}, expected a {expected}", "type") from None
    if not math.isfinite(number):
        raise Missing(f"{said} {number}{after}, expected a finite {expected}", "not_finite")
    return number


def _numbers(values: list[Any], lengths: Sequence[int] | None, row: int) -> list[float]:
    if lengths is not None and len(values) != lengths[row]:
        raise Missing(
            f"returned {len(values)} numbers for a completion of {lengths[row]} tokens, expected one for each (a parameter "
            "`lengths` gets how many they are), or one number for all",
            "count",
        )
    return [NAN if value is None else finite(value, after=OF_COMPLETION) for value in values]


def _show(value: Any) -> str:
    """`a str ('good')`, short, whatever the value's own `repr` does."""
    try:
        text = reprlib.repr(value)
    except Exception:
        text = "it cannot be shown"
    if value is None:
        return "None"
    return f"a {type(value).__name__}: {text}"


def _shorten(message: str) -> str:
    if len(message) <= MOST_CHARACTERS:
        return message
    return f"{message[:MOST_CHARACTERS]} ... ({len(message):,} characters)"
