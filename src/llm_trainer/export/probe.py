"""A probe: what a model was asked and what it answered, so that whatever is made of it later can be asked the same.

`Asked` is whatever can be asked: the model as it trains (`train/probing.py`), a folder opened by transformers
(`export/opened.py`), or a file that another program reads. `record` asks it everything once and gives a `Probe`; of an
export the same `record` is made, with the questions of the first one, and `export/gate.py` compares the two.

A format whose exports transformers does not open brings an `Asked` of its own: six methods, in terms of ids and text.
One that cannot be asked something (a runtime without chat templates) says None there, and the gate says what it did not
compare. What is shown to models that see stands in `pictures.py`: who can be shown pictures has a `Sight`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from llm_trainer.export.pictures import LONGEST_LOOK, PICTURES, SHOWINGS, Look, Numbers, Showing, Shown, golden_step

FILE = "probe.json"
VERSION = 1
TEXTS = (
    "",
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces before, a tab\tand\n\ntwo ends of lines \n",
    "0123456789 3.14159 1,000,000 2026-11-22 -7e-3",
    "\u6c49\u5b57\u3068\u304b\u306a\u3068\ud55c\uae00\uff0c\u5168\u89d2\uff01",
    "na\u00efve caf\u00e9 \u2014 \u201cquoted\u201d \u2026 \U0001f98a\U0001f469\u200d\U0001f680 \u0301",
    "def f(x):\n    return x ** 2  # a comment\n",
)
MOST_TOKENS = 32  # special and added ones that are looked for in a text; some tokenizers have thousands
LONGEST_ROW, NUM_DRAWN = 128, 128  # tokens
ANSWER_TOKENS = 8


class Conversation(NamedTuple):
    """What a template is asked to print.

    Attributes:
        messages: as `data/read/schemas.py` has them.
        add_generation_prompt: the text ends where the assistant begins to write.
        enable_thinking: what the template is told of it; None: nothing.
    """

    messages: list[dict[str, str]]
    add_generation_prompt: bool
    enable_thinking: bool | None = None


_ASKED = {"role": "user", "content": "What is 17 + 25?"}
_TOLD = {"role": "assistant", "content": "42"}
_THOUGHT = {"role": "assistant", "content": "42", "reasoning_content": "17 + 25\n= 42"}
CONVERSATIONS = (
    Conversation([_ASKED], add_generation_prompt=True),
    Conversation([{"role": "system", "content": "Answer briefly."}, _ASKED], add_generation_prompt=True),
    Conversation([_ASKED, _TOLD], add_generation_prompt=False),
    Conversation([_ASKED, _TOLD, {"role": "user", "content": "  \u518d\u6765\n"}], add_generation_prompt=True),
    Conversation([_ASKED, _THOUGHT], add_generation_prompt=False),
    Conversation([_ASKED], add_generation_prompt=True, enable_thinking=False),
)


class Rendered(NamedTuple):
    """A conversation as a template prints it, and the ids of that text."""

    text: str
    ids: list[int]


class Greedy(NamedTuple):
    """An answer of the likeliest tokens.

    Attributes:
        ids: with the stop token that ended it, if one did.
        margins: of each, in nats: how far the second likeliest token was behind.
    """

    ids: list[int]
    margins: list[float]


class Sight(Protocol):
    """What of an `Asked` can be shown pictures, each given by height and width (`pictures.draw`)."""

    def numbers(self, height: int, width: int) -> Numbers:
        """What its processor makes of a picture."""

    def show(self, showing: Showing, pictures: Sequence[Sequence[int]]) -> Shown | None:
        """What a model is given of a showing; None: there is no template, or this one refuses such a conversation."""

    def look(self, showing: Showing, pictures: Sequence[Sequence[int]]) -> Look:
        """What the model makes of it; an error is part of that, and not raised."""


class Asked(Protocol):
    """Something that answers as a model would, whatever program has it open."""

    @property
    def sight(self) -> Sight | None:
        """None: it cannot be shown pictures."""

    def tokenise(self, text: str) -> list[int] | None:
        """Ids of a plain text, as its tokenizer makes them when nobody says more: with a BOS if it adds one."""

    def render(self, conversation: Conversation) -> Rendered | None:
        """The conversation in the chat template; None: it has no template, or this one refuses such a conversation."""

    def stop_token_ids(self) -> list[int] | None:
        """Ids after which it writes no more."""

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Of every token but the first of each row, its log-probability after those before it, in nats."""

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Greedy] | None:
        """Answers of the likeliest tokens, each up to a stop token."""

    def facts(self) -> dict[str, Any]:
        """What else is compared, where both sides say it: see `Probe.facts`."""


