"""Batches of the explicit style: without labels, without a dict, and trainers called by position."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer import DPOTrainer, KTOTrainer, SFTTrainer, Trainer
from llm_trainer.losses.preference import PreferenceLoss

IDS = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])


def bigrams() -> nn.Module:
    torch.manual_seed(0)
    return nn.Embedding(10, 10)


def made(kind: type[Trainer], batch: Any, folder: Path, epochs: int = 1) -> Trainer:
    model = bigrams()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"max_epochs": epochs, "use_amp": False, "progress": False, "save_dir": str(folder)}
    return kind(model, optimizer, [batch], **options, device="cpu", save_interval=0)


def test_without_labels_pretraining_learns_every_token_but_padding(tmp_path: Path) -> None:
    labels = IDS.masked_fill(MASK == 0, -100)
    given = {"input_ids": IDS, "attention_mask": MASK}
    with_labels = made(Trainer, given | {"labels": labels}, tmp_path / "with").train()
    without = made(Trainer, given, tmp_path / "without").train()
    assert (
        without["loss"] == with_labels["loss"] and without["mean_token_accuracy"] == with_labels["mean_token_accuracy"]
    )


def test_of_rows_laid_flat_the_first_tokens_are_no_labels(tmp_path: Path) -> None:
    flat = {"input_ids": torch.tensor([[3, 4, 5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    trainer = made(Trainer, flat, tmp_path)
    assert trainer._loss_weight(flat) == 4
    assert trainer._prepare_batch(flat)["labels"].tolist() == [[-100, 4, 5, -100, 7, 8]]


def test_without_labels_fine_tuning_would_learn_what_users_write(tmp_path: Path) -> None:
    message = "SFTTrainer: a batch has input_ids, attention_mask, but no labels .*as in pretraining, use Trainer"
    with pytest.raises(ValueError, match=message):
        made(SFTTrainer, {"input_ids": IDS, "attention_mask": MASK}, tmp_path).train()


@pytest.mark.parametrize(("batch", "found"), [((IDS, IDS), "tuple"), ({"ids": IDS}, r"\['ids'\]")])
def test_what_is_no_batch_is_named(batch: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"Trainer: got {found} as a batch; expected a dict with input_ids"):
        made(Trainer, batch, tmp_path).train()


def pairs() -> list[dict[str, torch.Tensor]]:
    batch = {}
    for name, ids in (("prompt", IDS[:, :2]), ("chosen", IDS), ("rejected", IDS.flip(1))):
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": torch.ones_like(ids)}
    return [batch]


def test_dpo_takes_its_arguments_by_position_too(tmp_path: Path) -> None:
    """As its users have them elsewhere: model, ref_model, optimizer, train_loader, val_loader."""
    model, reference = bigrams(), bigrams()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"save_dir": str(tmp_path), "max_epochs": 1, "use_amp": False, "device": "cpu"}
    trainer = DPOTrainer(model, reference, optimizer, pairs(), pairs(), beta=0.2, progress=False, **options)
    assert trainer.reference is not None and trainer.reference.base is reference and trainer.optimizer is optimizer
    assert "eval_loss" in trainer.train()
    with pytest.raises(TypeError, match="got SGD as ref_model and 1 more; name the arguments"):
        DPOTrainer(model, optimizer, pairs(), **options)
    with pytest.raises(TypeError, match=r"ref_model \(a module, or None\), .*and 5 more"):
        DPOTrainer(model, reference, optimizer, pairs(), pairs(), 0.1, 0.0, **options)


def test_an_optimizer_is_an_optimizer(tmp_path: Path) -> None:
    model = bigrams()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="KTOTrainer: got Embedding as optimizer, expected a torch.optim.Optimizer"):
        KTOTrainer(model, bigrams(), optimizer, pairs(), save_dir=str(tmp_path))


def test_none_is_the_default_of_a_loss_and_no_number(tmp_path: Path) -> None:
    model, reference = bigrams(), bigrams()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: dict[str, Any] = {"save_dir": str(tmp_path), "device": "cpu"}
    trainer = DPOTrainer(
        model, reference, optimizer, pairs(), beta=None, label_smoothing=None, loss_type=None, **options
    )
    assert trainer.loss == PreferenceLoss()
    for wrong in (None, 0, 1.5):
        with pytest.raises(ValueError, match=f"grad_accum_steps: got {wrong}, expected an integer of at least 1"):
            Trainer(model, optimizer, [], grad_accum_steps=wrong, **options)  # type: ignore[arg-type]
