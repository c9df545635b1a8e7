"""What recomputed layers keep waits in host memory: the same bits, no graph is kept alive, and where it is refused."""

import copy
import gc
import json
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from failing_memory import FailingMemory, num_rows
from later_copies import LaterCopies
from llm_trainer import SFTTrainer
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.load import parse
from llm_trainer.config.options import ON_THEIR_WAY, Settings
from llm_trainer.engine import recompute
from llm_trainer.engine.recompute import SMALLEST, Kept, Offload, check_offload
from llm_trainer.train.hooks import Hook

WIDTH, LAYERS = 16, 5
ROWS = SMALLEST // WIDTH // 4


class Layers(nn.Module):
    """Layers with dropout, each computed again by `again`."""

    def __init__(self, again: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.again(lambda x, layer=layer: x + torch.dropout(torch.tanh(layer(x)), 0.2, True), x)
        return x


def plain(layer: Any, x: Tensor) -> Any:
    return checkpoint(layer, x, use_reentrant=False)


def gradients(again: Any, num_backwards: int = 1) -> list[Tensor]:
    model = Layers(again)
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    loss = model(x).square().sum()
    for left in reversed(range(num_backwards)):
        loss.backward(retain_graph=left > 0)
    return [each.grad for each in (*model.parameters(), x) if each.grad is not None]


@pytest.mark.parametrize("num_backwards", [1, 2])
def test_gradients_are_the_same_bits_however_late_copies_are_made(num_backwards: int) -> None:
    copies = LaterCopies(torch.device("cpu"))
    found, expected = gradients(Offload(copies), num_backwards), gradients(plain, num_backwards)
    assert len(found) == len(expected) == 2 * LAYERS + 1
    assert all(map(torch.equal, found, expected))
    assert sum(copy.outward for copy in copies.begun) == LAYERS and copies.most_leaving == ON_THEIR_WAY
    inward = [copy for copy in copies.begun if not copy.outward]
    assert len(inward) >= LAYERS - ON_THEIR_WAY  # the last ones had not left


def test_nothing_is_left_of_a_graph_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Kept]] = []
    made = Kept.__init__

    def make(self: Kept, *args: Any) -> None:
        made(self, *args)
        kept.append(weakref.ref(self))

    monkeypatch.setattr(Kept, "__init__", make)
    loss = Layers(Offload(LaterCopies(torch.device("cpu"))))(torch.randn(ROWS, WIDTH)).sum()
    assert all(each() is not None for each in kept) and len(kept) == LAYERS
    del loss
    gc.collect()
    assert all(each() is None for each in kept)


