"""The tools that a policy calls, found in what it wrote: by its tokenizer's own form, else by the widespread one."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

# As Qwen, Hermes and many since print a call; the default template says so too.
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_NAMES = ("arguments", "parameters")  # of what a call is given


def parse_calls(
    tokenizer: Any, text: str, context: Sequence[int], tools: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """What a message holds beside its text: `content`, `reasoning_content` and `tool_calls`, as far as they are found.

    Args:
        tokenizer: if it has a `response_template`, that says how calls are written (transformers' `parse_response`).
        text: of the turn, with special tokens, without the one that ends it.
        context: ids before it.
        tools: their descriptions.

    Returns:
        `tool_calls` in the form of the OpenAI chat protocol, with `arguments` as a mapping. A call that cannot be read has a
        `function` with the name "" and the text under `error`.
    """
    if getattr(tokenizer, "response_template", None) is not None:
        try:
            found = tokenizer.parse_response(text, prefix=list(context), tools=tools)
        except (ValueError, KeyError, TypeError) as error:  # of what a policy writes, anything may be wrong
            return {"tool_calls": [_unread(f"the call cannot be read ({error})")]}
        calls = found.get("tool_calls") or []
        parsed = {"content": found.get("content") or ""}
        thought = found.get("reasoning_content") or found.get("thinking")
        if thought:
            parsed["reasoning_content"] = thought
        return parsed | ({"tool_calls": [_in_form(call) for call in calls]} if calls else {})
    calls = [_in_form(_read(match[1])) for match in _CALL.finditer(text)]
    return {"tool_calls": calls} if calls else {}


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        return {"error": f"the call is no JSON ({error}): {text.strip()[:200]}"}


def _in_form(call: Any) -> dict[str, Any]:
    """A call as `{"type": "function", "function": {"name": ..., "arguments": {...}}}`."""
    if not isinstance(call, Mapping):
        return _unread(f"the call is a {type(call).__name__}, expected an object with name and arguments")
    if "error" in call and "name" not in call:
        return _unread(str(call["error"]))
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return _unread("the call has no name; expected an object with name and arguments")
    given: Any = next((function[name] for name in _NAMES if name in function), {})
    if isinstance(given, str):
        given = _read(given) if given.strip() else {}
    if not isinstance(given, Mapping):
        return _unread(f"the arguments of {function['name']} are a {type(given).__name__}, expected an object")
    return {"type": "function", "function": {"name": function["name"], "arguments": dict(given)}}


def _unread(why: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "", "arguments": {}, "error": why}}
