"""Rows as users have them -> the canonical kinds that training reads.

`SCHEMAS` is the list of everything that is understood. A schema says by which columns its rows are recognised, which
kind they are, and which function of `conversions.py` reads them. A new format is a function there and a line here.

Kinds: `text` `{"text"}`; `chat` `{"messages", "tools"}`; `completion` `{"prompt", "completion"}` (strings);
`preference` `{"prompt", "chosen", "rejected", "margin"}`; `unpaired` `{"prompt", "completion", "label"}`; `process`
`{"prompt", "completion", "steps", "right"}` (per step a text and a number in [0, 1]); `prompt` `{"prompt", "answer"}`;
`tokens` `{"input_ids", "labels"}`; `vision` `{"messages", "images", "answer"}`, where the text holds one `<image>` per
image.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from llm_trainer.data.read import conversions as read
from llm_trainer.data.read.conversions import Sample
from llm_trainer.data.read.errors import DataError, Location, show
from llm_trainer.data.read.messages import is_transcript, is_turns

Test = Callable[[Any], bool]
ROW = ""  # as a column: the row itself, for rows that are no objects


@dataclass(frozen=True)
class Schema:
    """One format of rows.

    Attributes:
        name: what `get_schema` knows it by.
        kind: the canonical kind of its samples.
        columns: column -> test that its value passes (None where the row lacks it); a row fits when all do.
        convert: row, location -> its sample, or a list of samples.
    """

    name: str
    kind: str
    columns: Mapping[str, Test]
    convert: Callable[[Any, Location], Sample | list[Sample]]

    def fits(self, row: Any) -> bool:
        """Whether a row looks like this format; its contents may still be wrong."""
        values = {key: row if key == ROW else row.get(key) if isinstance(row, dict) else None for key in self.columns}
        return all(test(values[key]) for key, test in self.columns.items())

    def samples(self, row: Any, location: Location) -> list[Sample]:
        """Every sample of a row: one, except for trees and tasks that hold several.

        Raises:
            DataError: the row is malformed; it names file, row and key.
            DroppedRow: the row is well formed but has nothing to teach; `reason` says why.
        """
        converted = self.convert(row, location)
        return converted if isinstance(converted, list) else [converted]

    def normalise(self, row: Any, location: Location) -> Sample:
        """The sample of a row that holds one; use `samples` for formats whose rows hold several."""
        samples = self.samples(row, location)
        if len(samples) != 1:
            raise DataError(location, f"{len(samples)} samples in one row", "one", "read the row with Schema.samples")
        return samples[0]


# --- tests of columns


def has(**columns: Test) -> dict[str, Test]:
    """Columns and what is true of their values."""
    return columns


def is_absent(value: Any) -> bool:
    return value is None


def is_present(value: Any) -> bool:
    return value is not None


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value)


def is_conversation(value: Any) -> bool:
    """Turns, or the JSON text of a list of objects, as tables store them."""
    return is_turns(value) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def is_prompt(value: Any) -> bool:
    return is_text(value) or is_turns(value)


def is_side(value: Any) -> bool:
    return is_prompt(value) or (isinstance(value, dict) and not {"role", "from"}.isdisjoint(value))


def is_label(value: Any) -> bool:
    return str(value).lower() in read.LABELS


def is_judgement(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, int | float) for item in value)


def is_tree(value: Any) -> bool:
    return isinstance(value, dict) and {"text", "role", "replies"} <= value.keys()


def is_instances(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "output" in value[0]


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def is_message_list(row: Any) -> bool:
    return isinstance(row, list) and is_turns(row)


def has_images(row: Any) -> bool:
    """Whether a conversation has image parts, or a list of images beside it."""
    columns: list[Any] = [row.get(key) for key in (*read.CONVERSATIONS, "prompt")] if isinstance(row, dict) else []
    turns = [turn for column in columns if is_turns(column) for turn in column]
    if not turns:
        return False
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    is_part = any(isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in parts)
    return is_part or bool(row.get("images")) or bool(row.get("image"))


# --- the formats, most specific first: the first that fits is taken


_PAIR = has(chosen=is_side, rejected=is_side)
_answer = read.question_answer
_ENTRIES = (
    Schema("easy_vqa", "vision", {ROW: read.is_triple}, read.easy_vqa),
    Schema("vision", "vision", {ROW: has_images}, read.vision),
    Schema("hh", "preference", has(chosen=is_transcript, rejected=is_transcript), read.pair),
    Schema(
        "preference_sharegpt",
        "preference",
        has(conversations=is_conversation) | _PAIR,
        partial(read.pair, ask="conversations"),
    ),
    Schema("preference_alpaca", "preference", has(instruction=is_text) | _PAIR, partial(read.pair, ask="instruction")),
    Schema("preference", "preference", has(prompt=is_prompt) | _PAIR, read.pair),
    Schema("preference_dialogues", "preference", has(chosen=is_turns, rejected=is_turns), read.pair),
    Schema(
        "stack_exchange",
        "preference",
        has(question=is_text, response_j=is_text, response_k=is_text),
        partial(read.pair, ask="question", better="response_j", worse="response_k"),
    ),
    Schema("kto", "unpaired", has(messages=is_conversation, label=is_label), partial(read.unpaired, key="messages")),
    Schema(
        "kto_sharegpt",
        "unpaired",
        has(conversations=is_conversation, label=is_label),
        partial(read.unpaired, key="conversations"),
    ),
    Schema(
        "kto_prompt",
        "unpaired",
        has(prompt=is_prompt, completion=is_side, label=is_label),
        partial(read.unpaired, key="prompt"),
    ),
    Schema("stepwise", "process", has(prompt=is_prompt, completions=is_strings, labels=is_judgement), read.stepwise),
    Schema("verl", "prompt", has(prompt=is_prompt, reward_model=read.is_graded), read.verl),
    Schema(
        "rlvr",
        "prompt",
        has(messages=is_conversation, ground_truth=is_present),
        partial(read.prompt_row, key="messages", answer="ground_truth"),
    ),
    Schema("mt_bench", "prompt", has(turns=is_strings), read.mt_bench),
    Schema("oasst", "chat", has(prompt=is_tree), partial(read.tree, best=True)),
    Schema("oasst_all_paths", "chat", has(prompt=is_tree), partial(read.tree, best=False)),
    Schema(
        "sharegpt",
        "chat",
        has(conversations=is_conversation, chosen=is_absent, label=is_absent),
        partial(read.conversation, key="conversations"),
    ),
    Schema(
        "messages", "chat", has(messages=is_conversation, label=is_absent), partial(read.conversation, key="messages")
    ),
    Schema("message_list", "chat", {ROW: is_message_list}, read.bare_conversation),
    Schema("seed_tasks", "chat", has(instruction=is_text, instances=is_instances), read.seed_task),
    Schema(
        "alpaca", "chat", has(instruction=is_text, output=is_text), partial(_answer, ask="instruction", answer="output")
    ),
    Schema(
        "dolly",
        "chat",
        has(instruction=is_text, response=is_text),
        partial(_answer, ask="instruction", answer="response", context="context"),
    ),
    Schema(
        "question_answer",
        "chat",
        has(question=is_text, answer=is_text),
        partial(_answer, ask="question", answer="answer"),
    ),
    Schema(
        "prompt_response",
        "chat",
        has(prompt=is_text, response=is_text),
        partial(_answer, ask="prompt", answer="response"),
    ),
    Schema("mbpp", "chat", has(text=is_text, code=is_text), partial(_answer, ask="text", answer="code")),
    Schema("prompt_completion_turns", "chat", has(prompt=is_turns, completion=is_side), read.completed_turns),
    Schema("prompt_completion", "completion", has(prompt=is_text, completion=is_text), read.completion),
    Schema("question_prompt", "prompt", has(question=is_text, answer=is_text), read.question_prompt),
    Schema("prompt", "prompt", has(prompt=is_prompt), read.prompt_row),
    Schema("token_ids", "tokens", has(input_ids=is_ids), read.token_ids),
    Schema("paragraphs", "text", has(paragraphs=is_strings), partial(read.passages, key="paragraphs")),
    Schema("content_lines", "text", has(content=is_strings), partial(read.passages, key="content")),
    Schema("text", "text", has(text=is_text, code=is_absent), read.text_row),
    Schema("content", "text", has(content=is_text, role=is_absent), partial(read.text_row, key="content")),
)
SCHEMAS: dict[str, Schema] = {schema.name: schema for schema in _ENTRIES}


def get_schema(name: str) -> Schema:
    """The schema of that name, for data whose format should not be guessed.

    Raises:
        ValueError: unknown; names the nearest.
    """
    return SCHEMAS[known_name(name, SCHEMAS, "data format")]


def known_name(name: str, known: Iterable[str], what: str) -> str:
    """`name` itself, if it is one of `known`.

    Raises:
        ValueError: it is not; names the nearest.
    """
    if name in (names := list(known)):
        return name
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown {what} {name!r}; did you mean {nearest!r}? known: {', '.join(names)}")


def recognise(rows: Iterable[tuple[Location, Any]], accepts: Sequence[str] = ()) -> Schema:
    """The format of a sample of rows: the first of `SCHEMAS` that more than half of them fit.

    Half, so that a bad row is reported as a bad row of its format and does not change what the others are.

    Args:
        rows: a few rows from the start of the data, as `read_rows` yields them.
        accepts: canonical kinds that are wanted, the most wanted first: alpaca rows with a rendered `text` are text to
            whoever wants `text`. A format of another kind is returned where none of these fits, and for rows with
            images, which are nothing else without them.

    Raises:
        DataError: no format fits (names the nearest).
        ValueError: no rows.
    """
    sample: Sequence[tuple[Location, Any]] = list(rows)
    if not sample:
        raise ValueError("no rows to recognise a format by; give at least one")
    fitting = [s for s in SCHEMAS.values() if 2 * sum(s.fits(row) for _, row in sample) > len(sample)]
    if not fitting:
        raise _unrecognised(*sample[0])
    wanted = [schema for kind in accepts for schema in fitting if schema.kind == kind]
    if not wanted or fitting[0].kind == "vision":
        return fitting[0]
    return wanted[0]


def _unrecognised(location: Location, row: Any) -> DataError:
    if not isinstance(row, dict):
        expected = "an object, or a list of messages"
        return DataError(
            location, show(row), expected, "give every row the columns of a known format", "unknown_format"
        )
    named = {name: [key for key in schema.columns if key != ROW] for name, schema in SCHEMAS.items()}
    overlap = {name: len({*keys} & row.keys()) / len(keys) for name, keys in named.items() if keys}
    nearest = sorted(overlap, key=lambda name: -overlap[name])[:3]
    formats = "; ".join(f"'{name}' ({', '.join(named[name])})" for name in nearest)
    found, expected = f"the columns {', '.join(row) or '(none)'}", f"a known format, such as {formats}"
    return DataError(location, found, expected, "rename the columns, or name the format yourself", "unknown_format")
