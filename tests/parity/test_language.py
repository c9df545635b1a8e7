"""Cross-entropy and its relatives against the reference numbers (tests/reference/README.md, lm_ce)."""

import torch

from llm_trainer.losses.chunked import chunked_loss
from llm_trainer.losses.language import IGNORE, LanguageLoss, num_supervised
from plain_losses import cross_entropy
from reference_cases import Case


def options(case: Case) -> LanguageLoss:
    return LanguageLoss(
        label_smoothing=case.hyper.get("label_smoothing", 0.0),
        z_loss_coef=case.hyper.get("z_loss_coef", 0.0),
        dft=case.loss == "sft_dft",
    )


def dtypes(case: Case) -> list[torch.dtype]:
    return [getattr(torch, name) for name in case.tolerance]


def test_loss_and_gradient(lm_ce_case: Case) -> None:
    case = lm_ce_case
    if "num_micro_batches" in case.hyper:
        return
    for dtype in dtypes(case):
        logits = case.inputs["logits"].to(dtype, copy=True).requires_grad_()
        loss = cross_entropy(logits, case.inputs["labels"], options(case))
        loss.backward()
        case.assert_close(loss, case.expected["loss"], dtype, "loss")
        if "grad_logits" in case.outputs:
            case.assert_close(logits.grad, case.outputs["grad_logits"], dtype, "gradient")


def test_chunked_head_gives_the_same_numbers(lm_ce_case: Case) -> None:
    """With the identity as the head's weight, its hidden states are the logits of the case."""
    case = lm_ce_case
    if "num_micro_batches" in case.hyper:
        return
    for dtype in dtypes(case):
        logits = case.inputs["logits"].to(dtype, copy=True).requires_grad_()
        labels = case.inputs["labels"][:, 1:]
        chosen, count = labels[labels != IGNORE], (labels != IGNORE).sum().clamp(min=1)
        identity = torch.eye(logits.shape[-1], dtype=dtype)
        scores = chunked_loss(
            logits[:, :-1][labels != IGNORE], identity, None, chosen, options(case), with_entropy=True
        )
        (scores.loss_sum / count).backward()
        case.assert_close(scores.loss_sum / count, case.expected["loss"], dtype, "loss")
        if "grad_logits" in case.outputs:
            case.assert_close(logits.grad, case.outputs["grad_logits"], dtype, "gradient")
        if "entropy_mean" in case.expected:
            case.assert_close(scores.entropy.mean(), case.expected["entropy_mean"], dtype, "entropy")
        if "token_accuracy" in case.expected:
            case.assert_close(scores.correct.sum() / count, case.expected["token_accuracy"], dtype, "accuracy")


def test_micro_batches_add_up_to_the_step(lm_ce_case: Case) -> None:
    case = lm_ce_case
    if "num_micro_batches" not in case.hyper:
        return
    parts = [
        (case.inputs[f"mb{k}.logits"].clone().requires_grad_(), case.inputs[f"mb{k}.labels"])
        for k in range(case.hyper["num_micro_batches"])
    ]
    total = sum(num_supervised(labels) for _, labels in parts)
    assert total == case.expected["n_valid_total"]
    losses = []
    for k, (logits, labels) in enumerate(parts):
        losses.append(cross_entropy(logits, labels, num_tokens=total))
        losses[-1].backward()
        case.assert_close(logits.grad, case.outputs[f"mb{k}.grad_logits"], what=f"gradient {k}")
    case.assert_close(torch.stack(losses), case.expected["micro_loss_scaled"], what="micro losses")
    case.assert_close(sum(losses), case.expected["loss_global"], what="loss of the step")
