"""Samples become batches."""

import numpy as np

from llm_trainer.data.collate import collate_padded


def test_collate_pads_by_position_even_when_the_pad_id_is_a_real_token():
    samples = [
        {"input_ids": np.array([5, 0, 7]), "trained": np.array([False, True, True]), "document_lengths": [3]},
        {"input_ids": np.array([5, 0]), "trained": np.array([True, True]), "document_lengths": [2]},
    ]
    batch = collate_padded(samples, pad_id=0)
    assert batch["labels"].tolist() == [[-100, 0, 7], [-100, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
