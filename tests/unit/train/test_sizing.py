"""The size of micro-batches that the machine chooses: the fastest that fits, and nothing but rounding changes by it."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.collate import collate_flat, collate_padded
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine.room import Room
from llm_trainer.model_group import ModelGroup
from llm_trainer.models.build import build_model
from llm_trainer.models.critic import critic_of
from llm_trainer.models.frozen import freeze
from llm_trainer.models.rewarding import reward_model
from llm_trainer.state import Progress
from llm_trainer.train import sizing
from llm_trainer.train.budget import Budget
from llm_trainer.train.retry import Steps
from llm_trainer.train.size import Size

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from victim import Rows, make_model


class Own(SFTTrainer):
    """Sees its micro-batches in a way of its own, and does not say that they may be cut."""

    def _forward(self, batch: Any) -> Any:
        return super()._forward(batch)


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ModelConfig(vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))


def stream(**options: Any) -> SampleStream:
    given = {"collate": collate_padded, "rows_per_step": 8, "batch_size": 2}
    return SampleStream(Rows(30), **(given | options))


def trained(folder: Path, model: nn.Module | None = None, kind: type = SFTTrainer, **options: Any) -> Any:
    model = model or tiny()
    given: dict[str, Any] = {"train_loader": stream(), "max_epochs": 1, "log_interval": 1, "save_interval": 0}
    optimizer = configure_optimizer(model, lr=0.01)
    how = {"device": "cpu", "precision": "fp32", "progress": False, "save_dir": str(folder)}
    trainer = kind(model, optimizer, **(given | how | options))
    trainer.train()
    return trainer


def losses(folder: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def test_memory_of_several_models_is_that_of_all_that_learn() -> None:
    """So PPO's micro-batches are sized as others are; a body that two share, and a frozen model, do not count again."""

    def layers(model: nn.Module, other: nn.Module) -> int | None:
        group = ModelGroup(model, {"other": other})
        shape = Size.of(group, configure_optimizer(model, lr=0.1), None).shape
        return None if shape is None else shape.num_layers

    model = tiny()
    assert layers(model, reward_model(tiny(), pad_token_id=0)) == 2
    assert layers(model, critic_of(model, None, on_policy=True)) == 1
    assert layers(model, freeze(tiny())) == 1
    assert layers(model, nn.Linear(2, 2)) is None


