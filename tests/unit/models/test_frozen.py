"""Reference models: copies that stay, and a key that tells weights apart."""

import torch
from torch import nn

from llm_trainer.models.frozen import fingerprint, frozen_copy, same_weights


def test_a_frozen_copy_stays_what_it_was() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
    copy = frozen_copy(model)
    key = fingerprint(model)
    assert same_weights(model, copy) and fingerprint(copy) == key
    assert not copy.training and model.training and model[0].weight.requires_grad and not copy[0].weight.requires_grad
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3
    assert not same_weights(model, copy) and fingerprint(copy) == key != fingerprint(model)


def test_models_of_other_shapes_or_names_are_different() -> None:
    assert not same_weights(nn.Linear(3, 2), nn.Linear(3, 3))
    assert not same_weights(nn.Linear(3, 2), nn.Linear(3, 2, bias=False))