@dataclass(frozen=True)
class Questions:
    """What is asked; texts and conversations are part of it, so that they may change without older probes being lost.

    Attributes:
        texts: to be tokenised.
        conversations: to be printed.
        rows: ids `[T]` whose log-probabilities are asked.
        prompts: ids that are to be answered.
        pictures: height and width of each.
        showings: texts and conversations with these in them.
    """

    texts: list[str]
    conversations: list[Conversation]
    rows: list[list[int]]
    prompts: list[list[int]]
    pictures: list[list[int]] = field(default_factory=list)
    showings: list[Showing] = field(default_factory=list)


@dataclass(frozen=True)
class Probe:
    """Questions and answers.

    Attributes:
        questions: what was asked.
        text_ids: of each text.
        rendered: each conversation; None: the template refuses it, or there is none.
        stop_token_ids: in order; None: not known.
        logprobs: of each row, one fewer than its ids.
        answers: to each prompt.
        numbers: that the processor makes of each picture; None: it cannot be shown any.
        looks: at each showing.
        facts: `settings` (of its config.json, by which it computes), `tied` (head and embeddings are one matrix), and what
            else an `Asked` says; what both sides say is compared.
        precision: that products were computed in: 'fp32', 'bf16' or 'fp16'.
        made: of what and where, for people: `from` ('training', or 'the reopened checkpoint'), `step`, `engine`.
    """

    questions: Questions
    text_ids: list[list[int] | None]
    rendered: list[Rendered | None]
    stop_token_ids: list[int] | None
    logprobs: list[list[float]]
    answers: list[Greedy] | None
    facts: dict[str, Any]
    numbers: list[Numbers] | None = None
    looks: list[Look] | None = None
    precision: str = "fp32"
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def was_trained(self) -> bool:
        """Whether it was the model in training that answered, and not what was saved of it."""
        return bool(self.made.get("from") == "training")

    def as_json(self) -> str:
        return json.dumps({"version": VERSION, **asdict(self)}, ensure_ascii=False)


def drawn_ids(num_ids: int) -> list[int]:
    """Ids below `num_ids`, spread over all of them; the same for the same number."""
    step = golden_step(num_ids)
    return [number * step % num_ids for number in range(min(NUM_DRAWN, num_ids))]


def questions_for(
    asked: Asked, special_tokens: Sequence[str] | None, vocab_size: int, context: int | None
) -> Questions:
    """What a model is asked, by its tokenizer and size; the same for the same model.

    Args:
        asked: by whom texts become ids.
        special_tokens: special and added ones, each of which stands once in a text; None: there is no tokenizer.
        vocab_size: rows of the embeddings. One row of ids is spread over them, to reach those that no text leads to.
        context: the most tokens that the model takes.
    """
    limit = min(LONGEST_ROW, context or LONGEST_ROW)
    texts: list[str] = []
    conversations: list[Conversation] = []
    if special_tokens is not None:
        texts, conversations = list(TEXTS), list(CONVERSATIONS)
        texts.append("".join(f"x{token}" for token in special_tokens[:MOST_TOKENS]))
    joined: list[int] = []
    for text in texts:
        joined += asked.tokenise(text) or []
    printed = [found for found in map(asked.render, conversations) if found is not None]
    rows = [joined, drawn_ids(vocab_size)]
    if printed:
        rows.append(max((one.ids for one in printed), key=len))
    rows = [row[:limit] for row in rows if len(row) > 1]
    room = max(1, limit - ANSWER_TOKENS)
    prompts = []
    if printed:
        prompts.append(printed[0].ids[-room:])
    elif joined:
        prompts.append(joined[: min(16, room)])
    found = Questions(texts, conversations, rows, prompts)
    return found if asked.sight is None else with_pictures(found, asked.sight, context)


