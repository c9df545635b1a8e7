"""Prompts keep their reference answer and every column of their row; nothing of them is trained on."""

import json
import pickle
from functools import partial
from pathlib import Path

import pytest

from llm_trainer.data.collate import collate_padded
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions
from llm_trainer.data.kinds.prompts import PROMPTS, collate_prompts
from llm_trainer.data.load import load as load_rows
from llm_trainer.data.read.errors import DataError
from llm_trainer.data.windows import TOO_LONG

ROWS = [
    {"question": "2+2?", "answer": "2+2 is\n#### 4", "level": 1, "tags": ["sum", "子"]},
    {"question": "What is a much longer question?", "answer": "none", "level": 2, "tags": []},
]


@pytest.fixture(scope="module")
def chat(reference_dir: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"))


def load(path: Path, chat: ChatFormat, **options):
    return load_rows([str(path)], PROMPTS, chat, DataOptions(**options), path.parent / "cache")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_prompt_ends_where_the_assistant_begins_and_keeps_its_row(chat: ChatFormat, tmp_path: Path) -> None:
    data = load(write(tmp_path / "prompts.jsonl", ROWS), chat)
    for sample, row in zip((data[0], data[1]), ROWS, strict=True):
        prompt = [{"role": "user", "content": row["question"]}]
        assert sample["input_ids"].tolist() == chat.encode_prompt(prompt)
        assert sample["row"] == row
    assert [data[i]["answer"] for i in range(2)] == ["4", "none"]
    ledger = data.ledgers[0].check()
    assert (ledger.rows, ledger.trained, ledger.context) == (2, 0, int(data.lengths.sum()))


def test_batches_are_padded_on_the_left(chat: ChatFormat, tmp_path: Path) -> None:
    data = load(write(tmp_path / "prompts.jsonl", ROWS), chat)
    short, long = data.lengths.tolist()
    batch = collate_prompts([data[0], data[1]], partial(collate_padded, pad_id=0))
    assert batch["prompts"].shape == (2, long)
    assert batch["prompts"][0, long - short :].tolist() == data[0]["input_ids"].tolist()
    assert batch["prompts"][1].tolist() == data[1]["input_ids"].tolist()
    assert batch["prompt_attention_mask"].tolist() == [[0] * (long - short) + [1] * short, [1] * long]
    assert batch["answers"] == ["4", "none"] and batch["rows"] == ROWS


def test_long_prompts_are_cut_or_dropped_and_counted(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "prompts.jsonl", ROWS)
    short, long = load(path, chat).lengths.tolist()
    cut = load(path, chat, block_size=short, truncation="keep_end")
    assert cut.ledgers[0].truncated == long - short and cut[1]["row"] == ROWS[1]
    for end in ("drop", "keep_start"):  # without its end a prompt is none
        left = load(path, chat, block_size=short, truncation=end)
        assert left.ledgers[0].dropped_rows == {TOO_LONG: 1} and left[0]["answer"] == "4"
    with pytest.raises(DataError, match="no row to train on .*longer than the context"):
        load(path, chat, block_size=short - 1)
    with pytest.raises(ValueError, match="expected 'none' for prompts"):
        load(path, chat, packing="flat")
    with pytest.raises(DataError, match="expected rows of kind prompt for prompts"):
        load(write(tmp_path / "text.jsonl", [{"text": "a"}]), chat)


def test_prompts_of_token_ids_are_those_of_text(chat: ChatFormat, tmp_path: Path) -> None:
    ids = chat.encode_prompt([{"role": "user", "content": "2+2?"}])
    answer = chat.tokenizer("4", add_special_tokens=False).input_ids
    (tmp_path / "ids.pkl").write_bytes(pickle.dumps([{"prompt": ids, "answer": answer}, {"prompt": ids}]))
    data = load(tmp_path / "ids.pkl", chat)
    assert [data[i]["input_ids"].tolist() for i in range(2)] == [ids, ids]
    assert [data[i]["answer"] for i in range(2)] == ["4", None]
