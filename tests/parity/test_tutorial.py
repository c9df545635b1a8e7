"""The tutorial edition is the specification: same seed, same data, same curve as `torch.optim` and the production trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.optim.optimizers import create_optimizer
from llm_trainer.optim.schedules import create_scheduler
from llm_trainer.train.hooks import Hook
from llm_trainer.tutorial import AdamWFromScratch, SGDFromScratch, TrainerFromScratch

TOLERANCE = 1e-6
STEPS = 12


class Small(nn.Module):
    """One attention-free block: enough for every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.norm = nn.LayerNorm(16)
        self.mix = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 50)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.mix(self.norm(self.embed(input_ids)))[0])


def model() -> Small:
    torch.manual_seed(0)
    return Small()


def batches() -> list[dict[str, Tensor]]:
    """Micro-batches with very uneven numbers of supervised tokens."""
    noise = torch.Generator().manual_seed(1)
    found = []
    for i in range(8):
        ids = torch.randint(0, 50, (3, 9), generator=noise)
        labels = ids.masked_fill(torch.rand(3, 9, generator=noise) < (0.1, 0.5, 0.95)[i % 3], -100)
        found.append({"input_ids": ids, "labels": labels})
    return found


def production(optimizer: str, options: dict[str, Any], folder: Path, accumulation: int) -> list[tuple[float, float]]:
    seen: list[tuple[float, float]] = []
    trained = model()
    chosen = create_optimizer(trained.parameters(), optimizer, lr=3e-2, **options)
    SFTTrainer(
        model=trained,
        optimizer=chosen,
        scheduler=create_scheduler(chosen, "cosine", warmup_steps=3, total_steps=STEPS, min_lr=1e-3),
        train_loader=batches(),
        device="cpu",
        max_epochs=3,
        grad_accum_steps=accumulation,
        max_grad_norm=0.5,
        use_amp=False,
        log_interval=1,
        save_dir=str(folder),
        save_interval=0,
        progress=False,
        hooks=[Hook("watch", lambda run: seen.append(_last(run)), every_steps=1)],
    ).train()
    return seen


def _last(run: Any) -> tuple[float, float]:
    return run.values["loss"], run.values["grad_norm"]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("name", "scratch", "options"),
    [
        ("adamw", AdamWFromScratch, {"weight_decay": 0.1}),
        ("sgd", SGDFromScratch, {"momentum": 0.9, "weight_decay": 0.01}),
    ],
)
def test_the_tutorial_and_the_production_edition_give_one_curve(
    name: str, scratch: type, options: dict[str, Any], accumulation: int, tmp_path: Path
) -> None:
    taught = model()
    lesson = TrainerFromScratch(
        model=taught,
        optimizer=scratch(params=taught.parameters(), lr=3e-2, **options),
        train_loader=batches(),
        device="cpu",
        max_epochs=3,
        grad_accum_steps=accumulation,
        max_grad_norm=0.5,
        warmup_steps=3,
        total_steps=STEPS,
        min_lr=1e-3,
        log_interval=0,
    ).train()
    curve = production(name, options, tmp_path, accumulation)
    assert len(curve) == len(lesson["loss"]) == 24 // accumulation
    for (loss, norm), expected_loss, expected_norm in zip(curve, lesson["loss"], lesson["grad_norm"], strict=True):
        assert loss == pytest.approx(expected_loss, abs=TOLERANCE)
        assert norm == pytest.approx(expected_norm, abs=TOLERANCE * 10)


def test_the_optimizers_of_both_editions_share_their_groups() -> None:
    trained = model()
    groups = configure_optimizer(trained, lr=1e-2, weight_decay=0.1).param_groups
    assert {p.ndim for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0
