"""Packed rows, order included, against those of TRL (tests/reference/data/cases.json)."""

import json
from pathlib import Path

import pytest

from llm_trainer.data.packing import pack_bfd, pack_bfd_split, pack_wrapped

PACKERS = {"pack_bfd": pack_bfd, "pack_bfd_split": pack_bfd_split, "pack_wrapped": pack_wrapped}


@pytest.mark.parametrize("name", PACKERS)
def test_rows_are_trls(reference_dir: Path, name: str) -> None:
    case = json.loads((reference_dir / "data" / "cases.json").read_text())["cases"][name]
    documents, packed = case["docs"], case["packed"]
    rows = PACKERS[name]([len(document) for document in documents], case["seq_length"])
    ids = [[token for doc, start, stop in row for token in documents[doc][start:stop]] for row in rows]
    assert ids == packed["input_ids"]
    if "seq_lengths" in packed:
        assert [[stop - start for _, start, stop in row] for row in rows] == packed["seq_lengths"]
