"""A loss with weights is sum(w * l) / sum(w) of the whole step, whatever the size of the weights and the cut of the step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llm_trainer import Distillation, DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.generation.in_process import InProcess
from llm_trainer.losses.distill import divergence
from llm_trainer.models.build import build_model
from llm_trainer.models.rewarding import reward_model
from llm_trainer.trainers.distill import own_answers

V = 40
WEIGHTS = torch.rand(4, 12, generator=torch.Generator().manual_seed(1)) + 0.1


def model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    shape = ModelConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
    return build_model(shape)


def batch(rows: slice = slice(None)) -> dict[str, Tensor]:
    """Four rows of random ids, padded on the right with garbage, prompts unsupervised."""
    ids = torch.randint(3, V, (4, 12), generator=torch.Generator().manual_seed(0))
    positions, lengths, prompts = (
        torch.arange(12),
        torch.tensor([[9], [4], [12], [7]]),
        torch.tensor([[3], [3], [2], [6]]),
    )
    labels = ids.where((positions >= prompts) & (positions < lengths), -100)
    whole = {"input_ids": ids, "labels": labels, "attention_mask": (positions < lengths).long()}
    return {name: value[rows] for name, value in whole.items()}


def weighted(scale: float = 1.0, rows: slice = slice(None)) -> dict[str, Tensor]:
    return batch(rows) | {"loss_weights": WEIGHTS[rows] * scale}


def gradient(path: Path, batches: list[dict[str, Tensor]], **options: Any) -> tuple[float, Tensor]:
    """Loss and gradient of the first step over `batches`."""
    student = model()
    found: list[Tensor] = []

    def keep(optimizer: Any, args: Any, kwargs: Any) -> None:
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).clone())

    optimizer = configure_optimizer(student, "sgd", lr=1e-3)
    optimizer.register_step_pre_hook(keep)
    values = SFTTrainer(
        student,
        optimizer,
        batches,
        max_epochs=1,
        grad_accum_steps=len(batches),
        max_grad_norm=0,
        use_amp=False,
        device="cpu",
        save_dir=str(path),
        save_interval=0,
        best_file=False,
        log_interval=1,
        **options,
    ).train()
    return values["loss"], found[0]


def expected(teacher: Any = None, share: float = 0.0) -> tuple[float, Tensor]:
    """The same by the formula."""
    student, given = model(), batch()
    mask = given["labels"][:, 1:] != -100
    logits = student(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), given["labels"][:, 1:], reduction="none", ignore_index=-100)
    if teacher is not None:
        with torch.no_grad():
            theirs = teacher(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
        losses = (1 - share) * losses + share * divergence(logits, theirs)
    loss = (losses * WEIGHTS[:, 1:])[mask].sum() / WEIGHTS[:, 1:][mask].sum()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e3])
def test_the_loss_is_the_weighted_mean_of_the_step(tmp_path: Path, scale: float) -> None:
    loss, slope = expected()
    cuts = [[weighted(scale)], [weighted(scale, slice(0, 1)), weighted(scale, slice(1, 4))]]
    for batches in cuts:
        ours, gradients = gradient(tmp_path, batches)
        assert abs(ours - loss) < 1e-5
        torch.testing.assert_close(gradients, slope, rtol=1e-4, atol=1e-6)


def test_weights_of_one_change_nothing_and_of_zero_leave_out(tmp_path: Path) -> None:
    plain = gradient(tmp_path, [batch()])
    ones = gradient(tmp_path, [batch() | {"loss_weights": torch.ones(4, 12)}])
    assert plain[0] == ones[0] and torch.equal(plain[1], ones[1])
    left_out = batch()
    left_out["labels"][1] = -100
    some = torch.ones(4, 12)
    some[1] = 0
    a, b = gradient(tmp_path, [left_out]), gradient(tmp_path, [batch() | {"loss_weights": some}])
    assert abs(a[0] - b[0]) < 1e-6
    torch.testing.assert_close(a[1], b[1])


def test_distillation_and_evaluation_weigh_as_well(tmp_path: Path) -> None:
    teacher = model(seed=1)
    loss, slope = expected(teacher, share=0.3)
    kd = Distillation(teacher_model=teacher, kd_coef=0.3)
    cut = [weighted(1, slice(0, 3)), weighted(1, slice(3, 4))]
    ours, gradients = gradient(tmp_path, cut, kd=kd)
    assert abs(ours - loss) < 1e-5
    torch.testing.assert_close(gradients, slope, rtol=1e-4, atol=1e-6)
    student = model()
    optimizer = configure_optimizer(student, lr=1e-3)
    options = {"use_amp": False, "device": "cpu", "save_dir": str(tmp_path)}
    found = SFTTrainer(student, optimizer, cut, val_loader=cut, **options).evaluate()
    assert abs(found["eval_loss"] - expected()[0]) < 1e-5


def test_own_answers_weigh_as_much_as_those_they_replace() -> None:
    kd = Distillation(teacher_logits_provider=lambda ids, mask: None, on_policy_fraction=0.5, stop_token_ids=(1,))
    given = batch() | {"loss_weights": torch.full((4, 12), 0.5)}
    answered = own_answers(given, InProcess(model()), kd, seed=3)
    assert answered["loss_weights"].shape == answered["labels"].shape
    assert torch.equal(answered["loss_weights"] == 0.5, answered["labels"] != -100)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"loss_weights: found the shape \(4, 11\); expected that of labels, \(4, 12\)"
    ):
        gradient(tmp_path, [batch() | {"loss_weights": torch.ones(4, 11)}])


def pairs(rows: list[int]) -> dict[str, Tensor]:
    """Pairs of random ids, joined: chosen rows before rejected ones."""
    noise = torch.Generator().manual_seed(3)
    ids = torch.randint(3, V, (3, 2, 10), generator=noise)[rows].transpose(0, 1).reshape(-1, 10)
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def judged(rows: list[int]) -> dict[str, Tensor]:
    """Single answers, the first and the last of three desirable."""
    given = {name: value[: len(rows)] for name, value in pairs(rows).items()}
    return given | {"desirable": torch.tensor([True, False, True])[rows]}


def first_step(path: Path, trainer: Any, make: Any, batches: list[dict[str, Tensor]], **options: Any) -> list[Any]:
    """Loss and gradient of the first step of any trainer over `batches`."""
    student, found = make(), []

    def keep(optimizer: Any, args: Any, kwargs: Any) -> None:
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).clone())

    optimizer = configure_optimizer(student, "sgd", lr=1e-3)
    optimizer.register_step_pre_hook(keep)
    how = {"max_epochs": 1, "grad_accum_steps": len(batches), "max_grad_norm": 0, "use_amp": False, "device": "cpu"}
    where = {"save_dir": str(path), "save_interval": 0, "best_file": False, "log_interval": 1}
    if trainer is not RewardTrainer:
        options["ref_model"] = model(1)
    values = trainer(student, optimizer=optimizer, train_loader=batches, **how, **where, **options).train()
    return [values["loss"], found[0]]


WITH_NLL: dict[str, Any] = {"loss_type": {"sigmoid": 0.7, "sft": 0.3}}


@pytest.mark.parametrize(
    ("trainer", "make", "rows", "options"),
    [
        (DPOTrainer, model, pairs, {}),
        (DPOTrainer, model, pairs, WITH_NLL | {"nll_norm": "token"}),
        (DPOTrainer, model, pairs, WITH_NLL | {"nll_norm": "sequence", "mask_prompt": False}),
        (KTOTrainer, model, judged, {"loss_type": "apo_zero_unpaired"}),
        (RewardTrainer, lambda: reward_model(model(), 0), pairs, {"center_coef": 0.01}),
    ],
)
def test_a_row_that_weighs_two_counts_as_two_rows(
    tmp_path: Path, trainer: Any, make: Any, rows: Any, options: dict[str, Any]
) -> None:
    loss, gradient = first_step(tmp_path / "twice", trainer, make, [rows([0, 0, 1])], **options)
    weights = torch.tensor([2.0, 1.0])
    for scale in (1.0, 0.01):
        batch = rows([0, 1]) | {"row_weights": weights * scale}
        again = first_step(tmp_path / f"whole-{scale}", trainer, make, [batch], **options)
        torch.testing.assert_close(again, [loss, gradient], rtol=1e-4, atol=1e-6)
        cut = [rows([i]) | {"row_weights": weights[i : i + 1] * scale} for i in (0, 1)]
        again = first_step(tmp_path / f"cut-{scale}", trainer, make, cut, **options)
        torch.testing.assert_close(again, [loss, gradient], rtol=1e-4, atol=1e-6)


def test_weights_of_rows_must_fit_the_rows(tmp_path: Path) -> None:
    for wrong in (torch.ones(3), torch.tensor([1.0, -1.0])):
        batch = pairs([0, 1]) | {"row_weights": wrong}
        with pytest.raises(ValueError, match=r"row_weights: found the shape .* expected \(2,\), a number from 0 up"):
            first_step(tmp_path, DPOTrainer, model, [batch])
