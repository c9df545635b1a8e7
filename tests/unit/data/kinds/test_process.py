"""Answers judged step by step: recognised, encoded with one label per step, cut like other answers."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from llm_trainer.data.check import check_file
from llm_trainer.data.collate import collate_flat, collate_padded, take_rows
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.kinds.process import ProcessFormat, collate_process
from llm_trainer.data.load import choose_kind
from llm_trainer.data.load import load as load_rows
from llm_trainer.data.read.errors import DataError

ROWS = [
    {"prompt": "2+2*3?", "completions": ["2*3 is 6", "2+6 is 9"], "labels": [True, False]},
    {"prompt": [{"role": "user", "content": "1?"}], "completions": ["one <|im_end|>"], "labels": [0.25]},
]


@pytest.fixture(scope="module")
def chat(reference_dir: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(path: Path, chat: ChatFormat, **how):
    return load_rows([str(path)], get_kind("process"), chat, DataOptions(**how), path.parent / "cache")


def test_each_step_is_judged_at_its_last_token(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "steps.jsonl", ROWS)
    assert choose_kind(("pairs", "process"), [str(path)], DataOptions()) is get_kind("process")
    first, second = (load(path, chat)[i] for i in range(2))
    prompt = chat.encode_prompt([{"role": "user", "content": "2+2*3?"}])
    ids, ends = first["row"]["input_ids"], np.flatnonzero(first["row"]["trained"])
    assert ids[: len(prompt)].tolist() == prompt and ends[-1] == len(ids) - 1
    assert chat.tokenizer.decode(ids[len(prompt) : ends[0] + 1]) == "2*3 is 6\n"
    assert chat.tokenizer.decode(ids[ends[0] + 1 :]) == "2+6 is 9\n"
    assert first["right"][ends].tolist() == [1.0, 0.0] and second["right"][-1] == 0.25
    assert (
        ProcessFormat(chat).encode(ROWS[1]["prompt"], ROWS[1]["completions"])[0] == second["row"]["input_ids"].tolist()
    )
    special = chat.tokenizer.convert_tokens_to_ids("<|im_end|>")  # only text here, where somebody wrote it
    wrote = second["row"]["input_ids"][len(chat.encode_prompt(ROWS[1]["prompt"])) :]
    assert special not in wrote


def test_batches_have_labels_where_steps_end(chat: ChatFormat, tmp_path: Path) -> None:
    data = load(write(tmp_path / "steps.jsonl", ROWS), chat)
    padded = collate_process([data[0], data[1]], partial(collate_padded, pad_id=0))
    flat = collate_process([data[0], data[1]], collate_flat)
    for batch in (padded, flat):
        labels = batch["step_labels"]
        assert labels.shape == batch["input_ids"].shape and "labels" not in batch
        assert labels[labels != -100].tolist() == [1.0, 0.0, 0.25]
    again = take_rows([padded], [(0, 1, len(data[1]["right"]))])
    wider = take_rows([padded], [(0, 0, 60), (0, 1, 60)])
    assert (again["step_labels"] != -100).sum() == 1 and (wider["step_labels"] != -100).sum() == 3


def test_steps_and_rows_have_weights(chat: ChatFormat, tmp_path: Path) -> None:
    weighted = [ROWS[0] | {"weights": [0.5, 2], "loss_weight": 2}, ROWS[1] | {"weight": 0}, ROWS[1] | {"weights": [0]}]
    data = load(write(tmp_path / "steps.jsonl", [*weighted, ROWS[1]]), chat)
    batch = collate_process([data[0], data[1]], collate_flat)
    judged = batch["step_labels"] != -100
    assert batch["loss_weights"][judged].tolist() == [1.0, 4.0, 1.0] and not batch["loss_weights"][~judged].any()
    assert data.ledgers[0].dropped_rows == {"a row of weight 0": 2} and data.ledgers[0].weighted == 1
    assert check_file(tmp_path / "steps.jsonl").unread == []
    plain = load(write(tmp_path / "plain.jsonl", [ROWS[0] | {"weights": [0, 1]}]), chat)
    assert plain[0]["row"]["trained"].sum() == 1 and "loss_weights" not in plain[0]["row"]
    for change in ({"weights": [1]}, {"weights": [1, -1]}):
        with pytest.raises(DataError, match="key 'weights"):
            load(write(tmp_path / "bad.jsonl", [ROWS[0] | change]), chat)


def test_a_cut_answer_keeps_the_steps_that_fit(chat: ChatFormat, tmp_path: Path) -> None:
    path = write(tmp_path / "steps.jsonl", ROWS[:1])
    whole = load(path, chat)[0]
    ends = np.flatnonzero(whole["row"]["trained"])
    cut = load(path, chat, block_size=int(ends[1]))[0]
    assert np.flatnonzero(cut["row"]["trained"]).tolist() == [ends[0]] and len(cut["right"]) == ends[1]
    with pytest.raises(DataError, match="no row to train on"):
        load(path, chat, block_size=int(ends[0]))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"labels": [True]}, "1 label for 2 steps"),
        ({"labels": [True, 2]}, r"labels\[1\].*true, false or a number from 0 to 1"),
        ({"prompt": ""}, "no row to train on"),
    ],
)
def test_broken_rows_are_named(change: dict, found: str, chat: ChatFormat, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=found):
        load(write(tmp_path / "steps.jsonl", [ROWS[0] | change]), chat)
