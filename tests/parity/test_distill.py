"""Distillation against the reference numbers, from logits and from hidden states in chunks, in float64 and float32."""

import pytest
import torch
import torch.nn.functional as F

from llm_trainer.losses.distill import chunked_divergence, divergence, mix_with_task
from reference_cases import Case

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def whole_logits(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, **options: float) -> torch.Tensor:
    return divergence(student, teacher, **options)[mask].sum()


def in_chunks(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, **options: float) -> torch.Tensor:
    """The logits as hidden states under an identity head: the same function of the same inputs."""
    hidden, teacher = student.flatten(0, -2), teacher.flatten(0, -2)
    head = torch.eye(hidden.shape[-1], dtype=hidden.dtype)
    total, _ = chunked_divergence(
        hidden, head, lambda start, stop: teacher[start:stop], mask.flatten(), chunk_size=3, **options
    )
    return total


@DTYPES
@pytest.mark.parametrize("distance", [whole_logits, in_chunks])
def test_reference_numbers(kd_case: Case, dtype: torch.dtype, distance) -> None:
    case, hyper = kd_case, kd_case.hyper
    student = case.inputs["student_logits"].to(dtype, copy=True).requires_grad_()
    teacher, labels = case.inputs["teacher_logits"].to(dtype)[:, :-1], case.inputs["labels"][:, 1:]
    mask, temperature = labels != -100, hyper["temperature"]
    beta = hyper.get("beta", 0.0)
    kd = distance(student[:, :-1], teacher, mask, beta=beta, temperature=temperature) / mask.sum()
    loss = kd
    if "kd_coef" in hyper:
        task = F.cross_entropy(student[:, :-1].flatten(0, 1), labels.flatten())
        loss = mix_with_task(task, kd * temperature**2, hyper["kd_coef"])
    loss.backward()
    case.assert_close(student.grad, case.outputs["grad_student_logits"], dtype, "gradient")
    entropy = -(teacher.softmax(-1) * teacher.log_softmax(-1)).sum(-1)[mask].mean()
    found = {"loss": loss, "loss_times_T2": kd * temperature**2, "n_valid": mask.sum()}
    found["soft_cross_entropy"] = kd + entropy  # the textbook form differs by the teacher's entropy
    for name, expected in case.expected.items():
        case.assert_close(found[name], expected, dtype, name)
