"""Where the turns of a conversation stand in what a chat template makes of it, and what begins and ends them."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

from llm_trainer.data.encode.spans import Span
from llm_trainer.data.encode.templates import SUBSTITUTE, ChatTemplateError, Message, describe, strip_marks

Tools = Sequence[Mapping[str, Any]]
TAG_FIX = (
    "put {% generation %} before and {% endgeneration %} after what it prints of an assistant's turn, its end included"
)


class Turns:
    """Finds turns by rendering: the conversation up to a turn, and the whole with the turn replaced.

    Args:
        render: messages, tools and `add_generation_prompt` -> the template's output, still with marks.
        source: tools -> the jinja source that is rendered.
        tokens: matches the tokens that never merge with their surroundings.
    """

    def __init__(
        self, render: Callable[..., str], source: Callable[[Tools | None], str], tokens: re.Pattern[str]
    ) -> None:
        self._render, self._source, self._tokens = render, source, tokens

    def locate(self, messages: Sequence[Message], index: int, text: str, tools: Tools | None) -> Span:
        """Where message `index` stands in `text`; an assistant's turn from its header's end to its end-of-turn token.

        Rendered again with a mark for the message, everything but the message stays, so it is what lies between the
        common beginning and the common end. That misses what the template writes around any answer (an empty thinking
        block): a turn therefore starts where the prompt for it ends, if that prompt is a beginning of `text`. It is
        none where the template rewrites earlier turns; then its last occurrence before the answer counts.
        """
        role = messages[index]["role"]
        probe = [*messages[:index], {"role": role, "content": SUBSTITUTE}, *messages[index + 1 :]]
        before, found, after = strip_marks(self._render(probe, tools)).text.partition(SUBSTITUTE)
        if not found:
            raise ChatTemplateError(
                f"the chat template {describe(self._source(tools))} does not print messages[{index}] ({role}), so it "
                f"is unknown which tokens to train on; expected every turn in its output; {TAG_FIX}"
            )
        start = _common_start(text, before)
        stop = len(text) - _common_start(text[start:][::-1], after[::-1])
        if role != "assistant":
            return start, stop
        try:
            prompt = strip_marks(self._render(messages[:index], tools, add_generation_prompt=True)).text
        except ChatTemplateError:  # a template may refuse a conversation that ends here, or an empty one
            prompt = ""
        if prompt and text.startswith(prompt):
            start = len(prompt)
        elif self.header and (place := text.rfind(self.header, 0, start)) >= 0:
            header_stop = place + len(self.header)
            # Not the header of an earlier turn: no turn ends in between.
            if not (self.end and "".join(self.end) in text[header_stop:start]):
                start = header_stop
        stop = self._first_end(text, start, stop, messages[index])
        return start, self.stop(text, max(start, stop))

    def _first_end(self, text: str, start: int, stop: int, message: Message) -> int:
        """Where the turn from `start` ends, if it does so before `stop`: there the end of the conversation differed too.

        What the message itself says is no end of it, even if it reads like one.
        """
        end = "".join(self.end)
        if not end:
            return stop
        num_said = sum(string.count(end) for string in _strings(message))
        place = start - len(end)
        for _ in range(num_said + 1):
            place = text.find(end, place + len(end), stop)
            if place < 0:
                return stop
        return place

    def stop(self, text: str, stop: int) -> int:
        """`stop`, or the end of what ends a turn there; a generation block may hold the first of its pieces already."""
        for first in range(len(self.end)):
            rest = re.escape("".join(self.end[first:]).lstrip())
            if match := re.compile(r"\s*" + rest).match(text, stop):
                return match.end()
        return stop

    @cached_property
    def end(self) -> list[str]:
        """What the template prints at the end of an assistant's turn, up to the last special token of it.

        In pieces, each ending with a token: an answer may be closed by several (`</answer></s>`). They are what
        stands behind the last turn and behind one that is followed by another alike; if these have no token in common,
        what stands behind the last. Empty if there is none.
        """
        asked: list[Message] = [{"role": "user", "content": "?"}]
        talk = [*asked, {"role": "assistant", "content": SUBSTITUTE}]
        behind_last = self._behind_substitute(talk)
        try:
            behind_earlier = self._behind_substitute(talk + asked)
        except ChatTemplateError:  # the template takes a single question only
            behind_earlier = behind_last
        common = behind_last[: _common_start(behind_last, behind_earlier)]
        return self._pieces(common) or self._pieces(behind_last)

    def _behind_substitute(self, messages: Sequence[Message]) -> str:
        return strip_marks(self._render(messages, None)).text.partition(SUBSTITUTE)[2]

    def _pieces(self, text: str) -> list[str]:
        """Text cut behind each special token; what follows the last is left out."""
        stops = [match.end() for match in self._tokens.finditer(text)]
        return [text[start:stop] for start, stop in pairwise([0, *stops])]

    @cached_property
    def header(self) -> str:
        """What the template prints before an assistant's turn, '' if the prompt does not continue the conversation."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        without = strip_marks(self._render(asked, None)).text
        prompt = strip_marks(self._render(asked, None, add_generation_prompt=True)).text
        return prompt[len(without) :] if prompt.startswith(without) else ""

    @property
    def last_token(self) -> str:
        """The token that ends a turn at last, '' if none does."""
        return ([""] + self._tokens.findall("".join(self.end)))[-1]


def _common_start(a: str, b: str) -> int:
    """How many characters both begin with: halved, for comparing slices is much faster than comparing characters."""
    if a.startswith(b):
        return len(b)
    known, most = 0, min(len(a), len(b))
    while known < most:
        middle = (known + most + 1) // 2
        if a[known:middle] == b[known:middle]:
            known = middle
        else:
            most = middle - 1
    return known


def _strings(value: Any) -> Iterator[str]:
    """Every string value in a structure of lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)
