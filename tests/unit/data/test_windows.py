"""Stores cut to the context, and the ledger that must balance."""

import numpy as np
import pytest

from llm_trainer.data import windows
from llm_trainer.data.kinds import DataOptions
from llm_trainer.data.kinds.language import Documents
from llm_trainer.data.read.errors import DataError
from llm_trainer.data.windows import EMPTY, EMPTY_AFTER_CUT, TOO_LONG, count_trained, lay_flat, row_blocks
from token_stores import ROWS, store_of


def test_ledger_of_truncated_rows_balances(tmp_path):
    rows = Documents(store_of(tmp_path, ROWS), "x", DataOptions(block_size=8))
    ledger = rows.ledger
    assert ledger.read == 5 + 12 + 3 + 8
    assert (ledger.rows, ledger.trained, ledger.context) == (2, 3 + 7, 2 + 1)
    assert dict(ledger.dropped_rows) == {EMPTY_AFTER_CUT: 1, EMPTY: 1}


@pytest.mark.parametrize(
    ("truncation", "ids"), [("keep_start", list(range(20, 28))), ("keep_end", list(range(24, 32)))]
)
def test_truncation_keeps_the_stated_end(tmp_path, truncation, ids):
    rows = Documents(store_of(tmp_path, [(range(20, 32), 1)]), "x", DataOptions(block_size=8, truncation=truncation))
    assert rows[0]["input_ids"].tolist() == ids
    assert rows.ledger.truncated == 4 and rows.ledger.truncated_rows == 1


def test_rows_that_are_too_long_can_be_dropped_or_refused(tmp_path):
    store = store_of(tmp_path, ROWS)
    assert Documents(store, "x", DataOptions(block_size=8, truncation="drop")).ledger.dropped_rows[TOO_LONG] == 1
    with pytest.raises(DataError, match=r"data.jsonl:2: found 12 tokens; expected at most 8.*dataset_block_size"):
        Documents(store, "data.jsonl", DataOptions(block_size=8, truncation="error"))


def test_no_row_left_says_why(tmp_path):
    with pytest.raises(DataError, match="no row to train on.*nothing to train on after truncation"):
        Documents(store_of(tmp_path, [(range(20), 18)]), "x", DataOptions(block_size=8))


def test_counts_and_windows_do_not_depend_on_how_rows_are_grouped(monkeypatch):
    noise = np.random.default_rng(0)
    lengths = noise.integers(1, 30, 50)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    stops = np.minimum(ends, starts + 12)  # some are cut
    trained = noise.integers(0, 2, ends[-1]).astype(np.uint8)
    expected = [int(trained[a + 1 : b].sum()) for a, b in zip(starts, stops, strict=True)]
    for at_once in (1, 7, 100, 10_000):
        monkeypatch.setattr(windows, "TOKENS_AT_ONCE", at_once)
        blocks = list(row_blocks(lengths))
        assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(50))
        assert all(lengths[block].sum() <= at_once or block.stop == block.start + 1 for block in blocks)
        assert count_trained(trained, starts, stops).tolist() == expected
    assert count_trained(None, starts, stops).tolist() == (stops - starts - 1).tolist()
    expected_values = np.concatenate([trained[a:b] for a, b in zip(starts, stops, strict=True)])
    assert np.array_equal(lay_flat(trained, starts, stops), expected_values)
    assert np.array_equal(lay_flat(trained, starts, ends), trained)
