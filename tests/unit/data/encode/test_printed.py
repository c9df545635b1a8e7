"""What a chat template does not print is counted, and stops training above a share."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.data.check import check_file
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.printed import ALL_CHARACTERS, LEFT_OUT, UNPRINTED
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load
from llm_trainer.data.read.errors import DataError

HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
TAIL = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
# What well-known templates do with calls and reasoning, reduced to that.
NO_CALLS = HEAD + "{{ m.content }}" + TAIL  # Gemma
NO_TEXT_BESIDE = (
    HEAD + "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content }}{% endif %}" + TAIL
)  # Llama 3
NO_REASONING = HEAD + "{{ m.content.split('</think>')[-1] }}" + TAIL  # R1, of turns that are over

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "What is the sum of one and one?"},
    {"role": "assistant", "content": "I add them.", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two", "reasoning_content": "So it is two."},
]
WORDS = {
    "calls": "call: left out by the chat template",
    "beside": "turn: its text beside a call is left out by the chat template",
    "reasoning": "turn: its reasoning is left out by the chat template",
    "tools": "conversation: its tools are left out by the chat template",
}


@pytest.fixture(scope="module")
def tokenizer(reference_dir: Path) -> Any:
    return load_tokenizer(reference_dir / "tokenizer")


@pytest.mark.parametrize(
    ("template", "missing"),
    [
        (None, []),
        (NO_CALLS, ["calls", "reasoning", "tools"]),
        (NO_TEXT_BESIDE, ["beside", "reasoning", "tools"]),
        (NO_REASONING, ["calls", "reasoning", "tools"]),
    ],
)
def test_every_field_that_is_not_printed_is_counted(tokenizer: Any, template: str | None, missing: list[str]) -> None:
    chat = ChatFormat(tokenizer, template)
    found = chat.left_out(TALK, TOOLS)
    total, left_out = found.pop(ALL_CHARACTERS), found.pop(LEFT_OUT, 0)
    assert found == {WORDS[name]: 1 for name in missing}
    call, tools = json.dumps(CALL["function"]), json.dumps(TOOLS)
    sizes = {"calls": len(call), "beside": 11, "reasoning": 13, "tools": len(tools)}
    assert left_out == sum(sizes[name] for name in missing)
    assert total == len(
        "What is the sum of one and one?" + "I add them." + "2" + "two" + "So it is two." + call + tools
    )


def test_each_of_several_calls_counts(tokenizer: Any) -> None:
    twice = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]}]
    found = ChatFormat(tokenizer, NO_TEXT_BESIDE).left_out(twice)
    assert (found[WORDS["calls"]], found[LEFT_OUT]) == (1, len(json.dumps(CALL["function"])))


def test_reasoning_inside_a_content_counts_too_and_a_policy_is_the_users_word(tokenizer: Any) -> None:
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nOne and one.\n</think>\n\ntwo"}]
    found = ChatFormat(tokenizer, NO_REASONING).left_out(talk)
    assert (found[WORDS["reasoning"]], found[LEFT_OUT]) == (1, len("One and one."))
    assert LEFT_OUT not in ChatFormat(tokenizer, NO_CALLS).left_out(talk)
    for policy in ("all", "last", "none"):
        chat = ChatFormat(tokenizer, NO_REASONING, thinking=policy)  # type: ignore[arg-type]
        assert LEFT_OUT not in chat.left_out(talk)


def test_the_default_template_keeps_only_the_reasoning_after_the_last_question(tokenizer: Any) -> None:
    twice = [TALK[0], TALK[3], TALK[0], TALK[3]]
    assert ChatFormat(tokenizer).left_out(twice)[WORDS["reasoning"]] == 1


def test_training_stops_above_a_share_and_says_what_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": TALK, "tools": TOOLS}) + "\n")
    chat, kind = ChatFormat(tokenizer, NO_TEXT_BESIDE), get_kind("conversations")
    with pytest.raises(DataError, match=r"1 turn: its text beside a call.*at most 10%.*thinking to all.*max_left_out"):
        load([str(path)], kind, chat, DataOptions(), tmp_path / "stores")
    data = load([str(path)], kind, chat, DataOptions(max_left_out=0.7), tmp_path / "stores")  # the store is there
    lines = data.ledgers[0].lines()
    assert "93 of 166 characters (56.0%) of the conversations are left out by the chat template" in lines[1]
    assert "1 turn: its reasoning is left out by the chat template" in lines
    report = check_file(path, chat)
    assert report.account.notes == data.ledgers[0].notes and report.stops_training
    assert not check_file(path, ChatFormat(tokenizer)).stops_training


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "prompts", "process"])
def test_other_kinds_count_alike(tokenizer: Any, tmp_path: Path, kind: str) -> None:
    rows = {
        "pairs": {"prompt": TALK[:1], "chosen": [TALK[3]], "rejected": "three"},
        "unpaired": {"prompt": TALK[:1], "completion": [TALK[3]], "label": True},
        "prompts": {"prompt": TALK[:3]},
        "process": {"prompt": TALK[:3], "completions": ["two"], "labels": [True]},
    }
    path = tmp_path / "a.jsonl"
    another = rows[kind] | {"prompt": [{"role": "user", "content": "Another question"}]}
    path.write_text(json.dumps(rows[kind]) + "\n" + json.dumps(another) + "\n")
    chat = ChatFormat(tokenizer, NO_CALLS)
    data = load([str(path)], get_kind(kind), chat, DataOptions(max_left_out=1.0), tmp_path / "stores")
    notes = data.ledgers[0].notes
    assert notes[LEFT_OUT] > 0 and check_file(path, chat, kind=kind).account.notes == notes


def test_an_answer_of_which_nothing_is_printed_does_not_teach_to_end_at_once(tokenizer: Any, tmp_path: Path) -> None:
    """A call under a template without calls, and mere reasoning that the policy removes."""
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, TALK[2], {**TALK[3], "content": "two"}]
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": talk}) + "\n")
    chat = ChatFormat(tokenizer, NO_CALLS)
    data = load([str(path)], get_kind("conversations"), chat, DataOptions(max_left_out=1.0), tmp_path / "stores")
    ids = [token for token, one in zip(data[0]["input_ids"], data[0]["trained"], strict=True) if one]
    assert tokenizer.decode(ids) == "two<|im_end|>"
    assert data.ledgers[0].notes[UNPRINTED] == check_file(path, chat).account.notes[UNPRINTED] == 1
    mere = [TALK[0], {"role": "assistant", "content": "", "reasoning_content": "Hm."}, TALK[0], TALK[3]]
    for policy, number in {"template": 1, "none": 1, "last": 1, "all": 0}.items():
        chat = ChatFormat(tokenizer, thinking=policy)  # type: ignore[arg-type]
        assert chat.encode(mere).num_unprinted == number, policy