def with_pictures(questions: Questions, sight: Sight, context: int | None) -> Questions:
    """The same questions, and what is asked of pictures."""
    pictures = [list(size) for size in PICTURES]
    limit = min(LONGEST_LOOK, context or LONGEST_LOOK) - ANSWER_TOKENS
    showings, lengths = list[Showing](), list[tuple[bool, int]]()
    for showing in SHOWINGS:
        shown = sight.show(showing, pictures)
        if shown is not None and len(shown.ids) <= limit:
            showings.append(showing)
            lengths.append((not showing.add_generation_prompt, len(shown.ids)))
    if showings:  # an answer takes a forward for every token of it
        place = lengths.index(min(lengths))
        showings[place] = showings[place]._replace(num_answered=ANSWER_TOKENS)
    return replace(questions, pictures=pictures, showings=showings)


def record(asked: Asked, questions: Questions, precision: str = "fp32", made: Mapping[str, Any] | None = None) -> Probe:
    """Ask all questions."""
    answers: list[Greedy] | None = []
    if questions.prompts:
        answers = asked.greedy(questions.prompts, ANSWER_TOKENS)
    stops = asked.stop_token_ids()
    if stops is not None:
        stops = sorted(set(stops))
    numbers: list[Numbers] | None = None
    looks: list[Look] | None = None
    if asked.sight is not None:
        pictures = questions.pictures
        numbers = [asked.sight.numbers(*size) for size in pictures]
        looks = [asked.sight.look(showing, pictures) for showing in questions.showings]
    return Probe(
        questions=questions,
        text_ids=[asked.tokenise(text) for text in questions.texts],
        rendered=[asked.render(conversation) for conversation in questions.conversations],
        stop_token_ids=stops,
        logprobs=asked.logprobs(questions.rows),
        answers=answers,
        facts=asked.facts(),
        numbers=numbers,
        looks=looks,
        precision=precision,
        made=dict(made or {}),
    )


def write_probe(probe: Probe, folder: Path) -> None:
    """Put it beside a model."""
    (folder / FILE).write_text(probe.as_json(), encoding="utf-8")


def read_probe(folder: Path) -> Probe | None:
    """The probe beside a model; None: there is none.

    Raises:
        ValueError: there is one that this version cannot read.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("version") != VERSION:
            raise ValueError("its version is another")
        return _of_json(content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: not a probe of this version ({error}); expected version {VERSION}. Without the file, a probe is made "
            f"of the reopened checkpoint"
        ) from None


def _of_json(content: dict[str, Any]) -> Probe:
    asked = content.pop("questions")
    conversations = [Conversation(*one) for one in asked.pop("conversations")]
    showings = [Showing(*one) for one in asked.pop("showings", ())]
    rendered = [None if one is None else Rendered(*one) for one in content.pop("rendered")]
    answers = content.pop("answers")
    if answers is not None:
        answers = [Greedy(*one) for one in answers]
    looks = content.pop("looks", None)
    if looks is not None:
        looks = [Look(Shown(*shown), *rest) for shown, *rest in looks]
    questions = Questions(conversations=conversations, showings=showings, **asked)
    return Probe(questions, rendered=rendered, answers=answers, looks=looks, **content)
