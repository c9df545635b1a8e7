"""Conversations to token ids, and for each token whether it is trained on; prompts for generation the same way.

What is trained on is decided in characters of the rendered text, never in tokens: a token is trained on if and only
if its characters overlap a trained span. Mapping the span's ends to tokens instead loses the last byte tokens of a
multi-byte character (tests/reference/README.md, point 27).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, starmap
from typing import TYPE_CHECKING, Any, Literal, get_args

from llm_trainer.data.encode.continuing import rest_behind, rest_of
from llm_trainer.data.encode.pictured import (
    shown,
    taken_by,
    with_image_marks,
)
from llm_trainer.data.encode.plain import EncodedChat, PlainText, Printed
from llm_trainer.data.encode.printed import Field, count_left_out, fields_of, is_assistant, shape_of, with_marks
from llm_trainer.data.encode.spans import Span
from llm_trainer.data.encode.templates import (
    LITERAL,
    MARKS,
    ChatTemplateError,
    Message,
    Rendered,
    default_template,
    describe,
    has_generation_tags,
    render,
    strip_marks,
)
from llm_trainer.data.encode.thinking import apply_thinking
from llm_trainer.data.encode.tokenizer import any_of, in_blocks
from llm_trainer.data.encode.turns import TAG_FIX, Tools, Turns
from llm_trainer.data.images import ImageRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llm_trainer.data.vision import ImageFormat

TrainOn = Literal["assistant", "last", "all"]
Thinking = Literal["template", "last", "all", "none"]


@dataclass(frozen=True, eq=False)
class ChatFormat(PlainText):
    """How conversations become tokens, for training and for generation alike.

    The template alone decides about a BOS in a conversation, as in `transformers` and the servers that use it; the
    default one prints it if the tokenizer adds one to a plain text. The tokenizer never adds a second.

    An assistant's turn is trained on from the end of its header to its end-of-turn token, that one included; the
    newline after it is not. Turns are found by the template's `{% generation %}` tags or, without them, by rendering
    the conversation up to the turn and once more with the turn replaced.

    Args:
        tokenizer: a fast tokenizer.
        template: jinja source; None: the tokenizer's own, or `default_template` when it has none.
        train_on: 'assistant': every turn of the assistant; 'last': only its last; 'all': every token. Of these, the
            tokens of a message with a `loss_weight` weigh that much, those of weight 0 are not trained on.
        thinking: which turns keep their `reasoning_content` (or the `<think>` block their content starts with).
            'template': as the template decides, and most print it only after the last user turn; 'last': those after
            the last user turn; 'all': every turn; 'none': no turn. Thinking that is kept but that the template would
            not print is written before the content as `<think>\\n...\\n</think>\\n\\n`.
        parse_special_tokens: False: text of a special token inside a system, user or tool message, or in a plain text
            or completion, is only text. True: it is the token, as in `transformers` by default; whoever writes the
            data can then end a turn and speak as someone else. What an assistant writes is always parsed, for its
            tokens are meant.
        images: what an image is in tokens, for a model that sees; then every `<image>` of a content is one, and messages
            bring them along (`images`, as `ImageRef`s). None: `<image>` is text.

    Raises:
        ValueError: a slow tokenizer, or an unknown `train_on` or `thinking`.
    """

    tokenizer: "PreTrainedTokenizerFast"
    template: str | None = None
    train_on: TrainOn = "assistant"
    thinking: Thinking = "template"
    parse_special_tokens: bool = False
    images: "ImageFormat | None" = None

    def __post_init__(self) -> None:
        from transformers import PreTrainedTokenizerFast

        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"tokenizer is a {type(self.tokenizer).__name__}; expected a fast one, which knows the characters of "
                "each token; fix: load_tokenizer(folder with tokenizer.json)"
            )
        for name, known in {"train_on": get_args(TrainOn), "thinking": get_args(Thinking)}.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")

    def encode(self, messages: Sequence[Message], tools: Tools | None = None) -> EncodedChat:
        """One conversation; `encode_many` is faster for many.

        Raises:
            ChatTemplateError: the template fails, or what the assistant wrote cannot be found in its output.
        """
        return self.encode_many([messages], [tools])[0]

    def encode_many(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools | None] | None = None
    ) -> list[EncodedChat]:
        """Many conversations, tokenised together; `tools` has one list of functions (or None) per conversation."""
        return list(self.encode_each(conversations, tools))

    def encode_each(
        self, conversations: Sequence[Sequence[Message]], tools: Sequence[Tools | None] | None = None
    ) -> Iterator[EncodedChat]:
        """As `encode_many`, one after another: only those that are tokenised together are in memory at once."""
        functions = tools or [None] * len(conversations)
        printed = starmap(self._print, zip(conversations, functions, strict=True))
        for block in in_blocks(printed, lambda one: len(one.rendered.text)):
            yield from self._tokenise(block)

    def _print(self, given: Sequence[Message], tools: Tools | None) -> "Printed":
        """A conversation in the chat template, and where in it something is trained on."""
        messages, tools = self._prepare(given, tools)
        unprinted = self._unprinted(given, messages, tools)
        for i in unprinted:
            messages[i] = {**messages[i], "loss_weight": 0.0}
        rendered = strip_marks(self._render(messages, tools))
        found = self._trained_spans(messages, tools, rendered)
        weights = [weight for _, weight in found]
        if all(weight == 1 for weight in weights):
            weights = []
        return Printed(rendered, [span for span, _ in found], weights, len(unprinted), _images_of(given))

    def encode_prompt(
        self, messages: Sequence[Message], tools: Tools | None = None, enable_thinking: bool | None = None
    ) -> list[int]:
        """Ids that end where the assistant begins to write; `enable_thinking` goes to the template unless None."""
        return self.encode_prompts([messages], [tools], enable_thinking)[0]

    def encode_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Tools | None] | None = None,
        enable_thinking: bool | None = None,
    ) -> list[list[int]]:
        """Many prompts, tokenised together."""
        return [one.input_ids for one in self.encode_pictured(conversations, tools, enable_thinking)]

    def encode_pictured(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Tools | None] | None = None,
        enable_thinking: bool | None = None,
    ) -> list[EncodedChat]:
        """Many prompts with the images that stand in them; nothing of a prompt is trained on."""
        rendered = self._rendered_prompts(conversations, tools, enable_thinking)
        if self.images is None:
            pairs = zip(rendered, self._encoder.encode_ids(rendered), strict=True)
            return [EncodedChat(ids, [False] * len(ids), one.text) for one, ids in pairs]
        printed = [
            Printed(one, [], [], 0, _images_of(given)) for one, given in zip(rendered, conversations, strict=True)
        ]
        return list(self._tokenise(printed))

    def _rendered_prompts(
        self,
        conversations: Sequence[Sequence[Message]],
        tools: Sequence[Tools | None] | None,
        enable_thinking: bool | None,
    ) -> list[Rendered]:
        options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        rendered = []
        for messages, functions in zip(conversations, tools or [None] * len(conversations), strict=True):
            rendered.append(self._rendered(messages, functions, **options))
        return rendered

    def encode_continuation(
        self,
        said: Sequence[Message],
        reply: Message,
        further: Sequence[Message],
        tools: Tools | None = None,
        has_end: bool = True,
    ) -> list[int] | None:
        """Ids that follow those of an answer which the model has written itself, up to where it begins to write again.

        Args:
            said: the conversation before the answer.
            reply: it, `content` being its text as it was written, without the token that ended it; `tool_calls` are looked at
                where the template does not take the calls as text.
            further: what is said then.
            tools: that the template shows.
            has_end: the model has written a token that ends its turn.

        Returns:
            None: the template prints what was before otherwise than it was written (without its thinking, say), so that the
            conversation cannot be appended to.

        Raises:
            ChatTemplateError: the template refuses this conversation.
        """
        prompt = self._rendered(said, tools).text
        as_text = {name: value for name, value in reply.items() if name != "tool_calls"}
        try:
            whole = self._rendered([*said, as_text, *further], tools)
            rest = rest_of(prompt, whole, reply["content"], has_end, self._turns.stop)
        except ChatTemplateError:
            if not reply.get("tool_calls"):
                raise
            whole = self._rendered([*said, reply, *further], tools)
            rest = rest_behind(prompt, whole, reply["content"], has_end, "".join(self._turns.end).lstrip())
        return None if rest is None else self._encode_behind(rest, self._turns.last_token)

    def _rendered(self, messages: Sequence[Message], tools: Tools | None, **options: Any) -> Rendered:
        """A prompt, without marks."""
        messages, tools = self._prepare(messages, tools)
        return strip_marks(self._render(messages, tools, add_generation_prompt=True, **options))

    def _encode_behind(self, rest: Rendered, token: str) -> list[int]:
        """Ids of text that stands behind a token: some tokenizers write the beginning of a text otherwise."""
        moved = frozenset(place + len(token) for place in rest.literals)
        [ids] = self._encoder.encode_ids([Rendered(token + rest.text, [], moved)])
        before = [self.tokenizer.convert_tokens_to_ids(token)] if token else []
        return ids[len(before) :] if ids[: len(before)] == before else self._encoder.encode_ids([rest])[0]

    def left_out(self, messages: Sequence[Message], tools: Tools | None = None) -> Counter[str]:
        """What the template does not print of a conversation, and how many characters that is, for `Location.note`.

        Reasoning is counted if the template decides about it; any other `thinking` is the user's word.
        """
        fields, missing = self._find_fields(messages, tools, with_reasoning=self.thinking == "template")
        return count_left_out(messages, fields, missing)

    def _find_fields(
        self, messages: Sequence[Message], tools: Tools | None, with_reasoning: bool
    ) -> tuple[list[Field], list[Field]]:
        """All that a conversation says, and what the template does not print of it."""
        fields = list(fields_of(messages, tools, with_reasoning))
        shape = shape_of(messages, fields)
        if shape not in self._missing:
            marked, marked_tools = with_marks(messages, tools, fields)
            try:
                shown = self._render(marked, marked_tools)
            except ChatTemplateError:  # it takes these turns for something else than text: nothing can be said
                shown = "".join(field.mark for field in fields)
            self._missing[shape] = [number for number, field in enumerate(fields) if field.mark not in shown]
        return fields, [fields[number] for number in self._missing[shape]]

    def _unprinted(self, given: Sequence[Message], messages: Sequence[Message], tools: Tools | None) -> list[int]:
        """Calls or mere reasoning of which nothing is printed: only the ends of these answers would be left to train on.

        A template that does not even print the text of an answer is an error, which `Turns.locate` finds.

        Args:
            given: the conversation as it came.
            messages: as the template gets it, its reasoning by the policy.
        """
        fields, missing = self._find_fields(messages, tools, with_reasoning=True)
        if not missing and self.thinking in ("template", "all"):
            return []
        printed = {field.turn for field in fields if field not in missing}
        said = list(fields_of(given, None, with_reasoning=True))
        without_text = {field.turn for field in said} - {field.turn for field in said if field.name == "content"}
        return [i for i in sorted(without_text - printed) if is_assistant(messages[i]) and _weight(messages[i]) != 0]

    @cached_property
    def _missing(self) -> dict[tuple[Any, ...], list[int]]:
        """Of conversations of a shape, which fields are not printed."""
        return {}

    def facts(self) -> list[Any]:
        """Everything that the ids of a row and what is trained on depend on, but for the row: plain values."""
        tokenizer = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        try:
            templates = self._sources
        except ChatTemplateError:  # none: plain text needs none
            templates = ("", "")
        options = [self.train_on, self.thinking, self.parse_special_tokens]
        images = [] if self.images is None else [self.images.facts()]
        return [tokenizer, self._variables, templates, options, *images]

    def stop_token_ids(self) -> list[int]:
        """Where generation stops: the last token of the template's end of a turn, and the tokenizer's eos."""
        tokens = [token for token in (self._turns.last_token, self.tokenizer.eos_token) if token]
        vocabulary = self.tokenizer.get_vocab()
        return [vocabulary[token] for token in dict.fromkeys(tokens)]

    # Rendering

    @cached_property
    def _sources(self) -> tuple[str, str]:
        """The template without and with tools: some tokenizers have one of each."""
        own = self.template or self.tokenizer.chat_template or default_template(self.tokenizer)
        if isinstance(own, str):
            return own, own
        if "default" not in own:
            raise ChatTemplateError(
                f"tokenizer {self.tokenizer.name_or_path!r} has the chat templates {', '.join(own)}; expected one "
                "named 'default'; pass the wanted one as `template`"
            )
        return own["default"], own.get("tool_use", own["default"])

    @cached_property
    def _variables(self) -> dict[str, Any]:
        return {**self.tokenizer.special_tokens_map, "documents": None}

    def _source(self, tools: Tools | None) -> str:
        return self._sources[bool(tools)]

    def _render(
        self, messages: Sequence[Message], tools: Tools | None, add_generation_prompt: bool = False, **options: Any
    ) -> str:
        options.update(self._variables, tools=tools or None, add_generation_prompt=add_generation_prompt)
        if self.images is not None:
            messages = shown(messages, self._takes_images, self.images.marker)
        return render(self._source(tools), messages, **options)

    @cached_property
    def _takes_images(self) -> str:
        """How the template takes images (`shown`)."""
        assert self.images is not None

        def printed(messages: Sequence[Message]) -> str:
            return render(self._source(None), messages, **self._variables, tools=None, add_generation_prompt=False)

        return taken_by(printed, self.images.marker)

    def _prepare(self, messages: Sequence[Message], tools: Tools | None) -> tuple[list[Message], Tools | None]:
        """Messages as the template gets them: marked where text only looks like a token, thinking by the policy."""

        def clean(text: str) -> str:
            return MARKS.sub("\ufffd", text)

        def mark(text: str) -> str:
            return self._encoder.special.sub(lambda token: LITERAL + token[0], clean(text))

        if self.parse_special_tokens:
            mark = clean
        prepared = []
        for message in messages:
            change = clean if is_assistant(message) else mark
            if self.images is None:
                prepared.append(_map_strings(message, change))
            else:
                prepared.append(_with_marks(message, change))
        tools = _map_strings(tools, mark)
        if self.thinking != "template":
            prepared = apply_thinking(prepared, self.thinking, lambda probe: self._render(probe, tools))
        return prepared, tools

    # What is trained on

    def _trained_spans(
        self, messages: Sequence[Message], tools: Tools | None, rendered: Rendered
    ) -> list[tuple[Span, float]]:
        """Where in the rendered text something is trained on, in order, and how much it weighs."""
        if self.train_on == "all":
            return self._all_but_weighted(messages, tools, rendered.text)
        turns = [i for i, message in enumerate(messages) if is_assistant(message)]
        candidates = turns[-1:] if self.train_on == "last" else turns
        wanted = [i for i in candidates if _weight(messages[i]) != 0]
        if not wanted:
            return []
        source = self._source(tools)
        if not has_generation_tags(source):
            return [(self._turns.locate(messages, i, rendered.text, tools), _weight(messages[i])) for i in wanted]
        if not rendered.blocks:
            raise ChatTemplateError(
                f"the chat template {describe(source)} has {{% generation %}} tags but printed none of the "
                f"{len(turns)} assistant turns inside them, so nothing would be trained on; {TAG_FIX}"
            )
        blocks = [(start, self._turns.stop(rendered.text, stop)) for start, stop in rendered.blocks]
        if len(blocks) == len(turns):
            return [(blocks[turns.index(i)], _weight(messages[i])) for i in wanted]
        if wanted == turns and all(_weight(messages[i]) == 1 for i in wanted):
            return [(block, 1.0) for block in blocks]
        return [(self._turns.locate(messages, i, rendered.text, tools), _weight(messages[i])) for i in wanted]

    def _all_but_weighted(
        self, messages: Sequence[Message], tools: Tools | None, text: str
    ) -> list[tuple[Span, float]]:
        """Everything at weight 1, but for the messages that have a weight of their own."""
        own = []
        for i, message in enumerate(messages):
            if _weight(message) != 1:
                own.append((self._turns.locate(messages, i, text, tools), _weight(message)))
        own.sort()
        edges = [0, *chain.from_iterable(span for span, _ in own), len(text)]
        rest = [(span, 1.0) for span in zip(edges[::2], edges[1::2], strict=True)]
        return rest + [(span, weight) for span, weight in own if weight]

    @cached_property
    def _turns(self) -> Turns:
        tokens = any_of(token.content for token in self._encoder.added.values())
        return Turns(self._render, self._source, tokens)

    # Tokens

    @cached_property
    def header_ids(self) -> list[int]:
        """What the template prints before an assistant's turn; empty if a prompt does not continue a conversation."""
        return self._encoder.backend.encode(self._turns.header, add_special_tokens=False).ids

    @cached_property
    def turn_end_ids(self) -> list[int]:
        """What it prints at the end of one, up to the last special token of it."""
        return self._encoder.backend.encode("".join(self._turns.end).lstrip(), add_special_tokens=False).ids

    @cached_property
    def vocab_size(self) -> int:
        """Ids are below it."""
        return len(self.tokenizer)


def _weight(message: Message) -> float:
    weight = message.get("loss_weight")
    return 1.0 if weight is None else float(weight)


def _images_of(messages: Sequence[Message]) -> list[ImageRef]:
    """The images of a conversation, in its order."""
    return list(chain.from_iterable(message.get("images", ()) for message in messages))


def _with_marks(message: Message, change: Callable[[str], str]) -> Message:
    """A message with every text in it changed, and marks in the place of its images, which are left out."""
    rest = {key: value for key, value in message.items() if key not in ("images", "content")}
    content = message.get("content")
    changed: dict[str, Any] = _map_strings(rest, change)
    if isinstance(content, str):
        changed["content"] = with_image_marks(content, change)
    elif "content" in message:
        changed["content"] = _map_strings(content, change)
    return changed


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same structure of lists and dicts with every string value changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, (dict, Mapping)):  # the first is quick to see
        return {key: _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value
