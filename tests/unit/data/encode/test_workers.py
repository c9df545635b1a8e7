"""Token stores are built in parts: a killed build goes on, and whoever has rows can write a part."""

import json

import numpy as np
import pytest

from llm_trainer.data.encode.store import Part, TokenStore, compact_ids, join_parts, write_part
from llm_trainer.data.encode.workers import ROWS_PER_PART, build_store


def test_a_killed_build_goes_on_from_its_last_part(tmp_path):
    rows = list(range(2 * ROWS_PER_PART + 5))
    calls = []

    def encode(chunk):
        calls.append(chunk[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Part({"input_ids": [np.array([i], dtype=np.uint16) for i in chunk]})

    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "s", rows, encode, ["input_ids"])
    store = build_store(tmp_path / "s", rows, encode, ["input_ids"])
    assert calls == [0, ROWS_PER_PART, 2 * ROWS_PER_PART, 2 * ROWS_PER_PART]
    assert store["input_ids"].values.tolist() == rows
    assert json.loads((tmp_path / "s" / "meta.json").read_text())["rows"] == len(rows)
    build_store(tmp_path / "s", [], encode, ["input_ids"])
    assert len(calls) == 4, "a finished store is opened, not built again"


def test_parts_that_several_wrote_are_joined_in_the_order_of_their_numbers(tmp_path):
    def part(*rows):
        return Part({"input_ids": [compact_ids(row, 100) for row in rows]})

    last = part([7])
    last.dropped["tie"] += 2
    write_part(tmp_path, 1, last)
    assert not TokenStore.exists(tmp_path), "parts alone are no store"
    write_part(tmp_path, 0, part([1, 2], [3]))
    store = join_parts(tmp_path, 2, ["input_ids"], meta={"source": "rollouts"})
    assert [store["input_ids"][i].tolist() for i in range(len(store))] == [[1, 2], [3], [7]]
    assert store.meta["dropped"] == {"tie": 2} and store.meta["source"] == "rollouts"
    assert not (tmp_path / "parts").exists()
    with pytest.raises(FileNotFoundError):
        join_parts(tmp_path, 1, ["input_ids"])
    assert len(join_parts(tmp_path / "none", 0, ["input_ids"])) == 0
    assert (compact_ids([1], 1 << 16).dtype, compact_ids([1], (1 << 16) + 1).dtype) == (np.uint16, np.uint32)
