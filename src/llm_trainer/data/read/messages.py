"""Conversations in the shapes found in the wild -> lists of `Message`, one shape.

Every function takes the `Location` of the value it reads, so an error names the file, the row and the key.
"""

import re
from collections.abc import Sequence
from typing import Any, Required, TypedDict

from llm_trainer.data.images import in_bytes
from llm_trainer.data.read.errors import DataError, DroppedRow, Location, show
from llm_trainer.data.read.json_text import parse_json
from llm_trainer.data.read.weights import MESSAGE_WEIGHTS, weight_of


class Message(TypedDict, total=False):
    """One turn of a conversation; `name` and `tool_call_id` are for the templates that print them."""

    role: Required[str]  # system, user, assistant or tool
    content: Required[str]
    reasoning_content: str
    tool_calls: list[dict[str, Any]]  # {"type": "function", "function": {"name": str, "arguments": dict}}
    loss_weight: float
    name: str
    tool_call_id: str
    images: list[Any]  # one per `<image>` of its content: a source, or None where it is the next of the row's own list


ROLE_ALIASES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",  # its text is the call, as JSON
    "pretrain": "assistant",  # interleaved text and images: everything is trained on
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
IMAGE = "<image>"  # stands in the text where an image goes
_OPTIONAL = {  # optional keys -> ours
    "reasoning_content": "reasoning_content",
    "reasoning": "reasoning_content",
    "think": "reasoning_content",
    "name": "name",
    "tool_call_id": "tool_call_id",
}
_OTHER_KEYS = {"role", "from", "content", "value", "text", "tool_calls", "function_call", *MESSAGE_WEIGHTS}
EMPTY_ANSWER = "turn: an empty answer inside a dialogue, read and not trained on"
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def field(row: Any, key: str, location: Location) -> Any:
    """`row[key]`, or a DataError that lists the keys the row does have."""
    if not isinstance(row, dict):
        raise DataError(location, show(row), f"an object with the key '{key}'", "make every row the same shape")
    if row.get(key) is None:
        keys = ", ".join(f"'{name}'" for name in row) or "no keys"
        fix = "add it, delete the row, or name another format in data_loader_config.schema (--schema)"
        raise DataError(location.at(key), f"nothing (the row has {keys})", "a value", fix, "missing_key")
    return row[key]


def text(value: Any, location: Location) -> str:
    """A string, or a DataError."""
    if not isinstance(value, str):
        raise DataError(location, show(value), "a string", "store text as a JSON string", "wrong_type")
    return value


def text_field(row: Any, key: str, location: Location) -> str:
    """`row[key]`, a string."""
    return text(field(row, key, location), location.at(key))


def list_field(row: Any, key: str, location: Location) -> list[Any]:
    """`row[key]`, a list with something in it."""
    value = field(row, key, location)
    if not isinstance(value, list) or not value:
        raise DataError(location.at(key), show(value), "a list with entries", "repair the row", "wrong_type")
    return value


def decoded(value: Any, location: Location) -> Any:
    """The value, or what it means when it is JSON in a string (tables can only hold such)."""
    if not isinstance(value, str):
        return value
    return parse_json(value, location)


