"""What a chat template prints of a conversation, and what it leaves out: calls, reasoning, text beside a call, tools.

Only rendering shows it. What a template prints depends on which fields the turns have, seldom on what is in them: so each
shape of a conversation is rendered once, with a mark in the place of every field, and a mark comes out or does not.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from llm_trainer.data.encode.templates import SUBSTITUTE, Message

THINK_BLOCK = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # at the beginning of an answer
ALL_CHARACTERS = "character: in conversations"
LEFT_OUT = "character: of them left out by the chat template"
UNPRINTED = "turn: an answer of which the chat template prints nothing, not trained on"


def is_assistant(message: Message) -> bool:
    """Whether the model writes this turn."""
    return message.get("role") == "assistant"


class Field(NamedTuple):
    """A piece of a turn, or the tools beside all turns."""

    turn: int  # -1: of no turn
    name: str  # 'content', 'reasoning_content', 'tool_calls' or 'tools'
    num_characters: int
    number: int = 0  # of several calls

    @property
    def mark(self) -> str:
        return f"{SUBSTITUTE}{self.turn} {self.name} {self.number}{SUBSTITUTE}"


def fields_of(messages: Sequence[Message], tools: Sequence[Any] | None, with_reasoning: bool) -> Iterator[Field]:
    """Everything in a conversation that says something; a `<think>` block that begins a content is reasoning.

    Args:
        with_reasoning: False: reasoning is left aside.
    """
    for i, message in enumerate(messages):
        thought, said = _thought_and_said(message)
        if thought and with_reasoning:
            yield Field(i, "reasoning_content", thought)
        if said:
            yield Field(i, "content", said)
        for number, call in enumerate(message.get("tool_calls") or ()):
            yield Field(i, "tool_calls", _json_length(_function_of(call)), number)
    if tools:
        yield Field(-1, "tools", _json_length(tools))


def _thought_and_said(message: Message) -> tuple[int, int]:
    """Characters of a turn's reasoning and of its content."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    thought = message.get("reasoning_content") or ""
    block = THINK_BLOCK.match(content) if is_assistant(message) and not thought else None
    if block is None:
        return len(thought.strip()), len(content.strip())
    return len(block[1].strip()), len(content[block.end() :].strip())


def _function_of(call: Mapping[str, Any]) -> Any:
    return call.get("function") or call


def _json_length(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False, default=str))


def shape_of(messages: Sequence[Message], fields: Sequence[Field]) -> tuple[Any, ...]:
    """All that decides which fields a template prints, as far as it is not their text."""
    roles = tuple(message["role"] for message in messages)
    inline = tuple("reasoning_content" in message for message in messages)
    return roles, inline, tuple((field.turn, field.name, field.number) for field in fields)


def with_marks(
    messages: Sequence[Message], tools: Sequence[Any] | None, fields: Sequence[Field]
) -> tuple[list[Message], Any]:
    """The conversation and its tools with a mark in the place of each field."""
    marked: list[Any] = [dict(message) for message in messages]
    marked_tools = tools
    for field in fields:
        if field.name == "tools" and tools:
            marked_tools = [_named(tools[0], field.mark), *tools[1:]]
        elif field.name == "tool_calls":
            calls = list(marked[field.turn]["tool_calls"])
            calls[field.number] = _named(calls[field.number], field.mark)
            marked[field.turn]["tool_calls"] = calls
        elif field.name == "reasoning_content" and not marked[field.turn].get("reasoning_content"):
            marked[field.turn]["content"] = f"<think>\n{field.mark}\n</think>\n\n"
        elif field.name == "content" and THINK_BLOCK.fullmatch(str(marked[field.turn].get("content"))):
            marked[field.turn]["content"] += field.mark
        else:
            marked[field.turn][field.name] = field.mark
    return marked, marked_tools


def _named(function: Any, name: str) -> Any:
    """A call or a tool with another name."""
    if not isinstance(function, Mapping):
        return function
    if isinstance(function.get("function"), Mapping):
        return {**function, "function": {**function["function"], "name": name}}
    return {**function, "name": name}


_SAID_OF = {
    "reasoning_content": "turn: its reasoning is left out by the chat template",
    "tool_calls": "call: left out by the chat template",
    "tools": "conversation: its tools are left out by the chat template",
}


def count_left_out(messages: Sequence[Message], fields: Sequence[Field], missing: Sequence[Field]) -> Counter[str]:
    """What to note about a conversation of which the fields `missing` are not printed."""
    notes = Counter({ALL_CHARACTERS: sum(field.num_characters for field in fields)})
    for field in missing:
        notes[LEFT_OUT] += field.num_characters
        said = _SAID_OF.get(field.name)
        if said is None and messages[field.turn].get("tool_calls"):
            said = "turn: its text beside a call is left out by the chat template"
        elif said is None:
            said = f"turn: the text of the {messages[field.turn]['role']} is left out by the chat template"
        notes[said] += 1
    return notes


def share_left_out(notes: Counter[str]) -> float:
    """How much of all characters a template left out, from 0 to 1."""
    return notes[LEFT_OUT] / max(notes[ALL_CHARACTERS], 1)
