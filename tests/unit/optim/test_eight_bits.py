"""Moments in 8 bits: what they take, that they learn, and that a run goes on from a checkpoint bit for bit."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.config.options import Fsdp
from llm_trainer.engine.fsdp import FsdpEngine
from llm_trainer.optim.optimizers import create_optimizer, state_bytes
from policies import tiny

IDS = torch.arange(3, 35).reshape(4, 8)
ROWS = [{"input_ids": IDS % 24, "labels": IDS % 24}] * 3
EIGHT_BITS = {"adamw8bit": "adamw", "lion8bit": "lion"}  # -> the same in 32
VALUES = 256 * 128


@pytest.fixture(autouse=True)
def package() -> None:
    pytest.importorskip("bitsandbytes")


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(128, 256, bias=False)


@pytest.mark.parametrize(("name", "moments"), [("adamw8bit", 2), ("lion8bit", 1)])
def test_a_moment_is_a_byte_for_each_value_and_a_scale_for_each_block(name: str, moments: int) -> None:
    model = layer()
    optimizer = configure_optimizer(model, name)
    expected = state_bytes(optimizer)
    model(torch.randn(4, 128)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert state["state1"].dtype == torch.uint8
    assert expected == moments * (VALUES + VALUES // 256 * 4)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_it_learns_as_with_32_bits(name: str) -> None:
    ends = []
    for each in (name, EIGHT_BITS[name]):
        model = layer()
        optimizer = configure_optimizer(model, each, lr=1e-3)
        inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
        for _ in range(50):
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(loss.item())
    start = layer()(inputs).square().mean().item()
    assert ends[0] == pytest.approx(ends[1], rel=0.15) and ends[0] < 0.2 * start


def trained(folder: Path, name: str, epochs: int) -> Any:
    model = tiny(hidden_size=64)
    optimizer = configure_optimizer(model, name, lr=1e-2)
    trainer = SFTTrainer(
        model=model,
        optimizer=optimizer,
        train_loader=ROWS,
        save_dir=str(folder),
        max_epochs=epochs,
        resume="auto",
        device="cpu",
    )
    trainer.train()
    return model, optimizer


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_a_run_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    straight, _ = trained(tmp_path / "straight", name, 2)
    trained(tmp_path / "stopped", name, 1)
    resumed, optimizer = trained(tmp_path / "stopped", name, 2)
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    kept = [state["state1"].dtype for state in optimizer.state.values()]
    assert torch.uint8 in kept and torch.float32 in kept  # small parameters keep their 32 bits


def test_where_the_package_is_missing_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    message = (
        "'adamw8bit' needs the package bitsandbytes, .*: pip install bitsandbytes, or take one of adamw, adam, sgd"
    )
    with pytest.raises(ValueError, match=message):
        create_optimizer([nn.Parameter(torch.ones(1))], "adamw8bit")


def test_shards_are_refused() -> None:
    model = layer()
    engine = FsdpEngine(torch.device("cpu"), "fp32", Fsdp())
    with pytest.raises(
        ValueError, match=r"AdamW8bit cannot update matrices that are sharded \(FSDP\); use one of adamw"
    ):
        engine.prepare(model, model, configure_optimizer(model, "adamw8bit"))
