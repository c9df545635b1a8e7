"""The written-out mathematics against torch's, in float64."""

import pytest
import torch
from torch.nn import functional

from llm_trainer.tutorial import AdamWFromScratch, SGDFromScratch, cross_entropy_sum, warmup_cosine
from reference_cases import Case, learning_rates

PAIRS = [
    (AdamWFromScratch, torch.optim.AdamW, {"lr": 0.03}),
    (AdamWFromScratch, torch.optim.AdamW, {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}),
    (SGDFromScratch, torch.optim.SGD, {"lr": 0.03, "weight_decay": 0.1}),
    (SGDFromScratch, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    (SGDFromScratch, torch.optim.SGD, {"lr": 0.03, "momentum": 0.9, "dampening": 0.4}),
]


def make_params() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in ((4, 3), (3,), (2,))
    ]


def give_gradients(params: list[torch.Tensor], step: int) -> None:
    """Gradients of every scale; the last parameter has none in even steps."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10.0 ** (i - 2)
    if step % 2 == 0:
        params[-1].grad = None


@pytest.mark.parametrize(("edition", "reference", "hyper"), PAIRS)
def test_optimizers_are_torchs(edition: type, reference: type, hyper: dict) -> None:
    ours, theirs = make_params(), make_params()
    mine, other = edition(params=iter(ours), **hyper), reference(theirs, **hyper)
    for step in range(15):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    mine.zero_grad()
    assert all(p.grad is None for p in ours)


@pytest.mark.parametrize(("edition", "reference", "hyper"), PAIRS)
def test_state_goes_round_trip(edition: type, reference: type, hyper: dict) -> None:
    ours = make_params()
    mine = edition(params=ours, **hyper)
    for step in range(4):
        give_gradients(ours, step)
        mine.step()
    mine.set_lr(0.5)
    copies = [p.detach().clone().requires_grad_() for p in ours]
    resumed = edition(params=copies, **hyper)
    resumed.load_state_dict(mine.state_dict())
    assert resumed.get_lr() == 0.5
    for step in range(4, 8):
        for params, stepper in ((ours, mine), (copies, resumed)):
            give_gradients(params, step)
            stepper.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, copies, strict=True))


def test_nesterov_needs_momentum() -> None:
    with pytest.raises(ValueError, match="nesterov needs momentum > 0 and dampening 0, found"):
        SGDFromScratch(params=make_params(), lr=0.1, nesterov=True)


def test_cross_entropy_and_its_gradient_are_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (300 * torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(0, 7, (2, 5), generator=generator)
    labels[0, :3] = -100
    loss_sum, num_tokens = cross_entropy_sum(logits, labels)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss_sum, expected, rtol=1e-14, atol=0)
    assert num_tokens == 6
    ours, theirs = (torch.autograd.grad(loss, logits)[0] for loss in (loss_sum, expected))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_nothing_to_learn_is_zero_and_huge_logits_are_finite() -> None:
    logits = torch.full((1, 3, 4), 1e4).requires_grad_()
    loss_sum, num_tokens = cross_entropy_sum(logits, torch.full((1, 3), -100))
    loss_sum.backward()
    assert loss_sum == num_tokens == 0
    assert logits.grad is not None and not logits.grad.any()
    loss_sum, _ = cross_entropy_sum(logits, torch.zeros(1, 3, dtype=torch.long))
    assert loss_sum.item() == pytest.approx(2 * torch.log(torch.tensor(4.0)).item())


def test_reference_losses_and_gradients(lm_ce_case: Case) -> None:
    """One batch, or micro-batches whose sums are divided by the tokens of all of them."""
    if not lm_ce_case.loss.startswith("causal_lm_cross_entropy") or "+" in lm_ce_case.loss:
        pytest.skip("another loss")
    parts = [f"mb{k}." for k in range(lm_ce_case.hyper.get("num_micro_batches", 0))] or [""]
    dtype = torch.float64 if "float64" in lm_ce_case.tolerance else torch.float32
    logits = [lm_ce_case.inputs[part + "logits"].to(dtype).requires_grad_() for part in parts]
    labels = [lm_ce_case.inputs[part + "labels"] for part in parts]
    sums, counts = zip(*map(cross_entropy_sum, logits, labels), strict=True)
    loss = sum(sums) / max(1, sum(counts))
    loss.backward()
    lm_ce_case.assert_close(loss, lm_ce_case.expected["loss_global" if len(parts) > 1 else "loss"], dtype)
    for part, scores in zip(parts, logits, strict=True):
        lm_ce_case.assert_close(scores.grad, lm_ce_case.outputs[part + "grad_logits"], dtype, part)


def test_schedule_is_the_production_editions() -> None:
    hyper = {"warmup_steps": 5, "total_steps": 20, "min_lr": 0.01}
    ours = [warmup_cosine(step, 0.1, **hyper) for step in range(30)]
    assert ours == pytest.approx(learning_rates("cosine", 30, lr=0.1, **hyper), rel=1e-14)
    assert [warmup_cosine(step, 0.1, warmup_steps=2) for step in range(4)] == [0.0, 0.05, 0.1, 0.1]
