"""Distillation: the student's next-token distribution is pulled to the teacher's, over the whole vocabulary.

Two forms with the same numbers. `divergence` takes logits. `chunked_divergence` takes the student's hidden states and
head and asks for the teacher's logits a few rows at a time, so that neither model's `[N, V]` logits ever exist.

Logits are divided by the temperature on both sides. The result is not multiplied by its square, as in TRL; to keep the
balance with a hard-label loss at any temperature, multiply (Hinton et al. 2015, arXiv:1503.02531, section 2).
Letters: `B` rows, `T` positions, `V` the student's vocabulary, `D` width, `N` tokens laid flat.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows `[start, stop)` of the teacher's logits, `[stop - start, V or more]`.
TeacherLogits = Callable[[int, int], Tensor]


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """`KL(teacher || student)`: cover all that the teacher would say (Hinton et al. 2015, less the teacher's entropy).

    Log-probs `[..., V]` of both -> `[...]`.
    """
    return (teacher.exp() * (teacher - student)).sum(-1)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """`KL(student || teacher)`: say only what the teacher would (Gu et al. 2023, MiniLLM, arXiv:2306.08543).

    Log-probs `[..., V]` of both -> `[...]`.
    """
    return forward_kl(teacher, student)


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """`beta KL(teacher || m) + (1 - beta) KL(student || m)`, `m = beta teacher + (1 - beta) student`, 0 < beta < 1.

    Agarwal et al. 2023, GKD, arXiv:2306.13649. Log-probs `[..., V]` of both -> `[...]`.
    """
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * forward_kl(mixture, teacher) + (1 - beta) * forward_kl(mixture, student)


# The ends of GKD's beta. They are not limits of the JSD, which tends to 0 there.
ENDS: dict[float, Callable[[Tensor, Tensor], Tensor]] = {0.0: forward_kl, 1.0: reverse_kl}


def divergence(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.0, temperature: float = 1.0) -> Tensor:
    """Distance of the student's distribution from the teacher's, per token.

    Args:
        student_logits: `[..., V]`.
        teacher_logits: `[..., V or more]`; what exceeds `V` is padding of the teacher's vocabulary and dropped before
            the softmax. No gradient flows to it.
        beta: 0 forward KL, 1 reverse KL, between them the generalised Jensen-Shannon divergence.
        temperature: divides both logits.

    Returns:
        `[...]`, in float32 or better.

    Raises:
        ValueError: beta or temperature is out of range, or the teacher has the smaller vocabulary.
    """
    vocab = student_logits.shape[-1]
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta}: must be in [0, 1] (0 forward KL, 1 reverse KL).")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be above 0.")
    if teacher_logits.shape[-1] < vocab:
        raise ValueError(
            f"The teacher has {teacher_logits.shape[-1]} tokens, the student {vocab}; the teacher must have "
            "the student's tokenizer. If only padding differs, resize the student's embeddings to the teacher's size."
        )
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(dtype) / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.detach()[..., :vocab].to(dtype) / temperature, dim=-1)
    between = ENDS.get(float(beta))
    return between(student, teacher) if between else generalised_jsd(student, teacher, beta)


class _ChunkedDivergence(torch.autograd.Function):
    """Value and gradient in one pass: a chunk's logits are gone before the next chunk's are made."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        mask: Tensor,
        teacher: TeacherLogits,
        weights: Tensor | None,
        options: tuple[float, float, int, bool],
    ) -> tuple[Tensor, Tensor]:
        beta, temperature, chunk_size, wants_grad = options
        values = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))  # [N]
        grad_hidden = torch.zeros_like(hidden)  # [N, D]
        grad_head = torch.zeros_like(head, dtype=values.dtype) if ctx.needs_input_grad[1] else None  # [V, D]
        weight = head.to(hidden.dtype)
        for start in range(0, len(hidden), chunk_size):
            rows = slice(start, start + chunk_size)
            teacher_logits = teacher(start, min(rows.stop, len(hidden)))
            logits = (hidden[rows] @ weight.T).requires_grad_(wants_grad)  # [C, V]
            with torch.set_grad_enabled(wants_grad):
                chunk = torch.where(mask[rows], divergence(logits, teacher_logits, beta, temperature), 0.0)
                if weights is not None:
                    chunk = chunk * weights[rows]
            values[rows] = chunk.detach()
            if not wants_grad:
                continue
            (grad_logits,) = torch.autograd.grad(chunk, logits, torch.ones_like(chunk))
            grad_hidden[rows] = grad_logits @ weight
            if grad_head is not None:
                grad_head += grad_logits.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        head = None if grad_head is None else (grad_head * grad_total).to(ctx.head_dtype)
        return (grad_hidden * grad_total).to(grad_hidden.dtype), head, None, None, None, None


def teacher_head(hidden: Tensor, head: Tensor) -> TeacherLogits:
    """The teacher's logits, made when asked for, from its hidden states `[N, D']` and head weight `[V or more, D']`."""

    def logits(start: int, stop: int) -> Tensor:
        with torch.no_grad():
            return hidden[start:stop] @ head.T

    return logits


def chunked_divergence(
    hidden: Tensor,
    head: Tensor,
    teacher: TeacherLogits,
    mask: Tensor | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`divergence` without the logits of either model: at most `chunk_size` rows of them exist at a time.

    The gradient is computed in the forward; the backward multiplies it by the scalar that comes from above. Memory
    beside the inputs: `[N, D]` and `[V, D]` gradients and a few `[chunk_size, V]`.

    Args:
        hidden: `[N, D]` the student's last hidden states.
        head: `[V, D]` the student's head weight.
        teacher: `(start, stop) -> [stop - start, V or more]` logits: `teacher_head(hidden, head)` or yours.
        mask: `[N]` nonzero on the tokens that count; all if not given.
        beta, temperature: see `divergence`.
        chunk_size: rows per chunk.
        weights: `[N]` float, what each token's value is multiplied by; None: 1.

    Returns:
        The sum over tokens `[]`, to be divided by the number of tokens of the whole optimizer step, and the values per
        token `[N]`, 0 outside the mask and without gradient.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1.")
    mask = hidden.new_ones(len(hidden), dtype=torch.bool) if mask is None else mask.bool()
    options = (beta, temperature, chunk_size, torch.is_grad_enabled())
    return _ChunkedDivergence.apply(hidden, head, mask, teacher, weights, options)


def mix_with_task(task_loss: Tensor, distill_loss: Tensor, kd_coef: float) -> Tensor:
    """`kd_coef * distill_loss + (1 - kd_coef) * task_loss`, of any one shape (Hinton et al. 2015, section 2).

    Raises:
        ValueError: `kd_coef` is outside [0, 1].
    """
    if not 0 <= kd_coef <= 1:
        raise ValueError(f"kd_coef={kd_coef}: must be in [0, 1], the share of the distillation loss.")
    return kd_coef * distill_loss + (1 - kd_coef) * task_loss
