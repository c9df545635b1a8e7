"""Distillation: the chunked form against the plain one, padded vocabularies, extreme logits, options."""

import pytest
import torch

from llm_trainer.losses.distill import chunked_divergence, divergence, mix_with_task, teacher_head

N, D, V, PADDED = 11, 5, 13, 16
BETAS = pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])


def parts(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    """Student hidden `[N, D]` and head `[V, D]`, teacher hidden `[N, 3]` and head `[PADDED, 3]`, mask `[N]`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (N, D), (V, D), (N, 3), (PADDED, 3)
    hidden, head, *teacher = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes)
    return hidden.requires_grad_(), head.requires_grad_(), *teacher, torch.rand(N, generator=generator) > 0.3


@BETAS
@pytest.mark.parametrize("chunk_size", [1, 4, 64])
def test_chunks_equal_whole_logits_in_value_and_gradient(beta: float, chunk_size: int) -> None:
    hidden, head, teacher_hidden, teacher_weight, mask = parts()
    plain = divergence(hidden @ head.T, teacher_hidden @ teacher_weight.T, beta, temperature=1.7)
    expected = torch.autograd.grad(plain[mask].sum() * 0.37, (hidden, head))
    total, values = chunked_divergence(
        hidden, head, teacher_head(teacher_hidden, teacher_weight), mask, beta, 1.7, chunk_size
    )
    found = torch.autograd.grad(total * 0.37, (hidden, head))
    torch.testing.assert_close(values, torch.where(mask, plain, 0.0).detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert not values.requires_grad


@BETAS
def test_gradcheck(beta: float) -> None:
    hidden, head, teacher_hidden, teacher_weight, mask = parts(1)
    teacher = teacher_head(teacher_hidden, teacher_weight)

    def total(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        return chunked_divergence(hidden, head, teacher, mask, beta, temperature=2.0, chunk_size=4)[0]

    assert torch.autograd.gradcheck(total, (hidden, head), fast_mode=True)


def test_only_needed_gradients_and_none_under_no_grad() -> None:
    hidden, head, teacher_hidden, teacher_weight, mask = parts()
    teacher = teacher_head(teacher_hidden, teacher_weight)
    total, _ = chunked_divergence(hidden, head.detach(), teacher, mask, chunk_size=3)
    with torch.no_grad():
        evaluated, _ = chunked_divergence(hidden, head, teacher, mask, chunk_size=3)
    torch.testing.assert_close(evaluated, total.detach())
    total.backward()
    assert hidden.grad is not None and head.grad is None and not evaluated.requires_grad


def test_no_chunk_sees_more_rows_than_asked_for_and_all_are_seen_once() -> None:
    hidden, head, teacher_hidden, teacher_weight, _ = parts()
    asked: list[range] = []

    def teacher(start: int, stop: int) -> torch.Tensor:
        asked.append(range(start, stop))
        return teacher_hidden[start:stop] @ teacher_weight.T

    chunked_divergence(hidden, head, teacher, chunk_size=4)
    assert [len(rows) for rows in asked] == [4, 4, 3]
    assert [row for rows in asked for row in rows] == list(range(N))


def test_half_precision_student_keeps_its_dtype_and_comes_close() -> None:
    hidden, head, teacher_hidden, teacher_weight, mask = parts()
    exact, _ = chunked_divergence(hidden, head, teacher_head(teacher_hidden, teacher_weight), mask)
    low = hidden.detach().bfloat16().requires_grad_()
    total, _ = chunked_divergence(low, head.detach().float(), teacher_head(teacher_hidden, teacher_weight), mask)
    total.backward()
    assert total.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    assert total.item() == pytest.approx(exact.item(), rel=0.03)


@BETAS
def test_a_padded_teacher_is_cut_before_its_softmax(beta: float) -> None:
    student = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([student, torch.full((3, 2), 50.0)], dim=-1)
    torch.testing.assert_close(divergence(student, padded, beta), torch.zeros(3), rtol=0, atol=1e-6)


@BETAS
def test_extreme_logits_stay_finite_and_a_teacher_gets_no_gradient(beta: float) -> None:
    student = (torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])).requires_grad_()
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [1e4, 0.0, -1e4]], requires_grad=True)
    values = divergence(student, teacher, beta)
    values.sum().backward()
    assert values.isfinite().all() and student.grad.isfinite().all() and teacher.grad is None
    assert (values > 0).all()


def test_jsd_is_symmetric_and_bounded_by_log_two() -> None:
    left, right = torch.randn(2, 4, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 30
    one, other = divergence(left, right, 0.5), divergence(right, left, 0.5)
    torch.testing.assert_close(one, other)
    assert (one <= 0.6931471805599454).all() and (one > 0).all()


def test_mixing_with_the_task() -> None:
    task, kd = torch.tensor(3.0), torch.tensor(1.0)
    assert mix_with_task(task, kd, 0.25) == 2.5 and mix_with_task(task, kd, 0.0) == 3.0
    with pytest.raises(ValueError, match="kd_coef"):
        mix_with_task(task, kd, 1.2)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beta": 1.5}, "beta=1.5"), ({"temperature": 0.0}, "temperature"), ({"chunk_size": 0}, "chunk_size")],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    hidden, head, teacher_hidden, teacher_weight, _ = parts()
    with pytest.raises(ValueError, match=message):
        chunked_divergence(hidden, head, teacher_head(teacher_hidden, teacher_weight), **options)


def test_a_teacher_with_a_smaller_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="has 3 tokens"):
        divergence(torch.zeros(1, 4), torch.zeros(1, 3))
