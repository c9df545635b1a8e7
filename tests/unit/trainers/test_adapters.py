"""Models with adapters under the trainers."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import create_trainer
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.models.rewarding import reward_model

peft = pytest.importorskip("peft", reason="needs peft")


def model_with_adapters(targets: Sequence[str] = ("q_proj", "v_proj")) -> torch.nn.Module:
    """A two-layer model whose adapters already do something, and have dropout."""
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what peft imports
        options = peft.LoraConfig(r=4, target_modules=list(targets), init_lora_weights=False, lora_dropout=0.2)
        return peft.get_peft_model(build_model(shape), options)


def pairs(trainer: str) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    parts = {"dpo": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion")}[trainer]
    batch = {f"{part}_input_ids": torch.randint(1, 64, (4, 5)) for part in parts}
    masks = {f"{part}_attention_mask": torch.ones(4, 5, dtype=torch.long) for part in parts}
    return [batch | masks | ({"desirable": torch.tensor([1, 0, 1, 0])} if trainer == "kto" else {})] * 3


def train(trainer: str, folder: Path, **options: Any) -> tuple[Any, list[float]]:
    model = model_with_adapters()
    learned = [p for p in model.parameters() if p.requires_grad]
    made = create_trainer(
        trainer,
        model=model,
        optimizer=torch.optim.AdamW(learned, lr=1e-2),
        train_loader=pairs(trainer),
        max_epochs=1,
        use_amp=False,
        log_interval=1,
        device="cpu",
        save_dir=str(folder),
        **options,
    )
    made.train()
    text = (folder / "log" / "metrics.jsonl").read_text().splitlines()
    return made, [float(line.split('"loss": ')[1].split(",")[0].rstrip("}")) for line in text if '"loss"' in line]


def test_activations_are_recomputed_inside_of_adapters(tmp_path: Path) -> None:
    made, losses = train("dpo", tmp_path / "recomputed", gradient_checkpointing=True)
    _, expected = train("dpo", tmp_path / "kept")
    assert losses == expected
    assert all(layer.gradient_checkpointing for layer in made.base_model.get_base_model().model.layers)


def test_a_head_that_does_not_run_in_chunks_is_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train("dpo", tmp_path / "chunked")
    assert "not in chunks" not in capsys.readouterr().out
    model = model_with_adapters(["q_proj", "lm_head"])
    learned = [p for p in model.parameters() if p.requires_grad]
    settings = {"max_epochs": 1, "use_amp": False, "device": "cpu", "save_dir": str(tmp_path / "whole")}
    optimizer = torch.optim.AdamW(learned, lr=1e-2)
    create_trainer("dpo", model=model, optimizer=optimizer, train_loader=pairs("dpo"), **settings).train()
    said = capsys.readouterr().out
    assert "not in chunks" in said and "dropout, 0.2; set lora_dropout to 0" in said


def test_a_reward_model_with_adapters_learns_them_and_its_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    options = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(reward_model(build_model(shape), pad_token_id=0), options)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in learned.items()}
    settings = {"max_epochs": 1, "use_amp": False, "device": "cpu", "save_dir": str(tmp_path)}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)
    create_trainer("reward", model=model, optimizer=optimizer, train_loader=pairs("dpo"), **settings).train()
    assert any("score" in name for name in learned) and any("lora_B" in name for name in learned)
    assert all(not torch.equal(before[name], p) for name, p in learned.items())
