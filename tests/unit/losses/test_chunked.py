"""The chunked head against the same arithmetic on all logits at once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trainer import kernels
from llm_trainer.losses import chunked
from llm_trainer.losses.chunked import chunked_logprobs, chunked_loss
from llm_trainer.losses.language import LanguageLoss, flat_losses

N, D, V = 37, 6, 19
OPTIONS = {
    "plain": LanguageLoss(),
    "smooth": LanguageLoss(label_smoothing=0.2),
    "z": LanguageLoss(z_loss_coef=0.05),
    "dft": LanguageLoss(dft=True),
    "all": LanguageLoss(0.1, 0.02, (3, 4), 2.5, dft=True),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 1)  # 16 rows: three chunks


def head(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[list[Tensor | None], Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (V, D), (V,))]
    leaves: list[Tensor | None] = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    return leaves if bias else [*leaves[:2], None], torch.randint(0, V, (N,), generator=generator)


def all_logits(inputs: list[Any]) -> Tensor:
    hidden, weight, bias = inputs
    return hidden @ weight.T + (0 if bias is None else bias)


def gradients(value: Tensor, inputs: list[Tensor | None]) -> list[Tensor]:
    return list(torch.autograd.grad(value, [x for x in inputs if x is not None], retain_graph=True))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_loss_and_gradients_are_those_of_autograd(name: str, bias: bool) -> None:
    inputs, labels = head(bias=bias)
    scores = chunked_loss(*inputs, labels, OPTIONS[name], with_entropy=True)
    values, logprobs = flat_losses(all_logits(inputs), labels, OPTIONS[name])
    log_probs = all_logits(inputs).log_softmax(-1)
    torch.testing.assert_close(scores.loss_sum, values.sum())
    torch.testing.assert_close(scores.logprobs, logprobs.detach())
    torch.testing.assert_close(scores.entropy, -(log_probs.exp() * log_probs).sum(-1).detach())
    assert torch.equal(scores.correct, all_logits(inputs).argmax(-1) == labels)
    assert not scores.logprobs.requires_grad
    for ours, theirs in zip(
        gradients(0.3 * scores.loss_sum, inputs), gradients(0.3 * values.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_logprobs_and_entropy_carry_gradients_per_token() -> None:
    inputs, labels = head()
    on_logprob, on_entropy = torch.randn(2, N, dtype=torch.float64)
    scores = chunked_logprobs(*inputs, labels, with_entropy=True)
    log_probs = all_logits(inputs).log_softmax(-1)
    logprobs, entropy = log_probs.gather(-1, labels[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)
    torch.testing.assert_close(scores.logprobs, logprobs)
    assert scores.entropy is not None
    ours = gradients((on_logprob * scores.logprobs + on_entropy * scores.entropy).sum(), inputs)
    theirs = gradients((on_logprob * logprobs + on_entropy * entropy).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    without = chunked_logprobs(*inputs, labels)
    assert without.entropy is None
    torch.testing.assert_close(gradients(without.loss_sum, inputs), gradients(-logprobs.sum(), inputs))


@pytest.mark.parametrize("function", [chunked_loss, chunked_logprobs])
def test_autocast_multiplies_in_bfloat16_and_adds_up_in_float32(function: Any) -> None:
    inputs, labels = head(torch.float32, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        scores = function(*inputs, labels)
        logits = torch.nn.functional.linear(inputs[0], inputs[1])
        assert logits.dtype == torch.bfloat16
        loss = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")
    torch.testing.assert_close(scores.loss_sum, loss, rtol=1e-6, atol=1e-5)
    for ours, theirs in zip(gradients(scores.loss_sum, inputs), gradients(loss, inputs), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_only_wanted_gradients_are_computed() -> None:
    (hidden, weight, _), labels = head(bias=False)
    assert hidden is not None and weight is not None
    chunked_loss(hidden, weight.detach(), None, labels).loss_sum.backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not chunked_loss(hidden, weight, None, labels).loss_sum.requires_grad


@pytest.mark.parametrize("function", [chunked_loss, chunked_logprobs])
def test_no_tokens_give_zero_and_zero_gradients(function: Any) -> None:
    inputs, labels = head()
    scores = function(inputs[0][:0], *inputs[1:], labels[:0])  # type: ignore[index]
    scores.loss_sum.backward()
    assert scores.loss_sum.item() == 0.0
    assert all(x is not None and x.grad is not None and not x.grad.any() for x in inputs)


def test_of_equal_logits_the_first_is_the_prediction() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0]])
    scores = chunked_loss(torch.ones(3, 1), weight, None, torch.tensor([0, 1, 2]))
    assert scores.correct.tolist() == [False, True, False]


def test_a_second_backward_is_refused() -> None:
    inputs, labels = head()
    loss = chunked_loss(*inputs, labels).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_compiled_kernels_give_what_eager_ones_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over two batch sizes, so that the second one meets the kernel of the first."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(4099, 16, generator=generator)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 2**24)
    for n in (70, 83):
        hidden, labels = torch.randn(n, 16, generator=generator), torch.randint(0, 4099, (n,), generator=generator)
        results = []
        for flops in (0, None):
            monkeypatch.setattr(kernels, "_compiles", kernels._compiles)
            kernels.compile_after(flops)
            inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
            scores = chunked_loss(*inputs, None, labels, OPTIONS["all"], with_entropy=True)
            results.append([*scores, *gradients(scores.loss_sum, [*inputs])])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=2e-5, atol=2e-5)
    assert chunked.statistics.compiled is not None
