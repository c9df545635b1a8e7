"""One row of a format -> its sample or samples; `schemas.py` says which function reads which schema.

Every function takes the row and its `Location`, and raises `DataError` for a malformed row or `DroppedRow` for one that
has nothing to teach.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llm_trainer.config.errors import counted
from llm_trainer.data.read.errors import DataError, DroppedRow, Location, show
from llm_trainer.data.read.messages import (
    IMAGE,
    ROLE_ALIASES,
    Message,
    answered,
    asked,
    assistant,
    field,
    is_empty,
    is_transcript,
    list_field,
    message,
    messages,
    read_only,
    text,
    text_field,
    tool_schemas,
    transcript,
    up_to_last_answer,
    user,
)
from llm_trainer.data.read.pictures import all_images, images_of, with_images, without_images
from llm_trainer.data.read.renaming import TURN_COLUMNS

Sample = dict[str, Any]
ASKING = ("prompt", "question", "context")  # columns whose plain text is the user's
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # tables hold text


# --- text


def text_row(row: Any, location: Location, key: str = "text") -> Sample:
    """A column of plain text."""
    return _some_text(text_field(row, key, location), location.at(key))


def _some_text(value: str, location: Location) -> Sample:
    if not value.strip():
        raise DroppedRow(location, "an empty text", "text", "fill or delete the row", "empty_text")
    return {"text": value}


def passages(row: Any, location: Location, key: str) -> Sample:
    """A title (or what stands for it) and the paragraphs, one per line."""
    lines = [text(line, location.at(key).at(i)) for i, line in enumerate(list_field(row, key, location))]
    titles = [row[name] for name in ("title", "rhythmic", "chapter") if isinstance(row.get(name), str)]
    return _some_text("\n".join(titles[:1] + lines), location)


def token_ids(row: Any, location: Location) -> Sample:
    """Ids of a tokenizer, and labels (-100: not trained on) where the row has them."""
    ids, labels = field(row, "input_ids", location), row.get("labels")
    for key, values in (("input_ids", ids), ("labels", labels or [])):
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise DataError(location.at(key), show(values), "a list of integers", "store token ids", "wrong_type")
    if labels is not None and len(labels) != len(ids):
        found = f"{counted(len(labels), 'label')} for {counted(len(ids), 'id')}"
        raise DataError(location.at("labels"), found, "one label per id", "repair the row")
    return {"input_ids": ids, "labels": labels}


# --- conversations


def _chat(turns: list[Message], location: Location, tools: list[dict] | None = None) -> Sample:
    return {"messages": answered(turns, location), "tools": tools}


def _system(row: Mapping[str, Any], location: Location) -> list[Message]:
    """A system column, where the row has one that says something."""
    return [{"role": "system", "content": text_field(row, "system", location)}] if row.get("system") else []


def conversation(row: Any, location: Location, key: str) -> Sample:
    """A column of turns, with the `system` and `tools` columns beside it."""
    turns = messages(field(row, key, location), location.at(key))
    return _chat(_system(row, location) + turns, location, tool_schemas(row.get("tools"), location.at("tools")))


def bare_conversation(row: Any, location: Location) -> Sample:
    """A row that is a list of turns."""
    return _chat(messages(row, location), location)


def _instruction(row: Any, location: Location, ask: str, context: str) -> list[Message]:
    """A user turn from an instruction and, on the next line, the input it works on, after system and history."""
    turns = _system(row, location)
    history = list_field(row, "history", location) if row.get("history") else []
    for i, pair in enumerate(history):
        here = location.at("history").at(i)
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(here, show(pair), "[question, answer]", "repair the history", "wrong_type")
        turns += [user(text(pair[0], here.at(0))), assistant(text(pair[1], here.at(1)))]
    given = text(row.get(context) or "", location.at(context))
    return [*turns, _question(text_field(row, ask, location), given)]


def _question(instruction: str, given: str) -> Message:
    return user("\n".join(part for part in (instruction, given) if part))


def question_answer(row: Any, location: Location, ask: str, answer: str, context: str = "input") -> Sample:
    """A question column, perhaps with the input it works on, and an answer column."""
    reply = assistant(text_field(row, answer, location))
    return _chat([*_instruction(row, location, ask, context), reply], location)


_EXCHANGES = (("human", "assistant"), ("input", "output"), ("query", "response"))  # keys of a question and its answer


def exchanges(row: Any, location: Location, key: str = "conversation") -> Sample:
    """A list of questions with their answers: `{"human", "assistant"}`, or `{"input", "output"}`, perhaps with `system`."""
    listed = list_field(row, key, location)
    turns = _system(row, location)
    for i, exchange in enumerate(listed):
        here = location.at(key).at(i)
        known = [pair for pair in _EXCHANGES if isinstance(exchange, dict) and pair[0] in exchange]
        ask, answer = known[0] if known else _EXCHANGES[0]
        turns += [user(text_field(exchange, ask, here)), assistant(text_field(exchange, answer, here))]
        turns[-2:-2] = _system(exchange, here)
    return _chat(turns, location, tool_schemas(row.get("tools"), location.at("tools")))


def is_exchanges(value: Any) -> bool:
    """Whether a value is a list of questions with their answers, judged by the first."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and any(set(pair) <= first.keys() for pair in _EXCHANGES)


