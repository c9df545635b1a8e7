"""Ready-made batches that are laid flat, and those that stay as they are."""

import torch

from llm_trainer.layout import Layout
from llm_trainer.trainers.answers import lay_flat

FLAT = Layout(flat=True)


def padded() -> dict[str, torch.Tensor]:
    """Rows of three tokens and of one."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    return {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask}


def test_columns_that_are_no_tensors_stay_beside_flat_rows() -> None:
    found = lay_flat(padded() | {"names": ["a", "b"], "weight": torch.ones(2)}, FLAT)
    assert found["input_ids"].tolist() == [[5, 6, 7, 8]] and found["document_lengths"].tolist() == [3, 1]
    assert found["names"] == ["a", "b"] and "attention_mask" not in found


def test_masks_of_another_shape_and_tables_stay_as_they_came() -> None:
    for other in ({"attention_mask": torch.ones(2, 1, 3, 3)}, {"states": torch.ones(2, 4)}):
        rows = padded() | other
        assert lay_flat(rows, FLAT) is rows
