"""A conversation as the ids that a policy has written, and those of what was said to it: neither is ever encoded again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from llm_trainer.episodes.calls import parse_calls
from llm_trainer.generation.service import Completion, Request

Message = Mapping[str, Any]


class Chat(Protocol):
    """How messages become ids: `data.encode.chat.ChatFormat`."""

    @property
    def tokenizer(self) -> Any: ...

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]: ...

    def encode_continuation(
        self,
        said: Sequence[Message],
        reply: Message,
        further: Sequence[Message],
        tools: Any = None,
        has_end: bool = True,
    ) -> list[int] | None: ...


@dataclass
class Segment:
    """A stretch of a conversation that is one row: a prompt, and what was written and said after it.

    Attributes:
        prompt: ids.
        ids: behind the prompt, the policy's and others'.
        trained: of each id, whether the policy wrote it.
        logprobs: of each id as it was drawn; 0 where the policy did not write it.
        versions: spans of ids, (first, version of the weights).
        kept: of each id what it was drawn from, where the distribution was cut.
        is_cut: the policy's last turn has no end.
        said: the messages with which it began.
    """

    prompt: list[int]
    said: Sequence[Message] = ()
    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    kept: list[list[int]] | None = None
    is_cut: bool = False

    @property
    def length(self) -> int:
        """Tokens with the prompt."""
        return len(self.prompt) + len(self.ids)

    def write(self, completion: Completion) -> None:
        """Append what the policy has written."""
        start = len(self.ids)
        for first, version in completion.versions:
            if not self.versions or self.versions[-1][1] != version:
                self.versions.append((start + first, version))
        if completion.kept is not None:
            self.kept = [*(self.kept or [[]] * start), *completion.kept]
        self._append(completion.ids, completion.logprobs, trained=True)
        self.is_cut = completion.finish == "length"

    def hear(self, ids: Sequence[int]) -> None:
        """Append what was said to the policy."""
        if self.kept is not None:
            self.kept += [[]] * len(ids)
        self._append(ids, [0.0] * len(ids), trained=False)

    def _append(self, ids: Sequence[int], logprobs: Sequence[float], trained: bool) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.trained += [trained] * len(ids)

    def completion(self, finish: str) -> Completion:
        """All behind the prompt, without what was said after the policy's last token."""
        end = len(self.ids)
        while end and not self.trained[end - 1]:
            end -= 1
        kept = None if self.kept is None else self.kept[:end]
        return Completion(self.ids[:end], self.logprobs[:end], finish, self.versions, kept, self.trained[:end])


class Conversation:
    """What was said and written so far.

    Args:
        chat: makes ids of messages.
        stops: tokens that end a turn.
        tools: their descriptions, for the chat template.

    Attributes:
        messages: of all roles; the policy's with their text as it was written.
        segments: its rows. There is a new one where the template prints earlier turns otherwise than they were written.
        num_written: tokens by the policy.
        num_turns: of the policy.
    """

    def __init__(self, chat: Chat, stops: Sequence[int], tools: Sequence[Mapping[str, Any]] | None = None) -> None:
        self.chat, self.stops, self.tools = chat, frozenset(stops), tools or None
        self.messages: list[Message] = []
        self.segments: list[Segment] = []
        self.num_written = self.num_turns = 0

    def hear(self, messages: Sequence[Message]) -> None:
        """Take what is said to the policy.

        Raises:
            ChatTemplateError: the template refuses it.
        """
        segment = self.segments[-1] if self.segments else None
        before = self.messages
        self.messages = [*before, *messages]
        ids = None
        if segment is not None and segment.ids and before[-1]["role"] == "assistant":
            has_end = segment.ids[-1] in self.stops
            ids = self.chat.encode_continuation(before[:-1], before[-1], messages, self.tools, has_end)
        if segment is None or ids is None:
            self.segments.append(Segment(self.chat.encode_prompt(self.messages, self.tools), messages))
        else:
            segment.hear(ids)

    @property
    def ids(self) -> list[int]:
        """What the policy continues."""
        segment = self.segments[-1]
        return [*segment.prompt, *segment.ids]

    def request(self, number: int, sample: int, most: int) -> Request:
        """The policy's next turn, of at most so many tokens; its noise goes on where that of its last turn ended."""
        return Request(self.ids, number, sample=sample, first=self.num_written, most=most)

    def write(self, completion: Completion) -> Message:
        """Take what the policy has written; its message, without special tokens, and with the tools that it calls."""
        segment, tokenizer = self.segments[-1], self.chat.tokenizer
        context = self.ids
        segment.write(completion)
        self.num_written += len(completion.ids)
        self.num_turns += 1
        ids = completion.ids
        if ids and ids[-1] in self.stops:
            ids = ids[:-1]
        raw = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        parsed = parse_calls(tokenizer, raw, context, self.tools) if self.tools else {}
        as_written = {"role": "assistant", "content": raw}
        if parsed.get("tool_calls"):
            as_written["tool_calls"] = parsed["tool_calls"]
        self.messages = [*self.messages, as_written]
        return {"role": "assistant", "content": text, **parsed}

    def text(self) -> str:
        """All that followed the first prompt, as reward functions get it: without the tokens that mark turns."""
        decode = self.chat.tokenizer.decode
        parts: list[str] = []
        for segment in self.segments:
            if segment is not self.segments[0]:  # what was said before a new row is in its prompt
                parts += [str(message.get("content") or "") for message in segment.said]
            parts.append(decode(segment.completion("stop").ids, skip_special_tokens=True))
        return "\n".join(parts)