def seed_task(row: Any, location: Location) -> list[Sample]:
    """The answers are in `instances`: a sample for each."""
    samples = []
    instruction = text_field(row, "instruction", location)
    for i, instance in enumerate(list_field(row, "instances", location)):
        here = location.at("instances").at(i)
        answer = assistant(text_field(instance, "output", here))
        given = text(instance.get("input") or "", here.at("input"))
        samples.append(_chat([_question(instruction, given), answer], here))
    return samples


def completion(row: Any, location: Location) -> Sample:
    """Two strings that are joined as they are, without a chat template."""
    prompt, completion = (text_field(row, key, location) for key in ("prompt", "completion"))
    if not completion.strip():
        raise DroppedRow(location.at("completion"), "an empty completion", "text", "delete it", "empty_answer")
    return {"prompt": prompt, "completion": completion}


def completed_turns(row: Any, location: Location) -> Sample:
    """Only the completion is trained on, so earlier answers in the prompt weigh nothing."""
    prompt, completion = (_side(row, key, location) for key in ("prompt", "completion"))
    return _chat([*read_only(prompt), *completion], location)


# --- Open Assistant trees: a node is {"text", "role", "rank", "replies": [node]}


def _tree_paths(node: Any, location: Location, before: list[Message], best: bool) -> Iterator[list[Message]]:
    """Paths from the root to an assistant node below which no other is, so that each ends on an answer.

    Args:
        best: follow only the best reply: the lowest `rank` (0 is best, unranked last), then one that was replied to.
    """
    role = text_field(node, "role", location)
    if role not in ROLE_ALIASES:
        alias = f"the role {show(role)}"
        raise DataError(location.at("role"), alias, "prompter or assistant", "rename it", "unknown_role")
    turn: Message = {"role": ROLE_ALIASES[role], "content": text_field(node, "text", location)}
    path, is_answered = [*before, turn], False
    replies = list_field(node, "replies", location) if node.get("replies") else []
    # the best reply sorts first
    order = []
    for i, reply in enumerate(replies):
        here = location.at("replies").at(i)
        text_field(reply, "role", here)
        if not reply.get("deleted"):
            order.append((_rank(reply, here), not reply.get("replies"), i))
    order.sort()
    if best:
        order = order[:1]
    for _, _, i in order:
        for found in _tree_paths(replies[i], location.at("replies").at(i), path, best):
            is_answered = True
            yield found
    if not is_answered and turn["role"] == "assistant":
        yield path


def _rank(node: Mapping[str, Any], location: Location) -> float:
    rank = node.get("rank")
    if rank is not None and not isinstance(rank, int | float):
        raise DataError(location.at("rank"), show(rank), "a number", "repair the tree", "wrong_type")
    return float("inf") if rank is None else rank


def tree(row: Any, location: Location, best: bool) -> list[Sample]:
    """The best path of a tree of replies, or all of its paths, each a conversation that ends on an answer."""
    root = location.at("prompt")
    paths = list(_tree_paths(field(row, "prompt", location), root, [], best))
    if not paths:
        raise DroppedRow(root, "a tree without answers", "an assistant reply", "delete the row", "empty_answer")
    return [_chat(path, root) for path in paths]


# --- preferences


