"""The lesson's loop against one written with torch's own parts, and against itself after a break."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from llm_trainer.tutorial import AdamWFromScratch, SGDFromScratch, TrainerFromScratch, warmup_cosine

V = 13
SCHEDULE = {"warmup_steps": 2, "total_steps": 8, "min_lr": 1e-4}


class TinyLM(nn.Module):
    def __init__(self, dropout: float = 0.0, wrap=lambda logits: logits) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(V, 8), nn.Linear(8, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, V))
        self.wrap = wrap

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None):
        return self.wrap(self.body(input_ids))


def make_model(**more) -> TinyLM:
    torch.manual_seed(7)
    return TinyLM(**more)


def make_rows(num_rows: int = 14, length: int = 6) -> list[dict[str, torch.Tensor]]:
    """Rows of very unequal numbers of learned tokens."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(num_rows):
        ids = torch.randint(0, V, (length,), generator=generator)
        labels = ids.clone()
        labels[: i % length] = -100
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def make_trainer(model: nn.Module, loader, **more) -> TrainerFromScratch:
    optimizer = AdamWFromScratch(params=model.parameters(), lr=0.02)
    return TrainerFromScratch(
        model=model, optimizer=optimizer, train_loader=loader, device="cpu", log_interval=0, **more
    )


def test_curve_is_that_of_a_loop_with_torchs_parts() -> None:
    """7 batches of 2 rows, 2 a step: 4 steps an epoch, the last of one batch."""
    loader = DataLoader(make_rows(), batch_size=2)
    history = make_trainer(
        make_model(), loader, max_epochs=2, grad_accum_steps=2, max_grad_norm=0.5, **SCHEDULE
    ).train()

    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.01)
    expected: dict[str, list[float]] = {"loss": [], "grad_norm": [], "lr": []}
    batches = list(loader)
    for step in range(8):
        batch = batches[step % 4 * 2 : step % 4 * 2 + 2]
        ids, labels = (torch.cat([micro[key] for micro in batch]) for key in ("input_ids", "labels"))
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        expected["loss"].append(loss.item())
        expected["grad_norm"].append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        expected["lr"].append(warmup_cosine(step, 0.02, **SCHEDULE))
        optimizer.param_groups[0]["lr"] = expected["lr"][-1]
        optimizer.step()
        optimizer.zero_grad()
    assert max(expected["grad_norm"]) > 0.5  # so clipping did something
    assert len(set(expected["loss"])) == 8
    for name, values in expected.items():
        assert history[name] == pytest.approx(values, rel=0, abs=1e-6), name


@pytest.mark.parametrize("save_interval", [0, 3])
def test_resume_is_exact(tmp_path: Path, save_interval: int) -> None:
    """With shuffling and dropout. `save_interval=3`: the break is inside the second epoch of 4 steps (step 6)."""

    def run(folder: Path, max_epochs: int) -> TrainerFromScratch:
        loader = DataLoader(make_rows(), batch_size=2, shuffle=True)
        return make_trainer(
            make_model(dropout=0.3), loader, val_loader=DataLoader(make_rows(4), batch_size=2), max_epochs=max_epochs,
            grad_accum_steps=2, save_dir=folder, save_interval=save_interval, **SCHEDULE
        )  # fmt: skip

    class Killed(Exception):
        pass

    def kill_at_step_seven(micro_batches) -> None:
        if broken.step == 7:
            raise Killed
        TrainerFromScratch.train_step(broken, micro_batches)

    whole = run(tmp_path / "whole", 3)
    expected = whole.train()
    broken = run(tmp_path / "broken", 3)
    broken.train_step = kill_at_step_seven
    with pytest.raises(Killed):
        broken.train()

    torch.manual_seed(999)  # whatever the new process did before
    resumed = run(tmp_path / "broken", 3)
    resumed.load_checkpoint(tmp_path / "broken" / "latest.pt")
    assert resumed.step == (6 if save_interval else 4)
    assert resumed.train() == expected
    assert len(expected["loss"]) == 12 and len(expected["val_loss"]) == 3
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not list(tmp_path.rglob("*.unfinished"))


def test_best_checkpoint_is_the_best_epoch(tmp_path: Path) -> None:
    loader = DataLoader(make_rows(), batch_size=7)
    trainer = make_trainer(make_model(), loader, val_loader=loader, max_epochs=3, save_dir=tmp_path)
    history = trainer.train()
    assert history["val_loss"][0] > history["val_loss"][2] == trainer.best_val_loss
    trainer.load_checkpoint(tmp_path / "best.pt")
    assert trainer.validate(loader) == min(history["val_loss"])


def test_validation_is_the_mean_over_tokens_without_dropout() -> None:
    rows = make_rows()
    model = make_model(dropout=0.5)
    loss = make_trainer(model, []).validate(DataLoader(rows, batch_size=3))
    assert model.training
    ids, labels = (torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels"))
    logits = model.eval()(ids)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
    assert loss == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("wrap", [lambda x: {"logits": x}, lambda x: SimpleNamespace(logits=x)])
def test_every_kind_of_output(wrap) -> None:
    loader = DataLoader(make_rows(4), batch_size=2)
    assert make_trainer(make_model(wrap=wrap), loader).train() == make_trainer(make_model(), loader).train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_near_full_precision(dtype: torch.dtype) -> None:
    loader = DataLoader(make_rows(), batch_size=2)
    full = make_trainer(make_model(), loader, max_epochs=2).train()
    mixed = make_trainer(make_model(), loader, max_epochs=2, use_amp=True, amp_dtype=dtype).train()
    assert mixed["loss"] != full["loss"]
    assert mixed["loss"] == pytest.approx(full["loss"], abs=0.02)
    assert mixed["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.05)


def test_loss_scale_backs_off_and_leaves_the_update_out() -> None:
    model = make_model()
    trainer = make_trainer(model, DataLoader(make_rows(2), batch_size=2), use_amp=True, amp_dtype=torch.float16)
    trainer.loss_scale = 2.0**40  # float16 ends at 65504
    before = [p.clone() for p in model.parameters()]
    history = trainer.train()
    assert not math.isfinite(history["grad_norm"][0])
    assert trainer.loss_scale == 2.0**39
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_broken_gradient_stops_the_run() -> None:
    model = make_model()
    with torch.no_grad():
        model.body[1].weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="gradient norm is nan at step 0"):
        make_trainer(model, DataLoader(make_rows(2), batch_size=2)).train()


def test_without_clipping_sgd_moves_by_the_gradient() -> None:
    rows = make_rows(2)
    model = make_model()
    before = [p.clone() for p in model.parameters()]
    optimizer = SGDFromScratch(params=model.parameters(), lr=0.1)
    loader = DataLoader(rows, batch_size=2)
    trainer = TrainerFromScratch(
        model=model, optimizer=optimizer, train_loader=loader, max_grad_norm=0, device="cpu", log_interval=0
    )
    grad_norm = trainer.train()["grad_norm"][0]
    moved = math.sqrt(sum(((p - q) ** 2).sum().item() for p, q in zip(model.parameters(), before, strict=True)))
    assert moved == pytest.approx(0.1 * grad_norm, rel=1e-5)


def test_log_lines_come_every_few_steps(capsys: pytest.CaptureFixture) -> None:
    trainer = make_trainer(make_model(), DataLoader(make_rows(), batch_size=2))
    trainer.log_interval = 3
    trainer.train()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["3", "6"]
