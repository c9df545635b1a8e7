"""Rows with images, padded and laid flat, for the tests of vision-language models."""

import torch
from tiny_models import IMAGE
from torch import Tensor, nn

from llm_trainer.image_batch import ImageBatch
from llm_trainer.losses.language import IGNORE
from llm_trainer.models.scored import ScoredModel

# Rows of two, one and no image; the first image of the first row is that of the second.
ROWS = ([1, 2, "a", 3, "b", 4], ["a", 7, 8], [9, 10, 11, 12])


def images(model: ScoredModel, rows: tuple[list[object], ...] = ROWS) -> ImageBatch:
    """Two distinct images, and where `rows` show them."""
    example = model.vision.example(2)
    uses = [[use for use in row if isinstance(use, str)] for row in rows]
    order = [("a", "b").index(use) for row in uses for use in row]
    return ImageBatch(example.inputs, torch.tensor(order), torch.tensor([len(row) for row in uses]), example.lengths)


def documents(each: int, rows: tuple[list[object], ...] = ROWS) -> list[Tensor]:
    found = []
    for row in rows:
        ids: list[int] = []
        for one in row:
            ids += [one] if isinstance(one, int) else [IMAGE] * each
        found.append(torch.tensor(ids))
    return found


def labels_of(ids: Tensor) -> Tensor:
    return ids.masked_fill(ids == IMAGE, IGNORE)


def padded(each: int, rows_of: tuple[list[object], ...] = ROWS) -> dict[str, Tensor]:
    rows = documents(each, rows_of)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = labels_of(ids).masked_fill(mask == 0, IGNORE)
    labels[:, 0] = IGNORE
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flat(each: int) -> dict[str, Tensor]:
    rows = documents(each)
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    labels = labels_of(ids).masked_fill(positions == 0, IGNORE)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "position_ids": positions, "document_lengths": lengths, "labels": labels}


def gradients(model: nn.Module) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found
