"""Samples become batches."""

import numpy as np

from llm_trainer.data.collate import collate_flat, collate_padded


def test_collate_pads_by_position_even_when_the_pad_id_is_a_real_token():
    samples = [
        {"input_ids": np.array([5, 0, 7]), "trained": np.array([False, True, True]), "document_lengths": [3]},
        {"input_ids": np.array([5, 0]), "trained": np.array([True, True]), "document_lengths": [2]},
    ]
    batch = collate_padded(samples, pad_id=0)
    assert batch["labels"].tolist() == [[-100, 0, 7], [-100, 0, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_the_first_token_of_every_document_is_no_label():
    """It has nothing before it to be predicted from, though it stands in the middle of a row."""
    packed = {"input_ids": np.arange(5, 12), "trained": np.ones(7, dtype=bool), "document_lengths": [3, 1, 3]}
    alone = {"input_ids": np.array([5, 6]), "trained": np.ones(2, dtype=bool), "document_lengths": [2]}
    labels = [-100, 6, 7, -100, -100, 10, 11]
    assert collate_flat([packed, alone])["labels"].tolist() == [[*labels, -100, 6]]
    assert collate_padded([packed])["labels"].tolist() == [labels]