def _side(row: Any, key: str, location: Location) -> list[Message]:
    """A prompt, an answer or a dialogue, written as a string, a turn, a list of turns or a transcript.

    A string is text even if it is JSON (an answer may well be), except in the columns of `TURN_COLUMNS`.
    """
    value, here = field(row, key, location), location.at(key)
    if isinstance(value, dict):
        return [message(value, here)]
    if is_transcript(value):
        return transcript(value, here)
    if isinstance(value, list) or key in TURN_COLUMNS:
        return messages(value, here)
    turn = user if key in ASKING else assistant
    return [turn(text(value, here))]


def pair(row: Any, location: Location, ask: str = "prompt", better: str = "chosen", worse: str = "rejected") -> Sample:
    """A prompt and two answers.

    A side that starts with an assistant turn answers the prompt column. A side that starts with another turn is a
    dialogue and repeats its prompt. Turns after a side's last answer are cut; the turns both sides share are (the end
    of) the prompt; what follows, from an assistant turn on, is compared. Dialogues that part at a user's turn
    compare answers to different questions and are dropped, as are ties, equal sides and empty sides.
    """
    sides = []
    for name, key in (("chosen", better), ("rejected", worse)):
        side = up_to_last_answer(_side(row, key, location))
        if is_empty(side[-1:]):
            raise DroppedRow(location.at(key), "an empty answer", "text", "delete the row", f"empty_{name}")
        sides.append(side)
    chosen, rejected = sides
    if chosen == rejected:
        raise DroppedRow(location, "two equal answers", "different ones", "delete the row", "identical")
    # 1. what both sides begin with belongs to the prompt
    different = [i for i, (a, b) in enumerate(zip(*sides, strict=False)) if a != b]
    shared = different[0] if different else min(len(chosen), len(rejected))
    repeats_prompt = chosen[0]["role"] != "assistant"
    before = _system(row, location) if repeats_prompt else _asked_by(row, ask, location)
    prompt = before + chosen[:shared]
    # 2. the rest is compared
    chosen, rejected = chosen[shared:], rejected[shared:]
    if not chosen or not rejected:
        raise DroppedRow(location, "an answer that only goes on", "two answers", "delete the row", "continuation")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        raise DroppedRow(location, "answers to different prompts", "one prompt", "delete the row", "prompts_differ")
    return {"prompt": asked(prompt, location), "chosen": chosen, "rejected": rejected, "margin": _margin(row, location)}


def _asked_by(row: Any, key: str, location: Location) -> list[Message]:
    if key in ("instruction", "query"):
        return _instruction(row, location, key, "input")
    if key == "question" and isinstance(row.get(key), str):
        return _instruction(row, location, key, "context")
    return _system(row, location) + _side(row, key, location)


def _margin(row: Mapping[str, Any], location: Location) -> float | None:
    """By how much the chosen answer is better: `margin`, or the difference of the scores."""
    keys = ("score_chosen", "score_rejected") if row.get("margin") is None else ("margin",)
    values = []
    for key in keys:
        value = row.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(location.at(key), show(value), "a number", "repair or remove the key", "wrong_type")
        values.append(float(value))
    margin = values[0] - sum(values[1:])
    if margin == 0:
        raise DroppedRow(location, "a tie", "answers of different quality", "delete the row", "tie")
    return margin


def unpaired(row: Any, location: Location, key: str) -> Sample:
    """Turns up to the last answer, which is the completion that the label judges."""
    turns = _side(row, key, location)
    if key == "prompt":
        turns = turns + _side(row, "completion", location)
    turns = up_to_last_answer(answered(_system(row, location) + turns, location))
    label = str(row.get("label")).lower()
    if label not in LABELS:
        raise DataError(location.at("label"), show(row.get("label")), "true or false", "repair the label", "wrong_type")
    if is_empty(turns[-1:]):
        raise DroppedRow(location, "an empty answer", "text", "delete the row", "empty_completion")
    return {"prompt": asked(turns[:-1], location), "completion": turns[-1:], "label": LABELS[label]}