def test_a_backward_that_fails_does_not_harm_the_next_one() -> None:
    """A layer's input is on its way back already, for the layer that would have been next."""

    def fails(gradient: Tensor) -> None:
        raise RuntimeError("out of memory")

    model = Layers(Offload(LaterCopies(torch.device("cpu"))))
    hook = model.layers[2].weight.register_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(torch.randn(ROWS, WIDTH)).sum().backward()
    hook.remove()
    found = []
    for each in (model, Layers(plain)):
        each.zero_grad()
        torch.manual_seed(1)
        each(torch.randn(ROWS, WIDTH)).sum().backward()
        found.append([parameter.grad for parameter in each.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("num_layers", [1, 4])
def test_what_was_written_into_meanwhile_is_an_error(num_layers: int) -> None:
    """As without: whether it has left by then or not."""
    again = Offload(LaterCopies(torch.device("cpu")))
    kept, weight = torch.ones(ROWS, WIDTH), torch.ones((), requires_grad=True)
    x = again(lambda x: x * weight, kept)
    kept.add_(1)
    with pytest.raises(RuntimeError, match="what entered a layer was changed in place"):
        for _ in range(num_layers):
            x = again(lambda x: x * weight, x)
        x.sum().backward()


def test_what_is_small_or_no_number_stays() -> None:
    copies = LaterCopies(torch.device("cpu"))
    again = Offload(copies)
    ids, few, weight = torch.arange(4096), torch.ones(SMALLEST // 4 - 1), torch.ones((), requires_grad=True)
    again(lambda ids, few, weight: (few * weight).sum() + 0 * ids.sum(), ids, few, weight).backward()
    assert not copies.begun


Made = list[LaterCopies]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    """The copies of each run that is made, for which CPUs count as devices with a memory of their own."""
    copies: Made = []

    def make(device: torch.device) -> LaterCopies:
        copies.append(LaterCopies(device))
        return copies[-1]

    monkeypatch.setitem(recompute.COPIES, "cpu", make)
    return copies


ROW = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2 3"}]


def trainer(
    folder: Path, reference_dir: Path, offload: bool = True, hooks: Sequence[Hook] = (), **sections: Any
) -> Any:
    """A run over four ragged rows, two in a step, whose layers are computed again."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "rows.jsonl"
    rows = [[ROW[0], ROW[1] | {"content": "1 2 3" + " 4 5 6" * n}] for n in range(4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"precision": "fp32", "device": "cpu", "log_interval": 1, "progress": False, "save_interval_steps": 1}
    run |= {"gradient_checkpointing": True, "activation_offload": offload, "save_dir": str(folder)}
    values: dict[str, Any] = {
        "model_config": {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "attention_dropout": 0.1},
        "tokenizer": str(reference_dir / "tokenizer"),
        "file_dataset": str(data),
        "batch_size": 2,
        "n_epochs": 2,
        "optim_config": {"initial_lr": 1e-2},
        "sft_config": {},
    }
    run |= sections.pop("run_config", {})
    return SFTTrainer(train_config=parse(values | {"run_config": run} | sections, "test"), hooks=hooks)


def curve(folder: Path) -> list[tuple[float, float]]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


WAYS: dict[str, dict[str, Any]] = {
    "flat": {},
    "adapters in bf16, padded, a row at a time": {
        "adapter_config": {"rank": 2},
        "run_config": {"precision": "bf16"},
        "data_loader_config": {"packing": "none", "micro_batch_tokens": 30},
    },
    "transformers": {"run_config": {"engine": "hf"}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_is_the_same_bits(way: str, tmp_path: Path, reference_dir: Path, made: Made) -> None:
    if "adapters" in way:
        pytest.importorskip("peft", reason="needs peft")
    for folder, offload in (("kept", False), ("offloaded", True)):
        trainer(tmp_path / folder, reference_dir, offload, **copy.deepcopy(WAYS[way])).train()
    assert curve(tmp_path / "offloaded") == curve(tmp_path / "kept") and len(curve(tmp_path / "kept")) == 4
    (copies,) = made
    outward = sum(each.outward for each in copies.begun)
    assert outward % 4 == 0 and outward >= 4 * 4 and outward < len(copies.begun)  # each layer's, of each micro-batch


def test_it_goes_on_bit_for_bit_and_where_memory_ran_out(tmp_path: Path, reference_dir: Path, made: Made) -> None:
    def breaks(view: Any) -> None:
        raise KeyboardInterrupt

    for folder in ("whole", "in two"):
        hooks = [Hook("breaks", breaks, every_steps=3)] * (folder == "in two")
        described = trainer(tmp_path / folder, reference_dir, hooks=hooks)
        memory = FailingMemory(described, described.base_model.model.layers[1], lambda batch: "")
        memory.fails = lambda batch, memory=memory: "backward" * (memory.failures == 0 and num_rows(batch) == 2)
        with pytest.raises(KeyboardInterrupt) if hooks else nullcontext():
            described.train()
        assert memory.failures == 1
    trainer(tmp_path / "in two", reference_dir).train()
    assert curve(tmp_path / "in two") == curve(tmp_path / "whole") and len(curve(tmp_path / "whole")) == 4
    assert len(made) == 3


@pytest.mark.parametrize(
    ("options", "device", "message"),
    [
        (
            {"gradient_checkpointing": False},
            "cuda",
            "got true without gradient_checkpointing, .* Expected gradient_chec",
        ),
        ({}, "cpu", "this run is on cpu, whose memory is the host's, .*expected a run on a GPU"),
        ({}, "mps", "this run is on mps, whose memory is the host's"),
        ({"deepspeed": {"activation_checkpointing": {}}}, "cuda", "expected cpu_checkpointing: true there"),
    ],
)
def test_where_it_is_of_no_use_it_is_refused(options: dict[str, Any], device: str, message: str) -> None:
    settings = Settings(**({"gradient_checkpointing": True, "activation_offload": True} | options))
    with pytest.raises(ConfigError, match=f"activation_offload: .*{message}"):
        check_offload(settings, torch.device(device), "deepspeed", settings.deepspeed)


def test_it_is_refused_before_anything_is_read(tmp_path: Path, reference_dir: Path) -> None:
    with pytest.raises(ConfigError, match="activation_offload: this run is on cpu"):
        trainer(tmp_path, reference_dir, tokenizer="nowhere")
