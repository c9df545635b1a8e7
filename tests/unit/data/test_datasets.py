"""Stores, their views as training rows, and the ledger that must balance."""

import json
import tracemalloc

import numpy as np
import pytest
import torch

from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.data.datasets import EMPTY, EMPTY_AFTER_CUT, TOO_LONG, Blocks, Documents, Joined, Packed
from llm_trainer.data.encode.store import ROWS_PER_PART, Part, build_store
from llm_trainer.data.read.errors import DataError


def store_of(folder, rows):
    """A store of (ids, number of leading tokens that are not trained on)."""

    def encode(chunk):
        ids = [np.asarray(ids, dtype=np.uint16) for ids, _ in chunk]
        trained = [(np.arange(len(ids)) >= prompt).astype(np.uint8) for ids, prompt in chunk]
        return Part({"input_ids": ids, "trained": trained})

    return build_store(folder, rows, encode, ("input_ids", "trained"))


ROWS = [(range(10, 15), 2), (range(20, 32), 10), (range(40, 43), 3), (range(50, 58), 0)]


def test_ledger_of_truncated_rows_balances(tmp_path):
    rows = Documents(store_of(tmp_path, ROWS), "x", 8)
    ledger = rows.ledger
    assert ledger.read == 5 + 12 + 3 + 8
    assert (ledger.rows, ledger.trained, ledger.context) == (2, 3 + 7, 2 + 1)
    assert dict(ledger.dropped_rows) == {EMPTY_AFTER_CUT: 1, EMPTY: 1}


@pytest.mark.parametrize(
    ("truncation", "ids"), [("keep_start", list(range(20, 28))), ("keep_end", list(range(24, 32)))]
)
def test_truncation_keeps_the_stated_end(tmp_path, truncation, ids):
    rows = Documents(store_of(tmp_path, [(range(20, 32), 1)]), "x", 8, truncation)
    assert rows[0]["input_ids"].tolist() == ids
    assert rows.ledger.truncated == 4 and rows.ledger.truncated_rows == 1


def test_rows_that_are_too_long_can_be_dropped_or_refused(tmp_path):
    store = store_of(tmp_path, ROWS)
    assert Documents(store, "x", 8, "drop").ledger.dropped_rows[TOO_LONG] == 1
    with pytest.raises(DataError, match=r"data.jsonl:2: found 12 tokens; expected at most 8.*dataset_block_size"):
        Documents(store, "data.jsonl", 8, "error")


def test_no_row_left_says_why(tmp_path):
    with pytest.raises(DataError, match="no row to train on.*nothing to train on after truncation"):
        Documents(store_of(tmp_path, [(range(20), 18)]), "x", 8)


def test_packed_rows_hold_whole_documents_and_lose_nothing(tmp_path):
    documents = Documents(store_of(tmp_path, ROWS), "x", 12)
    packed = Packed(documents, 13, "bfd")
    rows = [packed[i] for i in range(len(packed.rows))]
    assert sorted(n for row in rows for n in row["document_lengths"]) == [5, 8, 12]
    batch = collate_flat(rows)
    assert int((batch["labels"] != -100).sum()) == packed.ledger.trained == 3 + 2 + 7
    starts = torch.tensor([0, *batch["document_lengths"].cumsum(0)[:-1]])
    assert (batch["labels"][0, starts] == -100).all() and (batch["position_ids"][0, starts] == 0).all()


def test_split_documents_are_counted(tmp_path):
    documents = Documents(store_of(tmp_path, [(range(30), 0)]), "x", None)
    packed = Packed(documents, 8, "bfd_split")
    labels = [collate_flat([packed[i]])["labels"] for i in range(len(packed.rows))]
    assert sum(int((label != -100).sum()) for label in labels) == packed.ledger.check().trained == 30 - 4


def test_blocks_cover_everything_and_cost_no_memory(tmp_path):
    blocks = Blocks(np.arange(11), "x", 4)
    assert [blocks[i]["input_ids"].tolist() for i in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert (blocks.ledger.trained, blocks.ledger.context) == (8, 3)
    ids = np.lib.format.open_memmap(tmp_path / "big.npy", mode="w+", dtype=np.uint16, shape=(50_000_000,))
    tracemalloc.start()
    big = Blocks(ids, "big", 1024)
    assert len(big[40_000]["input_ids"]) == 1024
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_joined_finds_samples_by_file(tmp_path):
    joined = Joined([Blocks(np.arange(8), "a", 4), Blocks(np.arange(100, 108), "b", 4)])
    assert joined.file_sizes == [2, 2] and joined[2]["input_ids"].tolist() == [100, 101, 102, 103]


def test_collate_pads_by_position_even_when_the_pad_id_is_a_real_token():
    samples = [
        {"input_ids": np.array([5, 0, 7]), "trained": np.array([False, True, True]), "document_lengths": [3]},
        {"input_ids": np.array([5, 0]), "trained": np.array([True, True]), "document_lengths": [2]},
    ]
    batch = collate_padded(samples, pad_id=0)
    assert batch["labels"].tolist() == [[-100, 0, 7], [-100, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


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
