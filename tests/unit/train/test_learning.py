"""Runs whose steps teach nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.state import StepDone
from llm_trainer.train.learning import Learning, NothingCounts
from policies import tiny


def step(terms: float, grad_norm: float = 1.0) -> StepDone:
    return StepDone(torch.zeros(()), grad_norm, True, 8, {"": terms}, 0.1, False, [], 0)


def test_what_counts_on_any_rank_counts() -> None:
    said: list[str] = []
    learning = Learning(said.append)
    learning.note(step(0.0))
    learning.check(1, is_over=False)
    assert len(said) == 1 and "in 1 step up to step 1 nothing in their rows counts in the loss" in said[0]
    learning.note(step(3.0))  # of all ranks
    learning.check(2, is_over=True)
    assert len(said) == 1


def test_it_is_said_now_and_then() -> None:
    said: list[str] = []
    learning = Learning(said.append)
    for number in range(1, 22):
        learning.note(step(0.0))
        learning.check(number, is_over=False)
    assert [line.partition("up to ")[2].split()[1] for line in said] == ["1", "11", "21"]
    with pytest.raises(NothingCounts, match="nothing was learned in 21 steps"):
        learning.check(21, is_over=True)


def test_a_run_that_has_learned_before_ends_well() -> None:
    said: list[str] = []
    learning = Learning(said.append)
    learning.note(step(0.0, grad_norm=0.0))
    learning.check(5, is_over=True)  # it went on from step 4
    assert len(said) == 1 and "gradient" not in said[0]


def test_gradients_that_are_all_zero_are_said() -> None:
    for norms, count in (([0.0, 0.0], 1), ([0.0, 1e-9], 0)):
        said: list[str] = []
        learning = Learning(said.append)
        for norm in norms:
            learning.note(step(2.0, norm))
        learning.check(2, is_over=True)
        assert len(said) == count and all("the gradient of 2 steps, all of the run, was 0" in line for line in said)


@pytest.mark.parametrize("options", [{"max_epochs": 2}, {"max_steps": 3, "log_interval": 2}])
def test_labels_that_are_all_masked_end_a_run_with_the_reason(options: dict[str, Any], tmp_path: Path) -> None:
    model = tiny()
    batch = {"input_ids": torch.full((2, 4), 5), "labels": torch.full((2, 4), -100)}
    trainer = SFTTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-3),
        train_loader=[batch] * 2,
        save_dir=str(tmp_path),
        progress=False,
        save_interval=0,
        use_amp=False,
        **options,
    )
    with pytest.raises(
        NothingCounts, match=r"nothing was learned in [34] steps: .* look at labels \(-100 is not learned from"
    ):
        trainer.train()
    assert not (tmp_path / "model").exists()
