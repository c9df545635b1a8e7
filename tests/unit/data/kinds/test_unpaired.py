"""Judged answers: what is stored of them, and the answers to other prompts that they meet."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from llm_trainer.data.collate import collate_padded
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions
from llm_trainer.data.kinds.unpaired import UNPAIRED, UnpairedRows, collate_unpaired
from llm_trainer.data.load import load as load_rows
from llm_trainer.data.read.errors import DataError
from llm_trainer.losses.unpaired import mismatched_order


@pytest.fixture(scope="module")
def chat(reference_dir: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"))


def load(path: Path, chat: ChatFormat, **options):
    return load_rows([str(path)], UNPAIRED, chat, DataOptions(**options), path.parent / "cache")


def test_real_judged_answers(shared_data: Path, chat: ChatFormat, tmp_path: Path) -> None:
    rows = json.loads((shared_data / "preference" / "kto_en.json").read_text())[:20]
    path = tmp_path / "kto.json"
    path.write_text(json.dumps(rows))
    data = load(path, chat)
    assert [data[i]["desirable"] for i in range(len(data.lengths))].count(True) == sum(row["label"] for row in rows)


def test_prompts_meet_answers_to_other_prompts_whatever_the_order(chat: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(path, chat)
    assert [data[i]["desirable"] for i in range(8)] == [True, False] * 4
    for i in range(8):
        sample = data[i]
        text = chat.tokenizer.decode(sample["mismatched"]["input_ids"])
        assert f"question {i // 2}" in text
        assert not any(f"{word} {i // 2}" in text for word in ("yes", "no"))
        answer = sample["mismatched"]["input_ids"][sample["mismatched"]["trained"]]
        assert any(f"{word} {j}" in chat.tokenizer.decode(answer) for word in ("yes", "no") for j in range(4))
    batch = collate_unpaired([data[0], data[3]], partial(collate_padded, pad_id=0))
    assert batch["desirable"].tolist() == [True, False] and batch["kl_labels"].shape == batch["kl_input_ids"].shape


def test_mismatched_rows_fit_the_context_and_one_row_alone_is_refused(chat: ChatFormat, tmp_path: Path) -> None:
    path = tmp_path / "kto.jsonl"
    rows = [{"prompt": "a " * n, "completion": "b " * n, "label": n % 2 == 0} for n in (2, 9, 12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load(path, chat, block_size=40, truncation="keep_end")
    assert max(len(data[i]["mismatched"]["input_ids"]) for i in range(len(data.lengths))) <= 40
    path.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(DataError, match="found one answer; expected at least two"):
        load(path, chat)
    with pytest.raises(ValueError, match="'none' or 'flat'"):
        load(path, chat, packing="bfd")


def test_partners_are_asked_for_once(tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kto.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": "b", "label": True}) + "\n" for p in "aabc"))
    asked: list[torch.Tensor] = []

    def pair_up(prompts: torch.Tensor) -> torch.Tensor:
        asked.append(prompts)
        return mismatched_order(prompts)

    monkeypatch.setattr("llm_trainer.losses.unpaired.mismatched_order", pair_up)
    data = load(path, chat)
    assert [x.tolist() for x in asked] == [[0, 0, 2, 3]] and isinstance(data.parts[0], UnpairedRows)