@pytest.mark.parametrize("flat", [False, True])
def test_on_cpus_it_is_the_fastest_whatever_the_memory(tmp_path, flat, capsys):
    """One micro-batch is left of the four of each step, and rows, losses and gradient norms are the same."""
    layout = {"flat": flat, "collate": collate_flat if flat else collate_padded}
    by_rows = trained(tmp_path / "rows", train_loader=stream(**layout, micro_batch_tokens=None))
    assert by_rows.run.budget.tokens is None and "micro-batches" not in by_rows.run.choices
    capsys.readouterr()
    chosen = trained(tmp_path / "auto", train_loader=stream(**layout), val_loader=stream(**layout))
    fastest = sizing.FASTEST
    assert chosen.run.budget.tokens == chosen.run.source.micro_batch_tokens == fastest
    assert chosen.run.val_sources[""].micro_batch_tokens == fastest
    screen = capsys.readouterr().out
    assert re.search(rf"micro-batches +{fastest:,} tokens:? +the fastest on CPUs +\[micro_batch_tokens=None\]", screen)
    assert f"in micro-batches of {fastest:,} tokens" in screen
    ((micro_batches, _), *_) = chosen.run.source.steps(0, 0)
    assert len(micro_batches) == 1
    for one, other in zip(losses(tmp_path / "rows"), losses(tmp_path / "auto"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_ready_micro_batches_of_a_loader_are_put_together_as_well(tmp_path):
    rows = Rows(32)
    loader = [collate_padded([rows[i] for i in range(first, first + 2)]) for first in range(0, 32, 2)]
    given = {"train_loader": loader, "grad_accum_steps": 4, "max_steps": 3}
    trained(tmp_path / "rows", **given, micro_batch_tokens=None, packing="none")
    chosen = trained(tmp_path / "auto", **given)
    assert chosen.run.source.micro_batch_tokens == sizing.FASTEST
    ((micro_batches, position), *_) = chosen.run.source.steps(0, 0)
    assert len(micro_batches) == 1 and position == 4
    for one, other in zip(losses(tmp_path / "rows"), losses(tmp_path / "auto"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize(("flat", "compiled"), [(True, sizing.FASTEST_COMPILED), (False, sizing.FASTEST)])
def test_compiled_layers_take_more_tokens_of_flat_rows(tmp_path, flat, compiled):
    """They keep less for the backward; a run that is compiled from the start has that number from the start."""
    collate = collate_flat if flat else collate_padded
    trainer = trained(tmp_path, train_loader=stream(flat=flat, collate=collate))
    budget = trainer.run.budget
    assert budget.compiled(True) == (compiled != sizing.FASTEST) and budget.tokens == compiled
    again = Budget("auto", [stream()], budget.machine)
    again.load_state_dict(budget.state_dict())
    assert again.tokens == compiled
    again.compiled(False)
    assert again.tokens == sizing.FASTEST
    again.shrink(1500)
    assert not again.compiled(True) and again.tokens == 768  # what did not fit plain is not tried with more
    budget.is_settled = False
    trainer.run.compiling._layers.is_on = True
    sizing.settle(trainer.run.work, trainer.run.size, trainer.run.settings)
    assert budget.tokens == compiled


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_step_is_cut_by_the_number_that_is_in_force_when_it_comes(tmp_path, is_stream):
    """The same rows in the same steps, whether the source is opened anew or cuts what it has."""
    loader = stream() if is_stream else [collate_padded([Rows(30)[row]]) for row in range(24)]
    work = trained(tmp_path, train_loader=loader, grad_accum_steps=8, max_steps=1, packing="none").run.work
    progress = Progress()
    steps = Steps(work, progress)
    whole, position = next(steps)
    progress.advance(position)
    work.budget.settle(40, "to see what comes of it")
    cut, position = next(steps)
    progress.advance(position)
    work.budget.settle(4096, "to see what comes of it")
    last, _ = next(steps)
    assert [len(whole), len(last)] == [1, 1] and len(cut) > 1
    ids = [torch.cat([micro_batch.batch["input_ids"].flatten() for micro_batch in step]) for step in (whole, cut, last)]
    expected = [Rows(30)[int(row)]["input_ids"] for row in range(24)]
    found = np.sort(np.concatenate(ids))
    assert is_stream or np.array_equal(found[found > 0], np.sort(np.concatenate(expected)))


def test_memory_bounds_it(tmp_path, monkeypatch):
    """Half the memory is half the tokens, in few sizes; weights to come count first; ranks take the smallest."""
    trainer = trained(tmp_path)
    work, settings = trainer.run.work, trainer.run.settings
    cost = sizing.bytes_by_formula(trainer.run.engine, trainer.run.size, settings)
    assert cost is not None and cost(2048) > 1.8 * cost(1024)
    found = []
    for free in (cost(2048), cost(1100), 0):
        monkeypatch.setattr(sizing, "room_on", lambda device, free=free: Room(int(free / sizing.SHARE) + 1, 0, "a box"))
        monkeypatch.setattr(sizing, "_still_to_come", lambda *about: 0.0)
        work.budget.is_settled = False
        sizing.settle(work, trainer.run.size, settings)
        found.append(work.budget.tokens)
    assert found == [2048, 1024, 1] and "of a box" in work.budget.why
    monkeypatch.setattr(sizing.dist, "extremes", lambda values: [(value // 2, value) for value in values])
    monkeypatch.setattr(sizing, "room_on", lambda device: Room(1 << 50, 0, "a box"))
    work.budget.is_settled = False
    sizing.settle(work, trainer.run.size, settings)
    assert work.budget.tokens == sizing.FASTEST // 2 and work.budget.why == "what fits on every rank"


def test_what_is_to_come_is_kept_free(tmp_path):
    """Gradients, and the optimizer's state unless it is there; a copy for checkpoints."""
    trainer = trained(tmp_path, max_steps=1)
    size, settings = trainer.run.size, trainer.run.settings
    there = sizing._still_to_come(trainer.run.work, size, settings)
    trainer.optimizer.state.clear()
    assert sizing._still_to_come(trainer.run.work, size, settings) - there == size.optimizer_bytes
    assert there == size.trained_bytes + size.bytes + size.optimizer_bytes


class Normed(nn.Module):
    """Rows that see each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(512, 8), nn.BatchNorm1d(8), nn.Linear(8, 512)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits `[B, T, V]` of ids `[B, T]`."""
        return self.head(self.norm(self.embed(input_ids).mT).mT)


@pytest.mark.parametrize(("model", "kind", "why"), [(tiny, Own, "Own"), (Normed, SFTTrainer, "depend on each other")])
def test_what_may_not_be_cut_stays_as_it_comes(tmp_path, model, kind, why):
    trainer = trained(tmp_path, model(), kind)
    assert trainer.run.budget.tokens is None and why in trainer.run.budget.why
    ((micro_batches, _), *_) = trainer.run.source.steps(0, 0)
    assert [len(micro_batch.batch["input_ids"]) for micro_batch in micro_batches] == [2, 2, 2, 2]


def test_ready_made_micro_batches_come_together(tmp_path):
    """Those of a loader too, but for what is no table of rows; a step of one that fits is not touched."""
    batches = [collate_padded([Rows(30)[row] for row in rows]) for rows in ((0, 1), (2, 3), (4, 5), (6, 7))]
    trainer = trained(tmp_path, train_loader=batches, grad_accum_steps=2, max_epochs=1)
    source = trainer.run.source
    assert trainer.run.budget.tokens == sizing.FASTEST
    steps = [step for step, _ in source.steps(0, 0)]
    assert [[len(micro_batch.batch["input_ids"]) for micro_batch in step] for step in steps] == [[4], [4]]
    source.accumulation = 1
    assert all(step[0].batch is batch for (step, _), batch in zip(source.steps(0, 0), batches, strict=True))
    source.accumulation = 2
    batches[1]["pictures"] = torch.zeros(2, 3, 4, 4)
    first, second = [step for step, _ in source.steps(0, 0)]
    assert first[0].batch is batches[0] and first[1].batch is batches[1] and len(second) == 1


def test_ready_made_micro_batches_of_a_model_that_nobody_knows_stay(tmp_path):
    """Nothing says what a token of it takes, and a loader cannot be looked at before its first step."""
    trainer = trained(tmp_path, make_model("plain"), train_loader=[collate_padded([Rows(30)[0]])] * 4)
    assert trainer.run.budget.tokens is None and "not known" in trainer.run.budget.why
