"""The chunked head against the same arithmetic on all logits at once."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trainer import kernels
from llm_trainer.losses import chunked
from llm_trainer.losses.chunked import Objective, chunked_logprobs, chunked_loss, chunked_objective
from llm_trainer.losses.drawn_from import DrawnFrom
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


def labels_but_last() -> Tensor:
    return head()[1].clamp(max=V - 2)


def restricted() -> DrawnFrom:
    """Every third token from all ids but the suppressed last one, the others from a few, with their labels among them."""
    labels = labels_but_last()
    generator = torch.Generator().manual_seed(2)
    kept = []
    for number, label in enumerate(labels.tolist()):
        others = [id for id in torch.randperm(V, generator=generator)[:4].tolist() if id != label]
        kept.append([] if number % 3 == 0 else [*others, label])
    counts = torch.tensor([len(ids) for ids in kept])
    return DrawnFrom(torch.tensor(sum(kept, [])), counts, torch.tensor([V - 1]))


@pytest.mark.parametrize("drawn_from", [None, restricted()], ids=["all ids", "some ids"])
def test_an_objective_per_token_is_differentiated_in_the_forward(drawn_from: DrawnFrom | None) -> None:
    (inputs, _), labels = head(), labels_but_last()
    old, advantages = torch.randn(2, N, dtype=torch.float64)

    def clipped(logprobs: Tensor, entropy: Tensor, columns: Any) -> Tensor:
        ratios = (logprobs - columns["old"]).exp()
        return -torch.minimum(ratios * columns["adv"], ratios.clamp(0.8, 1.2) * columns["adv"]) - 0.1 * entropy.square()

    columns = {"old": old - 3, "adv": advantages}
    scores = chunked_objective(*inputs, labels, Objective(clipped, columns), drawn_from)
    logits = all_logits(inputs)
    if drawn_from is not None:
        logits = logits.masked_fill(drawn_from.excluded(slice(0, N), V), -torch.inf)
    log_probs = logits.log_softmax(-1)
    logprobs = log_probs.gather(-1, labels[:, None])[:, 0]
    entropy = torch.distributions.Categorical(logits=logits.clamp(min=-1e9)).entropy()
    wanted = clipped(logprobs, entropy, columns)
    torch.testing.assert_close(scores.loss_sum, wanted.sum())
    torch.testing.assert_close(scores.logprobs, logprobs.detach())
    torch.testing.assert_close(scores.entropy, entropy.detach())
    for ours, theirs in zip(gradients(3 * scores.loss_sum, inputs), gradients(3 * wanted.sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)

    again = chunked_logprobs(*inputs, labels, with_entropy=True, drawn_from=drawn_from)  # the other way to the same
    assert again.entropy is not None
    total = clipped(again.logprobs, again.entropy, columns).sum()
    for ours, theirs in zip(gradients(total, inputs), gradients(wanted.sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_excluded_ids_leave_every_gradient_finite(dtype: torch.dtype) -> None:
    (inputs, _), labels = head(dtype), labels_but_last()
    columns = {"scale": torch.full((N,), 128.0)}
    objective = Objective(lambda logprobs, entropy, columns: columns["scale"] * (logprobs + entropy), columns)
    scores = chunked_objective(*inputs, labels, objective, restricted())
    assert scores.loss_sum.isfinite()
    for gradient in gradients(scores.loss_sum / 128, inputs):
        assert gradient.isfinite().all()


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
