"""Properties of packings and of micro-batches that hold for any lengths."""

import time
import tracemalloc

import numpy as np
import pytest
import torch

from llm_trainer.data.collate import collate_flat
from llm_trainer.data.kinds import DataOptions
from llm_trainer.data.kinds.language import Documents
from llm_trainer.data.packing import (
    Blocks,
    Packed,
    SharedPrompts,
    cut_by_tokens,
    cut_groups,
    pack_bfd,
    pack_bfd_split,
    shared_prompts,
)
from token_stores import ROWS, store_of


@pytest.fixture
def lengths() -> list[int]:
    return np.random.default_rng(0).integers(0, 60, 500).tolist()


def covered(rows: list, lengths: list[int]) -> list[int]:
    """How many tokens of each document the pieces hold; no token twice."""
    seen = [set() for _ in lengths]
    for row in rows:
        for document, start, stop in row:
            tokens = set(range(start, stop))
            assert tokens and not tokens & seen[document]
            seen[document] |= tokens
    return [len(tokens) for tokens in seen]


@pytest.mark.parametrize("capacity", [1, 17, 40, 1000])
def test_every_token_once_and_no_row_too_long(lengths: list[int], capacity: int) -> None:
    for pack in (pack_bfd, pack_bfd_split):
        rows = pack(lengths, capacity)
        assert max(sum(stop - start for _, start, stop in row) for row in rows) <= capacity
        expected = [min(length, capacity) for length in lengths] if pack is pack_bfd else lengths
        assert covered(rows, lengths) == expected


def test_best_fit_takes_the_fullest_row(lengths: list[int]) -> None:
    assert [[piece.document for piece in row] for row in pack_bfd([6, 7, 3, 4], 10)] == [[1, 2], [0, 3]]
    needed = -(-sum(lengths) // 240)
    assert len(pack_bfd(lengths, 240)) == needed


def test_the_same_as_a_scan_over_all_rows(lengths: list[int]) -> None:
    """Best fit by its definition, in quadratic time; of equally full rows the one that became so first."""
    rooms: list[list[int]] = []  # [space, when it became so, row]
    rows: list[list[int]] = []
    for clock, document in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        if not lengths[document]:
            continue
        fitting = [room for room in rooms if room[0] >= lengths[document]]
        if not fitting:
            rooms.append(fitting_room := [64, clock, len(rows)])
            rows.append([])
            fitting = [fitting_room]
        room = min(fitting)
        rows[room[2]].append(document)
        room[:2] = [room[0] - lengths[document], clock]
    assert [[piece.document for piece in row] for row in pack_bfd(lengths, 64)] == rows


def test_many_documents_take_little_time() -> None:
    lengths = np.random.default_rng(1).integers(1, 4097, 100_000)
    start = time.process_time()
    rows = pack_bfd(lengths, 4096)
    assert time.process_time() - start < 5  # a scan over rows would take minutes
    assert len(rows) * 4096 < 1.01 * lengths.sum()


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("max_tokens", [30, 200, 100_000])
def test_micro_batches_hold_every_row_once_within_the_budget(lengths: list[int], flat: bool, max_tokens: int) -> None:
    batches = cut_by_tokens(lengths, max_tokens, flat)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert lengths.index(max(lengths)) in batches[0]
    for batch in batches:
        sizes = [lengths[row] for row in batch]
        assert batch == sorted(batch)
        assert len(batch) == 1 or (sum(sizes) if flat else max(sizes) * len(sizes)) <= max_tokens
    assert batches == cut_by_tokens(lengths, max_tokens, flat)


def test_micro_batches_are_few() -> None:
    assert cut_by_tokens([5, 9, 5, 1, 20], 10, flat=False) == [[4], [1], [0, 2], [3]]
    assert cut_by_tokens([5, 9, 5, 1, 20], 10, flat=True) == [[4], [1, 3], [0, 2]]
    assert cut_by_tokens([], 10, flat=False) == []


def test_a_row_must_have_room() -> None:
    for call in (pack_bfd, pack_bfd_split, lambda lengths, limit: cut_by_tokens(lengths, limit, True)):
        with pytest.raises(ValueError, match="token limit of a row is 0"):
            call([1], 0)


# --- packed rows


def test_packed_rows_hold_whole_documents_and_lose_nothing(tmp_path):
    documents = Documents(store_of(tmp_path, ROWS), "x", DataOptions(block_size=12))
    packed = Packed(documents, 13, "bfd")
    rows = [packed[i] for i in range(len(packed.rows))]
    assert sorted(n for row in rows for n in row["document_lengths"]) == [5, 8, 12]
    batch = collate_flat(rows)
    assert int((batch["labels"] != -100).sum()) == packed.ledger.trained == 3 + 2 + 7
    starts = torch.tensor([0, *batch["document_lengths"].cumsum(0)[:-1]])
    assert (batch["labels"][0, starts] == -100).all() and (batch["position_ids"][0, starts] == 0).all()


def test_split_documents_are_counted(tmp_path):
    documents = Documents(store_of(tmp_path, [(range(30), 0)]), "x", DataOptions())
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


@pytest.mark.parametrize("max_tokens", [30, 64, 200, 10_000])
def test_prompts_of_groups_count_once_and_large_groups_are_cut(max_tokens: int) -> None:
    noise = np.random.default_rng(0)
    groups = noise.integers(0, 12, 90)
    prompts = noise.integers(0, 25, 12)
    own = noise.integers(1, 40, 90)
    lengths = own + prompts[groups]
    batches = cut_groups(lengths, SharedPrompts(groups, prompts[groups]), max_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(90))
    assert all(batch == sorted(batch) for batch in batches)
    for batch in batches:
        cost = own[batch].sum() + prompts[np.unique(groups[batch])].sum()
        assert cost <= max_tokens or len(batch) == 1
    alone = cut_by_tokens(lengths, max_tokens, flat=True)
    assert len(batches) <= len(alone)
    if max_tokens == 200:
        assert len(batches) < len(alone)


def test_what_rows_of_a_group_have_in_common() -> None:
    rows = [[5, 6, 7, 8], [1, 2, 3], [5, 6, 7, 9, 9], [5, 6, 7], [1, 2, 4, 4], [5, 6], [7, 7]]
    labels = [[0, 0, 0, 1], [0, 0, 1], [0, 0, 0, 1, 1], [0, 0, 1], [0, 0, 1, 1], [0, 1], [0, 0]]
    groups = np.array([3, 0, 3, 4, 0, 4, 9])
    flat = (
        np.concatenate([np.array(row) for row in rows]),
        np.concatenate([np.array(row) for row in labels]).astype(bool),
    )
    shared = shared_prompts(*flat, np.array([len(row) for row in rows]), groups)
    # The last token of a prompt predicts a label of each; a row of group 4 has a prompt of one.
    assert shared.tokens.tolist() == [2, 1, 2, 0, 1, 0, 1]
    assert shared.of(np.array([2, 5])).tokens.tolist() == [2, 0]
    assert len(shared_prompts(*(np.zeros(0, dtype=np.int64),) * 4).tokens) == 0
