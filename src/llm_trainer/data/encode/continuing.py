"""What follows an answer that a model has written itself, when its conversation goes on: as text that is encoded alone."""

from collections.abc import Callable

from llm_trainer.data.encode.templates import Rendered

THOUGHT = "</think>"  # ends what templates drop from earlier turns


def rest_of(
    prompt: str, whole: Rendered, reply: str, has_end: bool, stop: Callable[[str, int], int]
) -> Rendered | None:
    """What stands behind an answer in a conversation that goes on.

    Args:
        prompt: the conversation up to the answer, as it was rendered for that.
        whole: all of it, the answer in it, rendered as the prompt of the next one.
        reply: what was written, without the token that ended it; a template may strip spaces from its ends.
        has_end: the model has written the end of its turn.
        stop: a text and a place in it -> the end of what ends a turn there (`turns.Turns.stop`).

    Returns:
        None: something else stands there than was written, so that a model which is asked again reads another text.
    """
    text = whole.text
    if not text.startswith(prompt):
        return None
    wrote = reply.strip()
    start = _behind_space(text, len(prompt)) if wrote else len(prompt)
    if not text.startswith(wrote, start):
        return None
    place = start + len(wrote)
    if has_end:
        place = stop(text, place)
    return _behind(whole, place)


def rest_behind(prompt: str, whole: Rendered, reply: str, has_end: bool, end: str) -> Rendered | None:
    """As `rest_of`, where the template writes the calls of an answer in its own way.

    Args:
        end: what ends a turn; no call holds it.
    """
    text = whole.text
    place = text.find(end, len(prompt)) if end else -1
    if not text.startswith(prompt) or place < 0:
        return None
    if THOUGHT in reply and THOUGHT not in text[len(prompt) : place]:
        return None
    if has_end:
        place += len(end)
    return _behind(whole, place)


def _behind(whole: Rendered, place: int) -> Rendered:
    literals = frozenset(literal - place for literal in whole.literals if literal >= place)
    return Rendered(whole.text[place:], [], literals)


def _behind_space(text: str, place: int) -> int:
    return len(text) - len(text[place:].lstrip())
