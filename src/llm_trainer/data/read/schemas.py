"""Rows as users have them -> the canonical kinds that training reads.

`SCHEMAS` is the list of everything that is understood. A schema says by which columns its rows are recognised, which
kind they are, and which function of `conversions.py` reads them. A new format is a function there and a line here.

Kinds: `text` `{"text"}`; `chat` `{"messages", "tools"}`; `completion` `{"prompt", "completion"}` (strings);
`preference` `{"prompt", "chosen", "rejected", "margin"}`; `unpaired` `{"prompt", "completion", "label"}`; `process`
`{"prompt", "completion", "steps", "right"}` (per step a text and a number in [0, 1]); `prompt` `{"prompt", "answer"}`;
`tokens` `{"input_ids", "labels"}`; `vision` `{"messages", "images", "answer"}`, where the text holds one `<image>` per
image: rows with images, for whoever takes none; those that take images read them by the other schemas, and `pictures.py` says
what stands where. Those with turns have `tools` besides, where the row has some.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from llm_trainer.data.read import conversions as read
from llm_trainer.data.read.conversions import Sample
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.messages import is_transcript, is_turns, tool_schemas
from llm_trainer.data.read.renaming import Renaming

Test = Callable[[Any], bool]
_MAY_CALL = ("chat", "preference", "unpaired", "process", "prompt")  # kinds of samples with turns
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
ROW = ""  # as a column: the row itself, for rows that are no objects


@dataclass(frozen=True)
class Schema:
    """One format of rows."""

    name: str  # what `get_schema` knows it by
    kind: str  # the canonical kind of its samples
    columns: Mapping[str, Test]  # column -> test that its value passes (None where it is missing); a row fits if all do
    convert: Callable[[Any, Location], Sample | list[Sample]]
    renaming: Renaming | None = None  # of the names in the rows of a file to those above

    def fits(self, row: Any) -> bool:
        """Whether a row looks like this format; its contents may still be wrong."""
        columns = dict(row) if isinstance(row, dict) else {}
        columns[ROW] = row
        return all(test(columns.get(key)) for key, test in self.columns.items())

    def samples(self, row: Any, location: Location) -> list[Sample]:
        """Every sample of a row: one, except for trees and tasks that hold several.

        Raises:
            DataError: the row is malformed; it names file, row and key.
            DroppedRow: the row is well formed but has nothing to teach; `reason` says why.
        """
        if self.renaming is not None:
            row, location = self.renaming(row, location)
        return self._samples(row, location)

    def known(self, row: Any, location: Location) -> Any:
        """The row with the columns that are renamed beside the file's own, for what else is read of it."""
        if self.renaming is None or not isinstance(row, dict):
            return row
        return {**row, **self.renaming(row, location)[0]}

    def _samples(self, row: Any, location: Location) -> list[Sample]:
        converted = self.convert(row, location)
        samples = converted if isinstance(converted, list) else [converted]
        # What a conversation may call stands beside it, whatever the schema reads of the other columns.
        given = row.get("tools") if isinstance(row, dict) else None
        tools = tool_schemas(given, location.at("tools")) if self.kind in _MAY_CALL else None
        if tools:
            samples = [{**sample, "tools": tools} for sample in samples]
        return samples

    def unread(self, rows: Iterable[tuple[Location, Any]]) -> list[str]:
        """Columns of some rows that are not read, as the file calls them.

        Raises:
            DataError: a column was renamed on purpose, and is not read.
        """
        found = dict[str, None]()  # in the order of the file
        read = {ROW, "weight", "loss_weight", *MEDIA, *self.columns}  # the first few are looked at in `data/unused.py`
        if self.kind == "process":
            read.add("weights")
        num_read = 0
        for location, row in rows:
            if not isinstance(row, dict):
                continue
            found |= dict.fromkeys(row)
            with suppress(DataError):
                if self.renaming is not None:
                    row, location = self.renaming(row, location)
                watched = _Watched(row)
                self._samples(watched, location)
                num_read += 1
                read |= watched.read
        if self.renaming is None:
            return [name for name in found if name not in read]
        for ours, theirs in self.renaming.whole_columns.items():
            if num_read and ours not in read:
                raise _never_read(self, ours, theirs, read - {ROW})
        return self.renaming.unread(found)


