"""One bad row is a bad row: it is named by file and number, or counted and left out, and the others are read."""

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from llm_trainer.data.check import check_file
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.files import read_rows
from llm_trainer.data.read.json_text import parse_array
from llm_trainer.data.read.schemas import get_schema

GOOD = b'{"text": "good"}'
BAD = {  # name -> a row of JSON, why it is bad, what is said
    "lone_surrogate": (rb'{"text": "cut \ud83d off"}', r"half of a surrogate pair \(a lone surrogate: \\ud83d, near"),
    "huge_number": (b'{"text": "n", "id": ' + b"7" * 5000 + b"}", "an integer of thousands of digits"),
    "nested_too_deep": (b'{"text": "n", "x": ' + b"[" * 1000 + b"]" * 1000 + b"}", "brackets nested too deep"),
    "not_utf8": ('{"text": "caf\u00e9 x"}'.encode("latin1"), r"a byte that is not UTF-8 \(0xe9 at character 14, near"),
    "bad_json": (b'{"text": "cut', "broken JSON"),
}


def poisoned(suffix: str, bad: bytes) -> bytes:
    rows = [GOOD, bad, GOOD]
    return b"[\n" + b",\n".join(rows) + b"\n]" if suffix == ".json" else b"\n".join(rows)


def read(path: Path) -> tuple[list[Any], list[DataError]]:
    errors: list[DataError] = []
    return [row for _, row in read_rows(path, on_error=errors.append)], errors


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz"])
@pytest.mark.parametrize("reason", BAD)
def test_the_others_are_read(tmp_path: Path, suffix: str, reason: str) -> None:
    row, says = BAD[reason]
    path, content = tmp_path / f"rows{suffix}", poisoned(suffix, row)
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    if (suffix, reason) != (".json", "bad_json"):  # where an array breaks off, nothing is known of its rest
        rows, (error,) = read(path)
        assert rows == [{"text": "good"}] * 2
        assert (error.location.row, error.reason) == (2, reason)
    row_or_line = 3 if (suffix, reason) == (".json", "bad_json") else 2
    with pytest.raises(DataError, match=rf"rows{suffix}:{row_or_line}: found {says}.*; expected .*; fix: "):
        list(read_rows(path))


def test_what_looks_like_it_is_read(tmp_path: Path) -> None:
    rows = [
        {"text": "an emoji \U0001f600, and [[[" + "[" * 2000},
        {"text": "n", "id": 10**4000},
        {"text": "\\ud83d is how it is spelled", "x": [[1]] * 500},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == (rows, [])
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert read(tmp_path / "rows.json") == (rows, [])


def test_an_array_is_read_as_the_whole_text_would_be() -> None:
    """Element by element, for any values and wherever it is cut."""
    values = [[], [1], ["a,]\\", {"b": [None, 2.5]}], [[["[{"]], -3, {}], ["\u5b50", True, {"x": {"y": []}}]]
    for rows in values:
        for text in (json.dumps(rows), json.dumps(rows, indent=1, ensure_ascii=False) + " \n"):
            assert [value for _, value in parse_array(text, Location("f"))] == rows
            for end in range(1, len(text.rstrip())):
                with pytest.raises(DataError, match="broken JSON"):
                    list(parse_array(text[:end], Location("f")))
    for bad in ("[1 2]", "[1,]", "[,1]", "[1]x"):
        with pytest.raises(DataError, match="broken JSON"):
            list(parse_array(bad, Location("f")))


def test_tables_and_texts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\ngood\ncaf\xe9\ngood\n")
    (tmp_path / "b.txt").write_bytes(b"good\ncaf\xe9\ngood\n")
    (tmp_path / "c.json").write_bytes(b'["good", ' + b"7" * 5000 + b', "good"]')
    for name in ("a.csv", "b.txt", "c.json"):
        rows, (error,) = read(tmp_path / name)
        assert len(rows) == 2, name
        assert error.location.row == (3 if name == "a.csv" else 2), name
    binary = pyarrow.array([b"good", b"caf\xe9", b"good"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": binary}), tmp_path / "d.parquet")
    rows, (error,) = read(tmp_path / "d.parquet")
    assert (rows, error.location.row, error.reason) == ([{"text": "good"}] * 2, 2, "not_utf8")


def test_json_inside_a_column_is_looked_at_too() -> None:
    text = '[{"role": "user", "content": "cut \\ud83d off"}, {"role": "assistant", "content": "a"}]'
    path = Path("rows.csv")
    with pytest.raises(DataError, match=r"rows\.csv:3: key 'messages': found half of a surrogate pair"):
        get_schema("messages").samples({"messages": text}, Location(path, 3))


@pytest.mark.parametrize("reason", BAD)
def test_a_run_drops_it_or_names_it(tmp_path: Path, reference_dir: Path, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(poisoned(".jsonl", BAD[reason][0]))
    chat: ChatFormat = ChatFormat(load_tokenizer(reference_dir / "tokenizer"))
    dropping = DataOptions(block_size=4, bad_rows="drop", packing="wrapped")
    ledger = load([str(path)], get_kind("text"), chat, dropping, tmp_path / "cache").ledgers[0].check()
    assert ledger.dropped_rows == {reason: 1} and ledger.read > 0
    with pytest.raises(DataError, match=r"rows\.jsonl:2: found"):
        load([str(path)], get_kind("text"), chat, DataOptions(block_size=4, packing="wrapped"), tmp_path / "cache")


@pytest.mark.timeout(20)
def test_a_pickle_that_contains_itself_is_no_token_file(tmp_path: Path) -> None:
    value: list[Any] = [1, 2]
    value += [value, value, value]
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([value] * 3))
    report = check_file(tmp_path / "a.pkl")
    assert "expected a flat list of non-negative integers" in str(report.problems[0])
    array = np.empty(2, dtype=object)
    array[:] = [value, array]
    np.save(tmp_path / "b.npy", array, allow_pickle=True)
    assert check_file(tmp_path / "b.npy").problems
    columns: dict[str, Any] = {"chosen": [value, value]}
    columns["rejected"] = [columns, value]
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(columns))
    assert check_file(tmp_path / "c.pkl").problems
