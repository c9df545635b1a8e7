"""KTOTrainer: one KL per optimizer step, however it is cut, and no batch size or sampler order that breaks it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import KTOTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model
from llm_trainer.trainers import unpaired

Batch = dict[str, torch.Tensor]


def tiny(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build_model(ModelConfig(**shape, max_position_embeddings=64))


def batch_of(rows: list[int]) -> Batch:
    """Rows `rows` of a fixed data set: prompt row // 2 with its good or bad answer."""
    batch: Batch = {"desirable": torch.tensor([row % 2 == 0 for row in rows])}
    for part, numbers in (("prompt", [row // 2 for row in rows]), ("completion", [100 + row for row in rows])):
        lengths = torch.tensor([3 + number % 4 for number in numbers])
        table = [torch.randint(3, 64, (6,), generator=torch.Generator().manual_seed(n)) for n in numbers]
        batch[f"{part}_input_ids"] = torch.stack(table)
        batch[f"{part}_attention_mask"] = (torch.arange(6) < lengths[:, None]).long()
    return batch


def trainer(folder: Path, batches: list[Batch], **options: Any) -> KTOTrainer:
    model = tiny()
    return KTOTrainer(
        **{
            "model": model,
            "ref_model": tiny(1),
            "optimizer": configure_optimizer(model=model, lr=1e-2),
            "train_loader": batches,
            "device": "cpu",
            "max_epochs": 1,
            "use_amp": False,
            "log_interval": 1,
            "save_dir": str(folder),
            "save_interval": 0,
            "progress": False,
            "packing": "none",  # rows are looked at
            **options,
        }
    )


def kl_of(made: KTOTrainer, batches: list[Batch]) -> float:
    with torch.no_grad():
        made._begin_step(batches, [made._loss_weight(b) for b in batches], lambda numbers: numbers)
    assert made._kl is not None
    return made._kl


def test_the_kl_is_one_mean_over_all_mismatched_pairs_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(tmp_path, [])
    monkeypatch.setattr(unpaired, "log_ratios", lambda logprobs, rows: torch.linspace(-1, 3, len(rows["labels"])))
    assert kl_of(made, [batch_of([0, 1, 2, 3]), batch_of([4, 6])]) == pytest.approx(1.0)
    monkeypatch.setattr(unpaired, "log_ratios", lambda logprobs, rows: torch.full((len(rows["labels"]),), -1.0))
    assert kl_of(made, [batch_of([0, 2])]) == 0.0


def test_given_mismatched_pairs_make_the_kl_independent_of_the_cut(tmp_path: Path) -> None:
    rows = [0, 3, 4, 7]
    made = trainer(tmp_path, [])
    kl = made._mismatched(batch_of(rows))
    assert kl is not None
    whole = batch_of(rows) | {f"kl_{name}": value for name, value in kl.items() if not name.startswith("desirable")}
    expected = kl_of(made, [whole])
    parts = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(4)]
    made = trainer(tmp_path, [])
    assert kl_of(made, parts) == pytest.approx(expected, rel=1e-5) and expected > 0


def test_an_order_that_puts_a_prompts_answers_side_by_side_still_mismatches(tmp_path: Path) -> None:
    made = trainer(tmp_path, [])
    batch = batch_of([0, 1, 2, 3])
    mismatched = made._mismatched(batch)
    assert mismatched is not None
    for i, row in enumerate(mismatched["input_ids"]):
        length = int(batch["prompt_attention_mask"][i].sum())
        answer = row[length : length + 3].tolist()
        own = [j for j in range(4) if j // 2 == i // 2]
        assert answer not in [batch["completion_input_ids"][j][:3].tolist() for j in own]


def test_a_last_row_alone_keeps_the_kl_and_a_first_one_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, [batch_of([0, 2]), batch_of([5])])
    assert made.train()["loss"] > 0 and made.run.progress.step == 2
    with pytest.raises(ValueError, match="expected a batch_size of at least 2"):
        trainer(tmp_path, [batch_of([5])]).train()
    assert trainer(tmp_path, [batch_of([5])], loss_type="apo_zero_unpaired").train()["kl"] == 0


def test_learning_tells_good_answers_from_bad_ones(tmp_path: Path) -> None:
    batches = [batch_of([0, 1, 2, 3]), batch_of([4, 5, 6, 7])]
    made = trainer(tmp_path, batches, max_epochs=8, val_loader=batches, ref_model=None)
    values = made.train()
    assert values["eval_rewards/chosen"] > 0.1 > -0.1 > values["eval_rewards/rejected"]


def test_the_margin_is_that_of_the_whole_step(tmp_path: Path) -> None:
    """Micro-batches with three and one good answers: the mean of their own margins would be another number."""
    batches = [batch_of([0, 2, 4, 1]), batch_of([3, 5, 7, 6]), batch_of([0, 2]), batch_of([4, 6])]
    trainer(tmp_path, batches, grad_accum_steps=2).train()
    lines = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    first, second = [row for row in map(json.loads, lines) if "loss" in row]
    assert first["rewards/margins"] == pytest.approx(first["rewards/chosen"] - first["rewards/rejected"], rel=1e-5)
    assert first["rewards/margins"] != 0 and "rewards/margins" not in second  # only good answers


def test_a_rank_without_rows_counts_none_in_the_numbers_that_the_others_sum(tmp_path: Path) -> None:
    made = trainer(tmp_path, [], loss_type="apo_zero_unpaired")
    made._begin_step([batch_of([0, 1])], [0.0], lambda numbers: numbers)
    assert made._num_of_kind.tolist() == [0.0, 0.0] and made._num_of_kind.dtype == torch.float32


def test_a_joined_batch_must_bring_its_mismatched_pairs(tmp_path: Path) -> None:
    joined = {"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(2, 4).long(), "desirable": torch.ones(2)}
    with pytest.raises(ValueError, match="expected the keys kl_input_ids"):
        kl_of(trainer(tmp_path, []), [joined])


def test_an_evaluation_does_not_change_what_is_learned(tmp_path: Path) -> None:
    """The last steps have a single row each, and so the KL of the step before: not that of an evaluation between them."""
    batches = [batch_of([0, 1, 2]), batch_of([3]), batch_of([4])]
    curves = []
    for name, options in (("plain", {}), ("evaluated", {"val_loader": [batch_of([5, 6, 7])], "eval_interval": 1})):
        made = trainer(tmp_path / name, batches, beta=5.0, **options)
        made.train()
        lines = map(json.loads, (tmp_path / name / "log" / "metrics.jsonl").read_text().splitlines())
        curves.append([(line["loss"], line["kl"]) for line in lines if "loss" in line])
    assert curves[0] == curves[1] and len(curves[0]) == 3