class _Watched(dict):
    """A row that knows which of its columns were asked for."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


def _never_read(schema: Schema, ours: str, theirs: str, read: set[str]) -> DataError:
    near = difflib.get_close_matches(ours, read, n=1)
    fix = f"did you mean {near[0]!r}?" if near else "leave it out, or name another format in data_loader_config.schema"
    found = f"columns.{ours} (the file's '{theirs}'), which rows of format '{schema.name}' do not have"
    return DataError(Location("data_loader_config"), found, f"one of {', '.join(sorted(read))}", fix, "unknown_column")


# --- tests of columns


has = dict[str, Test]  # columns, and what is true of their values


def is_absent(value: Any) -> bool:
    return value is None


def is_present(value: Any) -> bool:
    return value is not None


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def list_of(*types: type) -> Test:
    """A list with something in it, all of these types."""
    return lambda value: isinstance(value, list) and bool(value) and all(isinstance(item, types) for item in value)


def is_conversation(value: Any) -> bool:
    """Turns, or the JSON text of a list of objects, as tables store them."""
    return is_turns(value) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def is_prompt(value: Any) -> bool:
    return is_text(value) or is_turns(value)


def is_side(value: Any) -> bool:
    return is_prompt(value) or (isinstance(value, dict) and not {"role", "from"}.isdisjoint(value))


def is_label(value: Any) -> bool:
    return str(value).lower() in read.LABELS


def is_tree(value: Any) -> bool:
    return isinstance(value, dict) and {"text", "role", "replies"} <= value.keys()


def is_instances(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "output" in value[0]


def is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def has_images(row: Any) -> bool:
    """Whether a conversation has image parts, or a list of images beside it."""
    if not isinstance(row, dict):
        return False
    turns: list[Any] = []
    for key in (*read.TURN_COLUMNS, "prompt"):
        if is_turns(row.get(key)):
            turns += row[key]
    if turns and (row.get("images") or row.get("image")):
        return True
    return any(_shows_image(turn.get("content")) for turn in turns if isinstance(turn, dict))


def _shows_image(content: Any) -> bool:
    parts = content if isinstance(content, list) else []
    return any(isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in parts)


# --- the formats, most specific first: the first that fits is taken


def _schema(name: str, kind: str, columns: Mapping[str, Test], convert: Callable[..., Any], **names: Any) -> Schema:
    """A schema whose `convert` gets the names of the columns it reads."""
    return Schema(name, kind, columns, partial(convert, **names))


_PAIR = has(chosen=is_side, rejected=is_side)
_TURNS = has(conversations=is_conversation)
_MESSAGES = has(messages=is_conversation)
_LABEL = has(label=is_label)
_NO_LABEL = has(label=is_absent)
_TRUTH = has(ground_truth=is_present)
_QUESTION = has(question=is_text, answer=is_text)
_STACK = has(question=is_text, response_j=is_text, response_k=is_text)
_QUERY = has(query=is_text, response=is_text)
_QUERY_SIDES = {"ask": "query", "better": "response", "worse": "rejected_response"}
_PAIR_OF_DIALOGUES = has(chosen_messages=is_turns, rejected_messages=is_turns)
_MESSAGE_SIDES = {"better": "chosen_messages", "worse": "rejected_messages"}
_TWO_ANSWERS = has(answer_w=is_side, answer_l=is_side)
_ANSWER_SIDES = {"better": "answer_w", "worse": "answer_l"}
_DOLLY = has(instruction=is_text, response=is_text)
_answer = read.question_answer
_ENTRIES = (
    _schema("easy_vqa", "vision", {ROW: read.is_triple}, read.easy_vqa),
    _schema("vision", "vision", {ROW: has_images}, read.vision),
    _schema("hh", "preference", has(chosen=is_transcript, rejected=is_transcript), read.pair),
    _schema("preference_sharegpt", "preference", _TURNS | _PAIR, read.pair, ask="conversations"),
    _schema("preference_alpaca", "preference", has(instruction=is_text) | _PAIR, read.pair, ask="instruction"),
    _schema("preference", "preference", has(prompt=is_prompt) | _PAIR, read.pair),
    _schema("preference_question", "preference", has(question=is_prompt) | _PAIR, read.pair, ask="question"),
    _schema("preference_context", "preference", has(context=is_prompt) | _PAIR, read.pair, ask="context"),
    _schema("preference_dialogues", "preference", has(chosen=is_turns, rejected=is_turns), read.pair),
    _schema("preference_messages", "preference", _PAIR_OF_DIALOGUES, read.pair, **_MESSAGE_SIDES),
    *(
        _schema(f"answers_{ask}", "preference", {ask: is_prompt} | _TWO_ANSWERS, read.pair, ask=ask, **_ANSWER_SIDES)
        for ask in read.ASKING
    ),
    _schema("query_rejected", "preference", _QUERY | has(rejected_response=is_text), read.pair, **_QUERY_SIDES),
    _schema("stack_exchange", "preference", _STACK, read.pair, ask="question", better="response_j", worse="response_k"),
    _schema("kto", "unpaired", _MESSAGES | _LABEL, read.unpaired, key="messages"),
    _schema("kto_sharegpt", "unpaired", _TURNS | _LABEL, read.unpaired, key="conversations"),
    _schema("kto_prompt", "unpaired", has(prompt=is_prompt, completion=is_side) | _LABEL, read.unpaired, key="prompt"),
    _schema(
        "stepwise",
        "process",
        has(prompt=is_prompt, completions=list_of(str), labels=list_of(int, float)),
        read.stepwise,
    ),
    _schema("verl", "prompt", has(prompt=is_prompt, reward_model=read.is_graded), read.verl),
    _schema("rlvr", "prompt", _MESSAGES | _TRUTH, read.prompt_row, key="messages", answer="ground_truth"),
    _schema("mt_bench", "prompt", has(turns=list_of(str)), read.mt_bench),
    _schema("oasst", "chat", has(prompt=is_tree), read.tree, best=True),
    _schema("oasst_all_paths", "chat", has(prompt=is_tree), read.tree, best=False),
    _schema("interleaved", "text", has(messages=read.is_pretraining), read.interleaved),
    _schema("sharegpt", "chat", _TURNS | has(chosen=is_absent) | _NO_LABEL, read.conversation, key="conversations"),
    _schema("messages", "chat", _MESSAGES | _NO_LABEL, read.conversation, key="messages"),
    _schema("exchanges", "chat", has(conversation=read.is_exchanges), read.exchanges),
    _schema(
        "conversation", "chat", has(conversation=is_conversation) | _NO_LABEL, read.conversation, key="conversation"
    ),
    _schema("message_list", "chat", {ROW: is_turns}, read.bare_conversation),
    _schema("seed_tasks", "chat", has(instruction=is_text, instances=is_instances), read.seed_task),
    _schema("alpaca", "chat", has(instruction=is_text, output=is_text), _answer, ask="instruction", answer="output"),
    _schema("dolly", "chat", _DOLLY, _answer, ask="instruction", answer="response", context="context"),
    _schema("question_answer", "chat", _QUESTION, _answer, ask="question", answer="answer", context="context"),
    _schema("query_response", "chat", _QUERY, _answer, ask="query", answer="response"),
    _schema("prompt_response", "chat", has(prompt=is_text, response=is_text), _answer, ask="prompt", answer="response"),
    _schema("mbpp", "chat", has(text=is_text, code=is_text), _answer, ask="text", answer="code"),
    _schema("prompt_completion_turns", "chat", has(prompt=is_turns, completion=is_side), read.completed_turns),
    _schema("prompt_completion", "completion", has(prompt=is_text, completion=is_text), read.completion),
    _schema("question_prompt", "prompt", _QUESTION, read.question_prompt),
    _schema("prompt", "prompt", has(prompt=is_prompt), read.prompt_row),
    _schema("token_ids", "tokens", has(input_ids=is_ids), read.token_ids),
    _schema("paragraphs", "text", has(paragraphs=list_of(str)), read.passages, key="paragraphs"),
    _schema("content_lines", "text", has(content=list_of(str)), read.passages, key="content"),
    _schema("text", "text", has(text=is_text, code=is_absent), read.text_row),
    _schema("content", "text", has(content=is_text, role=is_absent), read.text_row, key="content"),
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
    names = list(known)
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise ValueError(f"unknown {what} {name!r}; did you mean {nearest!r}? known: {', '.join(names)}")
