"""One file and one line each, from outside the package: a kind of rows, an engine, an optimizer (an algorithm: see
`test_own_algorithm.py`). Each is used from YAML.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import Trainer
from llm_trainer.config.engines import ENGINES, EngineEntry
from llm_trainer.config.load import parse
from llm_trainer.data.kinds import KINDS, Encoded, Sample, get_kind
from llm_trainer.data.kinds.language import TEXT, encode_text
from llm_trainer.engine.base import EngineOptions
from llm_trainer.engine.torch import TorchEngine
from llm_trainer.optim.optimizers import OPTIMIZERS, Recipe

# --- what somebody outside would write


def encode_backwards(chat: Any, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Texts, last token first."""
    for row in encode_text(chat, samples):
        assert not isinstance(row, str)
        yield {"input_ids": row["input_ids"][::-1]}


BACKWARDS = replace(TEXT, name="backwards", encode=encode_backwards)


class BackwardsTrainer(Trainer):
    """Pretraining on a kind of rows of its own."""

    rows = ("backwards",)

    @classmethod
    def _data_from_config(cls, section: Any) -> Any:
        return super(Trainer, cls)._data_from_config(section)


class CountingEngine(TorchEngine):
    """Counts its updates."""

    name = "counting"
    updates = 0

    def step(self, max_grad_norm: float) -> tuple[float, bool]:
        CountingEngine.updates += 1
        return super().step(max_grad_norm)


def make_counting(options: EngineOptions) -> CountingEngine:
    return CountingEngine(options.device, options.precision)


class SignSGD(torch.optim.Optimizer):
    """Steps of `lr` against the sign of the gradient (Bernstein et al. 2018, arXiv:1802.04434, algorithm 1)."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])


# --- and that it works


@pytest.fixture
def run(tmp_path: Path, reference_dir: Path) -> dict[str, Any]:
    """A described run of pretraining."""
    rows = [{"text": "one two three four five"[: 3 + 2 * n]} for n in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model_config": {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "tokenizer": str(reference_dir / "tokenizer"),
        "file_dataset": str(tmp_path / "texts.jsonl"),
        "dataset_block_size": 16,
        "batch_size": 2,
        "pretrain_config": {},
        "run_config": {"save_dir": str(tmp_path / "run"), "log_interval": 1, "progress": False, "precision": "fp32"},
    }


def test_a_kind_of_rows(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KINDS, "backwards", f"{__name__}:BACKWARDS")
    assert get_kind("backwards") is BACKWARDS
    run["data_loader_config"] = {"packing": "none", "data_loader_shuffle": False}
    forwards = Trainer(train_config=parse(run, "run"))
    backwards = BackwardsTrainer(train_config=parse(run, "run"))
    ours = [forwards.run.source.dataset[i]["input_ids"].tolist() for i in range(8)]
    theirs = [backwards.run.source.dataset[i]["input_ids"].tolist() for i in range(8)]
    assert theirs == [ids[::-1] for ids in ours]
    assert backwards.train()["loss"] > 0


def test_an_engine(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "counting", EngineEntry(f"{__name__}:make_counting"))
    run["run_config"]["engine"] = "counting"
    trainer = Trainer(train_config=parse(run, "run"))
    trainer.train()
    assert CountingEngine.updates == trainer.run.progress.step > 0
    monkeypatch.delitem(ENGINES, "counting")
    with pytest.raises(ValueError, match="engine: .*'counting'.*auto, torch, fsdp, deepspeed, hf"):
        parse(run, "run")


def test_an_optimizer(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIMIZERS, "sign_sgd", Recipe(SignSGD, state=lambda parameter, group: 0))
    run["optim_config"] = {"optim_type": "sign_sgd", "initial_lr": 1e-3, "weight_decay": 0.0}
    trainer = Trainer(train_config=parse(run, "run"))
    before = [parameter.detach().clone() for parameter in trainer.base_model.parameters()]
    assert trainer.run.size.optimizer_bytes == 0  # the memory that the first screen expects
    trainer.train()
    moved = [(b - a).abs().max().item() for a, b in zip(before, trainer.base_model.parameters(), strict=True)]
    steps = trainer.run.progress.step
    assert 0 < max(moved) <= steps * 1e-3 * (1 + 1e-4)
