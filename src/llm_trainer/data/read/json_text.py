"""JSON text -> values that can be trained on; what is wrong with the rest is said, and how far it reaches."""

import json
import re
from collections.abc import Iterator
from typing import Any

from llm_trainer.data.read.errors import DataError, Location, show

MAX_NESTING = 100  # brackets inside brackets; trees of replies are some ten deep, and Python's own limit is near 1,000

_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate: half of a character
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)  # or a string, whose brackets do not count
_SCALAR = re.compile(r"[^,\]]*")  # a number that is an element of an array
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def not_utf8(text: str, location: Location) -> DataError | None:
    """The error for text that was decoded with `surrogateescape` and has such an escape; None: it has none."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00
        column = error.start - text.rfind("\n", 0, error.start)
        near = text[max(error.start - 20, 0) : error.start + 20].strip().encode(errors="surrogateescape")
        found = f"a byte that is not UTF-8 (0x{byte:02x} at character {column}, near {near!r})"
        fix = "convert the file, e.g. iconv -f latin1 -t utf-8, or repair the row"
        return DataError(location, found, "UTF-8 text", fix, "not_utf8")
    return None


def parse_json(text: str, location: Location) -> Any:
    """The value of JSON text.

    Raises:
        DataError: it is no JSON, or holds what no tokenizer or number can: bytes that are not UTF-8, half of a surrogate
            pair, an integer of thousands of digits, brackets more than `MAX_NESTING` deep.
    """
    undecodable = not_utf8(text, location)
    if undecodable is not None:
        raise undecodable
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise bad_json(location, error) from error
    except (RecursionError, ValueError) as error:
        raise _unusable(location, error) from error
    _check_text(text, value, location)
    return value


def parse_array(text: str, location: Location) -> Iterator[tuple[int, Any | DataError]]:
    """`(number from 1, value)` of every element of a JSON array, or the error that says why one cannot be used.

    Raises:
        DataError: the text is no JSON array; where it breaks off, nothing can be said about the rest.
    """
    position = _after_space(text, _after_space(text, 0) + 1)
    number = 0
    while number or text[position : position + 1] != "]":
        number += 1
        try:
            value, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise bad_json(Location(location.path, error.lineno), error) from error
        except (RecursionError, ValueError) as error:
            yield number, _unusable(Location(location.path, number), error)
            end = _end_of(text, position)
        else:
            yield number, _checked(text[position:end], value, Location(location.path, number))
        position = _after_space(text, end)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            missing = json.JSONDecodeError("Expecting ',' delimiter", text, position)
            raise bad_json(Location(location.path, missing.lineno), missing)
        if mark == "]":
            break
        position = _after_space(text, position + 1)
    rest = _after_space(text, position + 1)
    if rest < len(text):
        extra = json.JSONDecodeError("Extra data", text, rest)
        raise bad_json(Location(location.path, extra.lineno), extra)


def bad_json(location: Location, error: json.JSONDecodeError) -> DataError:
    """The error for text that is no JSON."""
    text = error.doc[max(error.pos - 40, 0) : error.pos + 10]
    found = f"broken JSON ({error.msg} at line {error.lineno}, column {error.colno}, near {show(text)})"
    return DataError(location, found, "one complete JSON value", "repair or delete it; it may be cut short", "bad_json")


def _after_space(text: str, position: int) -> int:
    return _SPACE.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing at all as well


def _end_of(text: str, position: int) -> int:
    """Where the element of an array that begins at `position` ends, by its brackets alone."""
    if text[position] not in "[{":
        return _SCALAR.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing at all as well
    depth = 0
    for match in _BRACKET.finditer(text, position):
        if match[0] in ("[", "{"):
            depth += 1
        elif match[0] in ("]", "}"):
            depth -= 1
        if depth == 0:
            return match.end()
    return len(text)


def _checked(text: str, value: Any, location: Location) -> Any | DataError:
    error = not_utf8(text, location)
    if error is not None:
        return error
    try:
        _check_text(text, value, location)
    except DataError as found:
        return found
    return value


def _unusable(location: Location, error: Exception) -> DataError:
    """What Python's parser gives up on, though it is JSON."""
    if isinstance(error, RecursionError):
        return _too_deep(location)
    found, fix = "an integer of thousands of digits", "store it as a string, or delete the row"
    return DataError(location, found, "numbers that a computer can hold", fix, "huge_number")


def _too_deep(location: Location) -> DataError:
    expected = f"at most {MAX_NESTING} levels"
    return DataError(location, "brackets nested too deep", expected, "flatten or delete the row", "nested_too_deep")


def _check_text(text: str, value: Any, location: Location) -> None:
    """Look closer at values whose text makes it necessary; that of almost every row does not."""
    if text.count("[") + text.count("{") > MAX_NESTING and _depth(text) > MAX_NESTING:
        raise _too_deep(location)
    if "\\u" not in text or not _HALF_A_PAIR.search(text):
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        near = error.object[max(error.start - 20, 0) : error.start + 20]
        found = f"half of a surrogate pair (a lone surrogate: \\u{ord(error.object[error.start]):04x}, near {near!a})"
        fix = "repair or delete the row; an emoji was probably cut in two"
        raise DataError(location, found, "whole characters", fix, "lone_surrogate") from None


def _depth(text: str) -> int:
    depth = deepest = 0
    for match in _BRACKET.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in ("]", "}"):
            depth -= 1
    return deepest
