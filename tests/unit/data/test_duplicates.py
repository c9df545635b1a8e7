"""Rows that repeat others are left out on request, in all files of a run, and counted; so is what evaluation repeats."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_trainer.data import duplicates
from llm_trainer.data.duplicates import _near, note_overlap
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load

WORDS = [f"{a}{b}" for a in "bcdfgklmnprst" for b in ("an", "el", "ix", "or", "um")]


@pytest.fixture(scope="module")
def chat(reference_dir: Path) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"))


def text(seed: int, changed: int = 0) -> str:
    """Some 200 words, of which the first few may be others."""
    words = np.random.default_rng(seed).choice(WORDS, 200).tolist()
    words[:changed] = np.random.default_rng(seed + 1000).choice(WORDS, changed).tolist()
    return " ".join(words)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def rows(paths: list[str], chat: ChatFormat, cache: Path, **options: Any) -> Any:
    return load(paths, get_kind("text"), chat, DataOptions(**options), cache)


def test_exact_duplicates_are_left_out_over_all_files(tmp_path: Path, chat: ChatFormat) -> None:
    first = write(tmp_path / "a.jsonl", [text(1), text(2), text(1), text(3)])
    second = write(tmp_path / "b.jsonl", [text(2), text(4), text(2, changed=1)])
    third = write(tmp_path / "c.jsonl", [text(4), text(1)])
    found = rows([first, second, third], chat, tmp_path / "cache", duplicates="exact")
    assert found.file_sizes == [3, 2, 0]
    assert [dict(ledger.check().dropped_rows) for ledger in found.ledgers] == [
        {"exact duplicate": 1}, {"exact duplicate": 1}, {"exact duplicate": 2},
    ]  # fmt: skip
    everything = rows([first, second, third], chat, tmp_path / "cache")
    assert everything.file_sizes == [4, 3, 2]
    kept = [everything[i]["input_ids"].tolist() for i in (0, 1, 3, 5, 6)]
    assert [found[i]["input_ids"].tolist() for i in range(5)] == kept
    blocks = rows([first, second], chat, tmp_path / "cache", duplicates="exact", packing="wrapped", block_size=64)
    assert len(blocks.lengths) == sum(len(ids) for ids in kept) // 64 + 2
    assert rows([third], chat, tmp_path / "cache", duplicates="exact").file_sizes == [2], "alone, it repeats nothing"


def test_near_duplicates_are_left_out_by_their_similarity(tmp_path: Path, chat: ChatFormat) -> None:
    texts = [text(seed) for seed in range(30)] + ["short", "too short"]
    near = [text(seed, changed=2) for seed in range(10)]  # nearly all shingles are the same
    far = [text(seed, changed=100) for seed in range(10, 20)]  # about a third
    path = write(tmp_path / "a.jsonl", [*texts, *near, *far, text(3)])
    found = rows([path], chat, tmp_path / "cache", duplicates="near")
    assert dict(found.ledgers[0].dropped_rows) == {"exact duplicate": 1, "near duplicate": 10}
    assert len(found.lengths) == 32 + 10
    strict = rows([path], chat, tmp_path / "cache", duplicates="near", duplicate_similarity=1.0)
    assert strict.ledgers[0].dropped_rows["near duplicate"] < 10
    again = rows([path], chat, tmp_path / "cache", duplicates="near")
    assert again.lengths.tolist() == found.lengths.tolist()


def test_a_store_without_duplicates_is_found_by_the_code_that_made_it(
    tmp_path: Path, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.jsonl", [text(1), text(2), text(1)])

    def kept_in() -> str:
        return rows([path], chat, tmp_path / "cache", duplicates="exact").ledgers[0].kept_in

    first, again = kept_in(), kept_in()
    assert first.endswith("(made now)") and again == first.replace("made now", "found there")
    os.utime(again.removesuffix(" (found there)"), (1, 1))
    kept_in()
    assert Path(again.removesuffix(" (found there)")).stat().st_mtime > 1, "it is used: `data cache` counts the days"
    changed = tmp_path / "duplicates.py"
    changed.write_bytes(duplicates.CODE.read_bytes() + b"# another way to compare")
    monkeypatch.setattr(duplicates, "CODE", changed)
    assert kept_in().endswith("(made now)") and kept_in() != again


def test_the_first_of_near_rows_is_kept() -> None:
    minima = np.random.default_rng(0).integers(0, 1 << 32, (6, 64), dtype=np.uint32)
    minima[3], minima[5] = minima[1], minima[1]
    minima[5, :8] = 0
    assert _near(minima, 0.8).tolist() == [False, False, False, True, False, True]
    assert _near(minima, 0.95).tolist() == [False, False, False, True, False, False]


def test_an_array_of_ids_cannot_be_compared(tmp_path: Path, chat: ChatFormat) -> None:
    np.save(tmp_path / "flat.npy", np.arange(100) % 50)
    with pytest.raises(ValueError, match="duplicates: an array of ids has no documents to compare; give the text"):
        rows([str(tmp_path / "flat.npy")], chat, tmp_path, duplicates="exact", packing="wrapped", block_size=8)


def test_what_evaluation_repeats_is_noted(tmp_path: Path, chat: ChatFormat) -> None:
    train = rows([write(tmp_path / "a.jsonl", [text(seed) for seed in range(9)])], chat, tmp_path / "cache")
    held_out = write(tmp_path / "b.jsonl", [text(3), text(20), text(3), text(5)])
    clean = write(tmp_path / "c.jsonl", [text(21), text(22, changed=1)])
    evaluation = {name: rows([path], chat, tmp_path / "cache") for name, path in (("b", held_out), ("c", clean))}
    note_overlap(train, evaluation)
    assert train.ledgers[0].lines()[1:] == ["3 rows: of b is in the training data too"]