def user(content: str) -> Message:
    """A user turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """An assistant turn."""
    return {"role": "assistant", "content": content}


def messages(value: Any, location: Location) -> list[Message]:
    """A conversation from a list of turns, or from JSON text of one.

    Args:
        value: turns as `{"role", "content"}` or `{"from", "value"}`.
        location: where the list is; whether it takes images says if a part may be one.

    Raises:
        DataError: no list, no turns, an unknown role, content that is no text.
    """
    turns = decoded(value, location)
    if not isinstance(turns, list) or not turns:
        expected = 'a list of turns such as {"role": "user", "content": "..."}'
        raise DataError(location, show(value), expected, "store the conversation as a list", "wrong_type")
    return [message(turn, location.at(i)) for i, turn in enumerate(turns)]


def message(turn: Any, location: Location) -> Message:
    """One turn: the role by `ROLE_ALIASES`, content as a string, optional keys under our names."""
    role_key = "from" if isinstance(turn, dict) and "role" not in turn and "from" in turn else "role"
    alias = text_field(turn, role_key, location)
    if alias not in ROLE_ALIASES:
        known = ", ".join(ROLE_ALIASES)
        fix = "say what it means in data_loader_config.roles (--role), such as {user: the word}"
        raise DataError(location.at(role_key), f"the role {show(alias)}", f"one of {known}", fix, "unknown_role")
    # content and calls: one may be missing, not both
    content_key = next((key for key in ("content", "value", "text") if key in turn), "content")
    here = location.at(content_key)
    content, calls = turn.get(content_key), turn.get("tool_calls") or turn.get("function_call")
    if alias == "function_call":
        content, calls = None, decoded(text(content, here), here)
    tool_calls = _tool_calls(calls, location.at("tool_calls")) if calls else []
    if content is None and not tool_calls:
        field(turn, content_key, location)
    said, thought = "", ""
    images: list[Any] = []
    if isinstance(content, list):
        said, thought, called, images = _parts(content, here)
        tool_calls += called
    elif content is not None:
        said = _content(content, here)
    result: Message = {"role": ROLE_ALIASES[alias], "content": said}
    if thought:
        result["reasoning_content"] = thought
    if location.takes_images and images:
        result["images"] = images
    # optional keys
    for key, value in turn.items():
        if key not in _OPTIONAL and key not in _OTHER_KEYS:
            location.note(f"message: the key {key!r} is not known and left out")
        elif key in _OPTIONAL and value is not None:
            result[_OPTIONAL[key]] = text(value, location.at(key))  # type: ignore[literal-required]
    weight = weight_of(turn, MESSAGE_WEIGHTS, location)
    if weight is not None:
        result["loss_weight"] = weight
    if tool_calls:
        result["tool_calls"] = tool_calls
    return result


def _content(content: Any, location: Location) -> str:
    if not isinstance(content, str):
        expected = "a string or a list of parts"
        raise DataError(location, show(content), expected, "store content as a JSON string", "wrong_type")
    return content


# types of parts that are no content, and the keys that hold theirs
_REASONING = {"reasoning": ("reasoning", "text", "content"), "thinking": ("thinking", "text")}
_CALLS = {"tool_call": ("tool_call", "function"), "function_call": ("function_call",), "tool_use": ()}


def _parts(parts: list[Any], location: Location) -> tuple[str, str, list[dict[str, Any]], list[Any]]:
    """What the parts of a turn say, think, call and show; an image becomes `<image>`."""
    said, thought = "", ""
    calls: list[dict[str, Any]] = []
    images: list[Any] = []
    for i, part in enumerate(parts):
        here = location.at(i)
        kind = str(part.get("type")) if isinstance(part, dict) else ""
        if kind in _REASONING:
            thought += text_field(part, _first_of(_REASONING[kind], part), here)
        elif kind in _CALLS:
            key = _first_of(_CALLS[kind], part)
            call = part[key] if key in part else {name: value for name, value in part.items() if name != "type"}
            if isinstance(call, dict) and "input" in call and "arguments" not in call:
                call = {**call, "arguments": call["input"]}
            calls += _tool_calls(call, here)
        else:
            piece, shown = _part(part, here)
            said += piece
            images += shown
    return said, thought, calls, images


def _first_of(keys: Sequence[str], part: dict[str, Any]) -> str:
    """The first of some keys that a part has; the first of all where it has none, for the message."""
    found = [key for key in keys if key in part]
    return (found or list(keys) or [""])[0]


def _part(part: Any, location: Location) -> tuple[str, list[Any]]:
    """What a part says, and the source of each `<image>` in it; None: the next image of the row's own list."""
    if isinstance(part, str):
        return part, [None] * part.count(IMAGE)
    kind = text_field(part, "type", location)
    if kind in _TEXT_PARTS:
        key = "text" if "text" in part else "value"
        said = text_field(part, key, location)
        return said, [None] * said.count(IMAGE)
    if kind in _IMAGE_PARTS and location.takes_images:
        own = own_source(part)
        source = None if own is None else image_source(part[own], location.at(own))
        return IMAGE, [source]
    expected, fix = "a text, image, reasoning or tool_call part", "remove the part"
    if kind in _IMAGE_PARTS:
        expected, fix = "text only", "remove the part: nothing is trained on images here"
    raise DataError(location, f"a part of type {show(kind)}", expected, fix, "unsupported_part")


_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE_PARTS = ("image", "image_url")


def own_source(part: dict[str, Any]) -> str | None:
    """The key of a part of a content that brings its own image; None: it is none, or the next one of the row's list."""
    if part.get("type") not in _IMAGE_PARTS:
        return None
    return next((key for key in ("image", "image_url", "url", "path", "value") if part.get(key)), None)


def image_source(value: Any, location: Location) -> str | bytes:
    """Path, URL or bytes of an image, from itself or from `{"url" | "path" | "bytes": ...}`; bytes come first."""
    if isinstance(value, dict):
        given = [value[key] for key in ("bytes", "url", "path") if value.get(key)]
        value = given[0] if given else value
    value = in_bytes(value, location)
    if not isinstance(value, str | bytes):
        raise DataError(location, show(value), "a path, a URL or bytes", "repair the image reference", "wrong_type")
    return value


