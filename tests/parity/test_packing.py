"""Packed rows, order included, against those of TRL (tests/reference/data/cases.json)."""

import json
from pathlib import Path

import numpy as np
import pytest

from llm_trainer.data.packing import Blocks, pack_bfd, pack_bfd_split

PACKERS = {"pack_bfd": pack_bfd, "pack_bfd_split": pack_bfd_split}


@pytest.mark.parametrize("name", PACKERS)
def test_rows_are_trls(reference_dir: Path, name: str) -> None:
    case = json.loads((reference_dir / "data" / "cases.json").read_text())["cases"][name]
    documents, packed = case["docs"], case["packed"]
    rows = PACKERS[name]([len(document) for document in documents], case["seq_length"])
    ids = [[token for doc, start, stop in row for token in documents[doc][start:stop]] for row in rows]
    assert ids == packed["input_ids"]
    if "seq_lengths" in packed:
        assert [[stop - start for _, start, stop in row] for row in rows] == packed["seq_lengths"]


def test_blocks_are_trls_wrapped_rows(reference_dir: Path) -> None:
    case = json.loads((reference_dir / "data" / "cases.json").read_text())["cases"]["pack_wrapped"]
    blocks = Blocks(np.concatenate(case["docs"]), "x", case["seq_length"])
    assert [blocks[i]["input_ids"].tolist() for i in range(blocks.count)] == case["packed"]["input_ids"]
