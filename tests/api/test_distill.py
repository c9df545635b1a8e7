"""Distillation in both styles: the same run described twice, and teachers that a description cannot mean."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import Distillation, SFTTrainer, Trainer
from llm_trainer.config.load import load_config
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.encode.tokenizer import load_tokenizer, train_tokenizer
from llm_trainer.models.build import build_model
from llm_trainer.train_configs import ConfigError, KDConfig, PretrainConfig, RunConfig, SFTConfig, TrainConfig
from llm_trainer.trainers.distill import TeacherError

SHAPE = ModelConfig(
    vocab_size=512, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
)


def teacher(vocab_size: int = 520) -> Any:
    torch.manual_seed(9)
    return build_model(ModelConfig(**{**vars(SHAPE), "vocab_size": vocab_size, "initializer_range": 0.5}))


@pytest.fixture
def teacher_folder(tmp_path: Path, reference_dir: Path) -> Path:
    """A model with a padded vocabulary beside the student's tokenizer."""
    teacher().save_pretrained(tmp_path / "teacher")
    load_tokenizer(reference_dir / "tokenizer").save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def config(reference_dir: Path, folder: Path, **sections: Any) -> TrainConfig:
    data = folder.parent / "chat.jsonl"
    rows = [[{"role": "user", "content": f"count {n}"}, {"role": "assistant", "content": "1 2 3"}] for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        model_config=SHAPE,
        tokenizer=str(reference_dir / "tokenizer"),
        file_dataset=str(data),
        batch_size=2,
        run_config=RunConfig(save_dir=str(folder), log_interval=1, progress=False, precision="fp32"),
        **sections,
    )


def curve(folder: Path) -> list[tuple[float, ...]]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [
        tuple(row[name] for name in ("loss", "kd_loss", "task_loss", "grad_norm")) for row in lines if "loss" in row
    ]


def test_a_folder_a_model_and_a_function_give_the_same_run(
    teacher_folder: Path, reference_dir: Path, tmp_path: Path
) -> None:
    def provider(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return teacher()(input_ids, attention_mask=attention_mask).logits

    def described(name: str, **kd: Any) -> TrainConfig:
        return config(reference_dir, tmp_path / name, sft_config=SFTConfig(kd_config=KDConfig(temperature=2.0, **kd)))

    SFTTrainer(train_config=described("folder", teacher_model=str(teacher_folder))).train()
    SFTTrainer(train_config=described("model"), teacher_model=teacher()).train()
    SFTTrainer(train_config=described("function", teacher_logits_provider=provider)).train()
    plain = config(reference_dir, tmp_path / "explicit", sft_config=SFTConfig())
    SFTTrainer(train_config=plain, kd=Distillation(teacher_model=teacher(), temperature=2.0)).train()
    curves = [curve(tmp_path / name) for name in ("folder", "model", "explicit", "function")]
    assert curves[0] == curves[1] == curves[2] and len(curves[0]) == 3
    assert sum(curves[3], ()) == pytest.approx(sum(curves[0], ()), rel=1e-4)
    for loss, kd_loss, task_loss, _ in curves[0]:
        assert loss == pytest.approx(0.4 * kd_loss + 0.6 * task_loss, rel=1e-5) and kd_loss > 0.01
    assert load_config(tmp_path / "function" / "config.yaml").sft_config.kd_config.temperature == 2.0


def test_own_answers_by_configuration_end_where_the_template_ends_turns(
    teacher_folder: Path, reference_dir: Path, tmp_path: Path
) -> None:
    kd = KDConfig(teacher_model=str(teacher_folder), on_policy_fraction=1.0, max_new_tokens=3)
    trainer = SFTTrainer(train_config=config(reference_dir, tmp_path / "run", sft_config=SFTConfig(kd_config=kd)))
    assert trainer.tokenizer.eos_token_id in trainer.kd.stop_token_ids
    (batches, _), *_ = trainer.run.source.steps(0, 0)
    assert 1 <= int((batches[0].batch["labels"] != -100).sum(1).max()) <= 3


def test_a_teacher_with_another_tokenizer_is_refused(reference_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train_tokenizer(["one two three"] * 3, 280).save_pretrained(other)
    kd = KDConfig(teacher_model=str(other))
    described = config(reference_dir, tmp_path / "run", pretrain_config=PretrainConfig(kd_config=kd))
    with pytest.raises(
        TeacherError, match=r"another tokenizer than the student: \d+ ids differ \(id 0 is .* here and "
    ):
        Trainer(train_config=described)


def test_what_a_description_cannot_mean() -> None:
    with pytest.raises(ConfigError, match="teacher_logits_provider already gives the teacher"):
        KDConfig(teacher_model="a", teacher_logits_provider=print)
    with pytest.raises(ConfigError, match="on_policy_fraction is 0.5, but pretraining has no prompts"):
        PretrainConfig(kd_config=KDConfig(on_policy_fraction=0.5))
    with pytest.raises(ConfigError, match="divergence: got 'kl', expected one of forward_kl"):
        KDConfig(divergence="kl")
