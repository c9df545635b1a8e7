"""A forward and backward before the first step shows what a token takes, and leaves nothing behind."""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llm_trainer import SFTTrainer
from llm_trainer.engine.room import Room, forget_resident_peak
from llm_trainer.train import sizing, trial

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from victim import Plain, flat, make_trainer, outcome


class Wide(nn.Module):
    """One layer that is so wide that nothing else counts, with running statistics and noise."""

    WIDTH = 8192

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(512, 16), nn.BatchNorm1d(16)
        self.up, self.down, self.drop = nn.Linear(16, self.WIDTH), nn.Linear(self.WIDTH, 16), nn.Dropout(0.5)
        self.head = nn.Linear(16, 512)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, V]` of ids `[B, T]`."""
        normed = self.norm(self.embed(input_ids).mT).mT
        return self.head(self.down(self.drop(self.up(normed))))


class Long:
    """Rows of up to 400 tokens."""

    def __init__(self) -> None:
        self.lengths = np.array([100, 400, 50, 399, 20])
        self.file_sizes = [5]

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = self.lengths[index]
        return {"input_ids": np.full(size, index), "trained": np.ones(size, bool), "document_lengths": [size]}


def wide(folder: Path, kind: type[SFTTrainer] = SFTTrainer, **options: Any) -> Any:
    from llm_trainer import configure_optimizer
    from llm_trainer.data.collate import collate_padded
    from llm_trainer.data.stream import SampleStream

    torch.manual_seed(0)
    model = Wide()
    source = SampleStream(Long(), collate_padded, rows_per_step=4, batch_size=2)
    optimizer = configure_optimizer(model, lr=0.01)
    how = {"device": "cpu", "precision": "fp32", "progress": False, "max_epochs": 1, "save_interval": 0}
    return kind(model, optimizer, source, save_dir=str(folder), **(how | options))


def everything(trainer: Any) -> Any:
    """What a trial could change: weights and buffers, gradients, optimizer, random numbers, metrics, attributes."""
    model = trainer.base_model
    numbers = {name: value for name, value in vars(trainer).items() if isinstance(value, int | float | list)}
    return flat(
        {
            "model": dict(model.state_dict()),
            "gradients": [parameter.grad for parameter in model.parameters()],
            "optimizer": trainer.optimizer.state_dict()["state"],
            "random": [torch.random.get_rng_state(), random.getstate(), [*map(repr, np.random.get_state())]],
            "metrics": trainer.run._metrics.state_dict(),
            "training": [module.training for module in model.modules()],
            "numbers": numbers,
        }
    )


def test_it_sees_what_a_token_takes(tmp_path):
    """At least what goes into the wide layers, both times, and no multiple of what a step may hold besides."""
    if not forget_resident_peak():
        pytest.skip("this kernel does not forget the peak")
    trainer = wide(tmp_path)
    _, tokens = trial.longest_rows(trainer.run.source)
    assert tokens == 800  # two rows of 400 and 399: no more than batch_size
    trainer.run.source.flat = True
    assert trial.longest_rows(trainer.run.source)[1] == 799
    trainer.run.source.flat = False
    found = trial.bytes_per_token(trainer.run.work, trainer.run.source)
    kept = 4 * 2 * Wide.WIDTH  # what the dropout takes and gives
    assert found is not None and 0.8 * kept < found < 8 * kept


def test_nothing_of_it_is_left(tmp_path):
    trainer = wide(tmp_path)
    trainer.model.eval()
    before = everything(trainer)
    trial.bytes_per_token(trainer.run.work, trainer.run.source)
    assert everything(trainer) == before


def test_nor_of_what_a_loss_remembers(tmp_path):
    """In numbers, in tensors inside of dicts, and in a module beside the model."""

    class Remembers(SFTTrainer):
        takes_flat = True

        def __init__(self, *args: Any, **options: Any) -> None:
            self.seen, self.means, self.norm = 0, {"loss": torch.zeros(()), "all": []}, nn.BatchNorm1d(1)
            super().__init__(*args, **options)

        def _compute_loss(self, outputs: Any, batch: Any) -> torch.Tensor:
            loss = super()._compute_loss(outputs, batch)
            self.seen += 1
            self.means["loss"].add_(loss.detach())
            self.means["all"].append(float(loss.detach()))
            self.norm(torch.ones(2, 1))
            return loss

    trainer = wide(tmp_path, Remembers)
    trial.bytes_per_token(trainer.run.work, trainer.run.source)
    assert trainer.seen == 0 and trainer.means == {"loss": 0.0, "all": []}
    assert trainer.norm.num_batches_tracked == 0 and trainer.norm.running_mean == 0


def test_a_run_goes_the_same_way_after_it(tmp_path, monkeypatch):
    """Loss by loss and bit by bit; the number is in the checkpoint, so that a resumed run tries nothing."""
    tried = []

    def count(*about: Any) -> float | None:
        tried.append(1)
        return trial.bytes_per_token(*about)

    monkeypatch.setattr(sizing, "bytes_per_token", count)
    make_trainer(tmp_path / "without", max_epochs=1).train()
    assert not tried  # a step of 8 rows is small
    monkeypatch.setattr(sizing, "ENOUGH", 0)
    make_trainer(tmp_path / "with", max_epochs=1).train()
    assert tried
    without, after = outcome(tmp_path / "without"), outcome(tmp_path / "with")
    assert after == without
    make_trainer(tmp_path / "with", max_epochs=2).train()
    assert len(tried) == 1


def test_one_that_does_not_fit_says_so(tmp_path, monkeypatch):
    """Then every row comes alone; gradients of what was computed are gone."""

    class Full(Plain):
        full = True

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            logits = super().forward(input_ids)
            if self.full:
                self.full = False
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return logits

    monkeypatch.setattr(sizing, "ENOUGH", 0)
    monkeypatch.setattr(sizing, "room_on", lambda device: Room(1 << 40, 1 << 40, "a box"))
    model = Full()
    from llm_trainer import configure_optimizer

    trainer = make_trainer(tmp_path, max_epochs=1, scheduler=None, val_loader=None)
    trainer = type(trainer)(
        model=model,
        optimizer=configure_optimizer(model=model, lr=0.02),
        train_loader=trainer.run.source,
        device="cpu",
        max_epochs=1,
        progress=False,
        save_dir=str(tmp_path / "full"),
    )
    trainer.train()
    assert trainer.run.budget.tokens == 1 and trainer.run.progress.step == 8