def stepwise(row: Any, location: Location) -> Sample:
    """A prompt and the steps of an answer, each judged right (1) or wrong (0), or by the share of what succeeds after it.

    Math-Shepherd (Wang et al. 2023, arXiv:2312.08935) has such shares.
    """
    texts = list_field(row, "completions", location)
    steps = [text(step, location.at("completions").at(i)) for i, step in enumerate(texts)]
    labels = list_field(row, "labels", location)
    if len(labels) != len(steps):
        found = f"{counted(len(labels), 'label')} for {counted(len(steps), 'step')}"
        raise DataError(location.at("labels"), found, "one label per step", "repair the row", "label_count")
    for i, label in enumerate(labels):
        if not isinstance(label, int | float) or not 0 <= label <= 1:
            here, expected = location.at("labels").at(i), "true, false or a number from 0 to 1"
            raise DataError(here, show(label), expected, "repair the label")
    prompt = asked(_system(row, location) + _side(row, "prompt", location), location)
    answer = [assistant("\n".join(steps))]
    return {"prompt": prompt, "completion": answer, "steps": steps, "right": [float(label) for label in labels]}


# --- prompts for reinforcement learning


def _answer(value: Any) -> str | None:
    """A reference answer as text; lists and objects as JSON, for graders that read them."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def prompt_row(row: Any, location: Location, key: str = "prompt", answer: str = "answer") -> Sample:
    """A prompt column and, where the row has one, the reference answer."""
    turns = _side(row, key, location)
    return {"prompt": asked(_system(row, location) + turns, location.at(key)), "answer": _answer(row.get(answer))}


def verl(row: Any, location: Location) -> Sample:
    """A prompt whose reference is in `reward_model.ground_truth`."""
    grade = field(row, "reward_model", location)
    return {**prompt_row(row, location), "answer": _answer(field(grade, "ground_truth", location.at("reward_model")))}


def question_prompt(row: Any, location: Location) -> Sample:
    """The final answer alone where the solution ends on `#### 1,080` (GSM8K, Cobbe et al. 2021), as `1080`."""
    solution = text_field(row, "answer", location)
    _, mark, final = solution.rpartition("####")
    question = _instruction(row, location, "question", "input")
    answer = final.strip().replace(",", "") if mark else solution
    return {"prompt": asked(question, location), "answer": answer}


def mt_bench(row: Any, location: Location) -> Sample:
    """The first turn only: the second asks about a reply that does not exist yet."""
    turns = list_field(row, "turns", location)
    references = list_field(row, "reference", location) if row.get("reference") else [None]
    question = user(text(turns[0], location.at("turns").at(0)))
    return {"prompt": asked([question], location), "answer": _answer(references[0])}


# --- images


def is_graded(value: Any) -> bool:
    """Whether a value is verl's `reward_model` column."""
    return isinstance(value, dict) and "ground_truth" in value


def is_triple(row: Any) -> bool:
    """Whether a row is `[question, answer, image number]`."""
    return isinstance(row, list) and [type(item) for item in row] == [str, str, int]


def vision(row: Any, location: Location) -> Sample:
    """Image parts become `<image>` in the text; `images` holds paths, URLs or bytes in the order of the markers."""
    location = replace(location, takes_images=True)
    key = next((name for name in (*TURN_COLUMNS, "prompt") if isinstance(row, dict) and row.get(name)), "messages")
    turns = messages(field(row, key, location), location.at(key))
    turns = _system(row, location) + turns
    sample = with_images({"messages": turns}, images_of(row, location), location)
    grade = row.get("reward_model")
    answer = _answer(grade["ground_truth"]) if is_graded(grade) else None
    return {"messages": without_images(turns), "images": all_images(sample), "answer": answer}


def is_pretraining(value: Any) -> bool:
    """Whether a value is turns of the role `pretrain`: text and images in turn, all of which is learned."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and value[0].get("role") == "pretrain"


def interleaved(row: Any, location: Location) -> Sample:
    """Turns of the role `pretrain` as one text; where images are taken, they are those of its parts, or of the row."""
    turns = messages(field(row, "messages", location), location.at("messages"))
    sample = _some_text("\n\n".join(turn["content"] for turn in turns), location)
    if location.takes_images:
        sample["images"] = all_images(with_images({"messages": turns}, images_of(row, location), location))
    return sample


def easy_vqa(row: Any, location: Location) -> Sample:
    """`[question, answer, image number]` of easy-VQA, whose images are in `images/`."""
    if not is_triple(row):
        raise DataError(location, show(row), "[question, answer, image number]", "repair the row", "wrong_type")
    turns = [user(IMAGE + row[0]), assistant(row[1])]
    return {"messages": turns, "images": [f"images/{row[2]}.png"], "answer": row[1]}
