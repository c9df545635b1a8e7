"""Which turns of a conversation keep their reasoning: taken out of contents, removed, or written where a template drops it."""

from collections.abc import Callable, Sequence

from llm_trainer.data.encode.printed import THINK_BLOCK, is_assistant
from llm_trainer.data.encode.templates import HIDDEN, SUBSTITUTE, Message


def apply_thinking(
    messages: Sequence[Message], policy: str, render: Callable[[Sequence[Message]], str]
) -> list[Message]:
    """The conversation with the reasoning that `policy` ('last', 'all' or 'none') keeps, so that the template prints it.

    Args:
        render: a conversation -> what the template makes of it.
    """
    # 1. thinking that is not wanted
    last_user = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    kept = [_split_thinking(message) for message in messages]
    for i, message in enumerate(kept):
        if policy == "none" or (policy == "last" and i < last_user):
            kept[i] = _without_thinking(message)
    # 2. thinking that the template would drop. Only rendering shows which: a mark in its place comes out or does not
    place = f"{SUBSTITUTE}{{}}{SUBSTITUTE}"
    thinking = [i for i, message in enumerate(kept) if message.get("reasoning_content")]
    probe = list(kept)
    for i in thinking:
        probe[i] = {**kept[i], "reasoning_content": place.format(i)}
    shown = render(probe) if thinking else ""
    for i in thinking:
        if place.format(i) not in shown:
            kept[i] = _inline_thinking(kept[i])
    return kept


def _without_thinking(message: Message) -> Message:
    return {key: value for key, value in message.items() if key != "reasoning_content"}


def _split_thinking(message: Message) -> Message:
    """A `<think>` block at the start of an assistant's content becomes its `reasoning_content`."""
    content = message.get("content")
    if not is_assistant(message) or message.get("reasoning_content") or not isinstance(content, str):
        return message
    block = THINK_BLOCK.match(content)
    if block is None:
        return message
    return {**message, "reasoning_content": block[1].strip(), "content": content[block.end() :]}


def _inline_thinking(message: Message) -> Message:
    """Thinking as part of the content, in tags that the template does not recognise and so does not remove."""
    block = f"<{HIDDEN}think>\n{message['reasoning_content'].strip()}\n<{HIDDEN}/think>\n\n"
    content = message.get("content") or ""
    content = block + content if isinstance(content, str) else [{"type": "text", "text": block}, *content]
    return {**_without_thinking(message), "content": content}