def _tool_calls(value: Any, location: Location) -> list[dict[str, Any]]:
    """OpenAI-shaped calls; arguments become an object, because templates print them as JSON themselves."""
    value = decoded(value, location)
    listed = value if isinstance(value, list) else [value]
    calls = []
    for i, call in enumerate(listed):
        here = location.at(i)
        function = call["function"] if isinstance(call, dict) and "function" in call else call
        name = text_field(function, "name", here)
        arguments = decoded(function.get("arguments") or {}, here.at("arguments"))
        extra = {"id": call["id"]} if "id" in call else {}
        calls.append({**extra, "type": "function", "function": {"name": name, "arguments": arguments}})
    return calls


def tool_schemas(value: Any, location: Location) -> list[dict[str, Any]] | None:
    """The tools a conversation may call, as `{"type": "function", "function": ...}`; None when there are none."""
    tools = decoded(value, location) if value else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(location, show(tools), "a list of function descriptions", "repair the column", "wrong_type")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def is_turns(value: Any) -> bool:
    """Whether a value is a list of turns, judged by the first; the others are checked when they are read."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and not first.keys().isdisjoint(("role", "from"))


def is_transcript(value: Any) -> bool:
    """Whether a string is a dialogue written as `Human: ... Assistant: ...` paragraphs (Anthropic's hh data)."""
    return isinstance(value, str) and _TRANSCRIPT.match(value) is not None


def transcript(value: str, location: Location) -> list[Message]:
    """The turns of such a dialogue, stripped; a last turn without text (`Assistant:` asks for one) is left out."""
    before, *pieces = _TRANSCRIPT.split(text(value, location))
    if before or not pieces:
        expected = "a dialogue that starts with 'Human:' or 'Assistant:'"
        raise DataError(location, show(value), expected, "repair the dialogue", "bad_transcript")
    names, contents = pieces[::2], [content.strip() for content in pieces[1::2]]
    turns = [user(c) if name == "Human" else assistant(c) for name, c in zip(names, contents, strict=True)]
    return turns if contents[-1] else turns[:-1]


def is_empty(turns: list[Message]) -> bool:
    """Whether no turn says, thinks or calls anything."""
    return not any(m["content"].strip() or m.get("reasoning_content") or m.get("tool_calls") for m in turns)


def answered(turns: list[Message], location: Location) -> list[Message]:
    """The conversation, which has something for the model to learn: an assistant turn that is not empty.

    Other answers that are empty stay, as the user's next turn may refer to them, but weigh nothing: all that could be
    learned from them is to end at once.

    Raises:
        DataError: no assistant turn.
        DroppedRow: only empty ones (reason `empty_answer`).
    """
    answers = [turn for turn in turns if turn["role"] == "assistant"]
    if not answers:
        roles = ", ".join(turn["role"] for turn in turns)
        fix = "add the answer; prompts without one are for --kind prompts (PPO, GRPO)"
        raise DataError(location, f"no assistant turn (roles: {roles})", "at least one", fix, "no_assistant_turn")
    if is_empty(answers):
        raise DroppedRow(location, "only empty answers", "an answer with text", "fill or delete it", "empty_answer")
    return mute_empty_answers(turns, location)


def mute_empty_answers(turns: Sequence[Message], location: Location) -> list[Message]:
    """The same turns; of the assistant's those that are empty weigh nothing, which is noted."""
    muted = list(turns)
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" and turn.get("loss_weight") != 0 and is_empty([turn]):
            location.note(EMPTY_ANSWER)
            muted[i] = {**turn, "loss_weight": 0.0}
    return muted


def read_only(turns: Sequence[Message]) -> list[Message]:
    """The same turns, none of which is trained on."""
    return [{**turn, "loss_weight": 0.0} for turn in turns]  # type: ignore[typeddict-item]


def up_to_last_answer(turns: list[Message]) -> list[Message]:
    """The conversation without what comes after its last assistant turn."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    return turns[: last + 1]


def asked(turns: list[Message], location: Location) -> list[Message]:
    """The prompt, which the model has to answer: not empty, and its last turn is the user's or a tool's.

    Raises:
        DataError: it ends on another turn.
        DroppedRow: nothing is said in it (reason `empty_prompt`).
    """
    if is_empty(turns):
        raise DroppedRow(location, "an empty prompt", "a question", "fill or delete it", "empty_prompt")
    if turns[-1]["role"] not in ("user", "tool"):
        found = f"a prompt that ends on the {turns[-1]['role']}'s turn"
        fix = "remove the last turn, or train the row as chat"
        raise DataError(location, found, "a last turn of the user or a tool", fix, "prompt_is_answered")
    return turns
