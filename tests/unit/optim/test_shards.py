"""Moments in 8 bits whose blocks stay within a row: what they take, that they learn, and what is refused."""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.assemble import make_optimizer
from llm_trainer.config.load import parse
from llm_trainer.optim.optimizers import create_optimizer, state_bytes
from llm_trainer.optim.shards import AdamW8bitOfShards, block_of
from policies import tiny

IDS = torch.arange(3, 35).reshape(4, 8)
ROWS = [{"input_ids": IDS % 24, "labels": IDS % 24}] * 3
NAME = "adamw8bit_fsdp"


@pytest.fixture
def package() -> None:
    pytest.importorskip("torchao", reason="needs torchao, which is not among the packages of the tests")


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(128, 256, bias=False)


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((16, 512), 256),
        ((16, 896), 128),
        ((128, 64), 64),
        ((8, 4, 128), 256),
        ((128, 48), None),
        ((4096,), None),
        ((8, 256), None),
    ],
)
def test_blocks_stay_within_a_row(shape: tuple[int, ...], block: int | None) -> None:
    assert block_of(torch.empty(shape, device="meta")) == block


def test_a_moment_is_a_byte_for_each_value_and_a_scale_for_each_block(package: None) -> None:
    model = layer()
    optimizer = configure_optimizer(model, NAME)
    expected = state_bytes(optimizer)
    model(torch.randn(4, 128)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    held = sum(value.nbytes for key, value in state.items() if key != "step")
    assert expected == held == 2 * (256 * 128 + 256 * 4)
    assert state["exp_avg"].dtype == torch.uint8 and state["exp_avg_scale"].shape == (256, 1)


@pytest.mark.parametrize("other", ["adamw", "adamw8bit"])
def test_it_learns_as_with_32_bits_and_as_on_one_process(other: str, package: None) -> None:
    if other == "adamw8bit" and find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    curves = []
    for name in (NAME, other):
        model = layer()
        optimizer = configure_optimizer(model, name, lr=1e-3)
        inputs = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
        curves.append([])
        for _ in range(50):
            loss = model(inputs).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
    assert curves[0] == pytest.approx(curves[1], rel=0.15) and curves[0][-1] < 0.2 * curves[0][0]
    assert curves[0] != curves[1]


def trained(folder: Path, epochs: int) -> Any:
    model = tiny(hidden_size=64)
    optimizer = configure_optimizer(model, NAME, lr=1e-2)
    how: dict[str, Any] = {"max_epochs": epochs, "resume": "auto", "device": "cpu", "save_dir": str(folder)}
    SFTTrainer(model=model, optimizer=optimizer, train_loader=ROWS, **how).train()
    return model, optimizer


def test_a_run_goes_on_bit_for_bit(tmp_path: Path, package: None) -> None:
    straight, _ = trained(tmp_path / "straight", 2)
    trained(tmp_path / "stopped", 1)
    resumed, optimizer = trained(tmp_path / "stopped", 2)
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True)
    )
    kept = {state["exp_avg"].dtype for state in optimizer.state.values()}
    assert kept == {torch.uint8, torch.float32}


def test_fsdp_takes_it_under_the_name_of_the_other(package: None) -> None:
    values = {"model_config": "m", "file_dataset": "none", "sft_config": {}}
    described = parse(values | {"optim_config": {"optim_type": "adamw8bit"}}, "test")
    assert isinstance(make_optimizer(described, layer(), "fsdp"), AdamW8bitOfShards)


def test_the_state_of_another_optimizer_is_refused(package: None) -> None:
    model = layer()
    optimizer = configure_optimizer(model, NAME)
    optimizer.state[model.weight] = {"state1": torch.zeros(1), "step": 1}
    model(torch.randn(4, 128)).sum().backward()
    with pytest.raises(
        ValueError, match=r"holds state1, step of a parameter, the state of another optimizer, .*engine: torch"
    ):
        optimizer.step()


def test_where_the_package_is_missing_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(
        ValueError, match="'adamw8bit_fsdp' needs the package torchao, .*: pip install torchao, or take one"
    ):
        create_optimizer([nn.Parameter(torch.ones(1))], NAME)
