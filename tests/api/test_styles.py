"""Both styles are one hierarchy: the same run described twice gives bit-identical curves and weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_trainer
from described import curve, describe, write_rows
from llm_trainer import SFTTrainer, Trainer, configure_optimizer, create_trainer, get_trainer_class
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.build import build_model
from llm_trainer.train_configs import (
    EvalConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
)

SHAPE = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture
def conversations(tmp_path: Path) -> Path:
    path = tmp_path / "chat.jsonl"
    rows = [
        [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": " ".join(map(str, range(n)))}]
        for n in range(1, 13)
    ]
    return write_rows(path, rows)


def config(path: Path, reference_dir: Path, save_dir: Path, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "model_config": SHAPE,
        "n_epochs": 2,
        "run_config": RunConfig(save_dir=str(save_dir), log_interval=1, progress=False),
        "sft_config": SFTConfig(gradient_accumulation_steps=2),
    }
    return describe(path, reference_dir, save_dir, **(values | changes))


def test_the_two_styles_are_bit_identical(conversations: Path, reference_dir: Path, tmp_path: Path) -> None:
    described = SFTTrainer(train_config=config(conversations, reference_dir, tmp_path / "config"))
    described.train()

    chat = ChatFormat(load_tokenizer(reference_dir / "tokenizer"))
    rows = [chat.encode(json.loads(line)) for line in conversations.read_text().splitlines()]
    batches = []
    for first in range(0, len(rows), 2):
        pair = rows[first : first + 2]
        width = max(len(row.input_ids) for row in pair)
        batch = {"input_ids": [], "labels": [], "attention_mask": []}
        for row in pair:
            padding = width - len(row.input_ids)
            labels = [i if t else -100 for i, t in zip(row.input_ids, row.trained, strict=True)]
            batch["input_ids"].append(row.input_ids + [0] * padding)
            batch["labels"].append(labels + [-100] * padding)
            batch["attention_mask"].append([1] * len(row.input_ids) + [0] * padding)
        batches.append({name: torch.tensor(values) for name, values in batch.items()})
    torch.manual_seed(0)
    model = build_model(SHAPE)
    explicit = SFTTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=batches,
        max_epochs=2,
        grad_accum_steps=2,
        log_interval=1,
        save_dir=str(tmp_path / "explicit"),
        progress=False,
    )
    explicit.train()
    assert curve(tmp_path / "config") == curve(tmp_path / "explicit") and len(curve(tmp_path / "config")) == 6
    for ours, theirs in zip(described.base_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_explicit_keywords_win(conversations: Path, reference_dir: Path, tmp_path: Path) -> None:
    trainer = SFTTrainer(train_config=config(conversations, reference_dir, tmp_path), max_epochs=1, max_steps=2)
    trainer.train()
    assert trainer.run.progress.step == 2


def test_an_unknown_option_names_the_nearest() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match="no option 'max_step'; did you mean max_steps"):
        SFTTrainer(model=model, optimizer=torch.optim.SGD(model.parameters()), train_loader=[], max_step=3)


def test_pretraining_by_configuration_resumes_by_itself(reference_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the model learns to count one two three four\n" * 100)
    described = config(
        text, reference_dir, tmp_path / "run", sft_config=None, pretrain_config=PretrainConfig(), dataset_block_size=32
    )
    first = Trainer(train_config=described, max_steps=4)
    first.train()
    again = Trainer(train_config=described, eval_prompts=["the model"])
    again.run._resume()
    assert again.run.progress.step == 4
    saved = tmp_path / "run" / "model"
    assert (saved / "model.safetensors").exists() and (saved / "tokenizer.json").exists()
    assert json.loads((saved / "generation_config.json").read_text())["eos_token_id"] == [4, 2]
    assert (tmp_path / "run" / "config.yaml").read_text().startswith("model_config:")


def test_evaluation_early_stopping_and_the_best_model(conversations: Path, reference_dir: Path, tmp_path: Path) -> None:
    described = config(
        conversations,
        reference_dir,
        tmp_path,
        n_epochs=50,
        eval_dataset=str(conversations),
        eval_prompts=["count to 3"],
        optim_config=OptimConfig(initial_lr=0.5),
        eval_config=EvalConfig(eval_batch_interval=3, max_seq_len=4, early_stopping_patience=2),
    )
    trainer = SFTTrainer(train_config=described)
    trainer.train()
    progress = trainer.run.progress
    assert progress.stopped_early and progress.step < 150
    best = trainer.run.checkpoints.manager.best()
    assert best is not None and best.name.endswith(f"{progress.best_step:08d}")


def test_registry() -> None:
    assert get_trainer_class("SFT") is SFTTrainer and llm_trainer.PretrainTrainer is SFTTrainer
    with pytest.raises(ValueError, match="unknown trainer 'stf': known are .*pretrain.*sft.*did you mean 'sft'"):
        create_trainer("stf")


@pytest.mark.parametrize("output", ["tensor", "object", "dict"])
def test_any_module_that_gives_logits(output: str, tmp_path: Path) -> None:
    class Bigrams(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(20, 20)

        def forward(self, input_ids: torch.Tensor) -> Any:
            logits = self.table(input_ids)
            if output == "dict":
                return {"logits": logits}
            return logits if output == "tensor" else type("Output", (), {"logits": logits})()

    torch.manual_seed(0)
    model, ids = Bigrams(), torch.arange(16).view(2, 8)
    SFTTrainer(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.3),
        train_loader=[{"input_ids": ids, "labels": ids}],
        max_epochs=30,
        save_dir=str(tmp_path),
        save_interval=0,
        use_amp=False,
        progress=False,
    ).train()
    assert model.table(ids[:, :-1]).argmax(-1).equal(ids[:, 1:])


def test_save_and_load_of_the_single_file_form(tmp_path: Path) -> None:
    def trainer() -> SFTTrainer:
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
        batches = [{"input_ids": ids, "labels": ids} for ids in torch.arange(48).remainder(20).view(6, 2, 4)]
        return SFTTrainer(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
            scheduler=None,
            train_loader=batches,
            val_loader=batches,
            max_epochs=3,
            save_dir=str(tmp_path),
            progress=False,
        )

    whole = trainer()
    whole.train()
    assert (tmp_path / "best_model.pt").exists()
    part = trainer()
    part.max_steps = None
    part.run.settings = type(part.run.settings)(max_steps=7, progress=False)
    part.train()
    part.save_checkpoint(path=str(tmp_path / "mine.pt"))
    rest = trainer()
    rest.load_checkpoint(str(tmp_path / "mine.pt"))
    assert rest.run.progress.step == 7
    rest.train()
    for ours, theirs in zip(rest.base_model.parameters(), whole.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
