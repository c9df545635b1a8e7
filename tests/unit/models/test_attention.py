"""Packed, padded and single documents give the same scores on every backend, and documents never see each other."""

from functools import cache

import pytest
import torch
from tiny_models import LENGTHS, flat_batch, padded_batch, tiny_model
from torch.nn import functional as F

from llm_trainer import kernels
from llm_trainer.models import document_attention as operator
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.document_attention import document_attention
from llm_trainer.models.scored import scored

BACKENDS = ("blocked", "sdpa", "eager")


def loss_and_gradients(
    backend: str, batches: list[dict[str, torch.Tensor]], **changes: object
) -> tuple[float, torch.Tensor]:
    model = scored(tiny_model(backend, **changes))
    total = torch.stack([model(**batch).loss_sum for batch in batches]).sum()
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def single_documents() -> list[dict[str, torch.Tensor]]:
    flat = flat_batch()
    pairs = zip(flat["input_ids"].split(LENGTHS, 1), flat["labels"].split(LENGTHS, 1), strict=True)
    return [{"input_ids": ids, "labels": labels} for ids, labels in pairs]


@cache
def single_document_results(architecture: str) -> tuple[float, torch.Tensor]:
    return loss_and_gradients("eager", single_documents(), architecture=architecture)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_padded_and_single_agree(backend: str, architecture: str) -> None:
    loss, gradient = single_document_results(architecture)
    for batch in (flat_batch(), padded_batch(), padded_batch(left=True)):
        other, other_gradient = loss_and_gradients(backend, [batch], architecture=architecture)
        assert other == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_position_crosses_a_document(backend: str) -> None:
    model, batch = scored(tiny_model(backend)), flat_batch()
    before = model(**batch).logprobs
    batch["input_ids"][0, 1] += 1
    after = model(**batch).logprobs
    first = LENGTHS[0]
    assert not torch.allclose(before[:, :first], after[:, :first], atol=1e-3)
    torch.testing.assert_close(after[:, first:], before[:, first:], rtol=0, atol=1e-6)


def test_several_documents_in_several_rows() -> None:
    ids = torch.arange(16).view(2, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    results = [scored(tiny_model(name))(ids, position_ids=positions).logprobs for name in BACKENDS]
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-5)


def test_no_mask_is_made_for_packed_and_padded_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda **_: pytest.fail("a dense mask was made"))
    model = scored(tiny_model("blocked"))
    model(**flat_batch())
    model(**padded_batch())


def test_sliding_windows_and_dropout_go_to_sdpa() -> None:
    ids = torch.arange(20)[None]
    results = []
    for backend in BACKENDS:
        model = tiny_model(backend, architecture="qwen3")
        model.config.layer_types = ["sliding_attention", "full_attention"]
        model.config.sliding_window = model.model.layers[0].self_attn.sliding_window = 3
        model.model.has_sliding_layers = True
        results.append(scored(model)(ids).logprobs)
    full = scored(tiny_model("blocked"))(ids).logprobs
    assert not torch.allclose(results[0], full, atol=1e-3)
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-5)
    dropping = scored(tiny_model("blocked", attention_dropout=0.5)).train()
    batch = flat_batch()
    assert dropping(**batch).loss_sum.item() != dropping(**batch).loss_sum.item()


def test_generation_with_a_cache_is_that_of_sdpa() -> None:
    batch = padded_batch(left=True)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    outputs = [
        tiny_model(name).generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0)
        for name in ("blocked", "sdpa")
    ]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(23,), (3, 12, 1, 7), (40, 3, 64, 520, 33)])
def test_operator_against_sdpa(dtype: torch.dtype, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row blocks in bfloat16; each document by itself is the reference."""
    monkeypatch.setattr(operator, "BLOCK_ROWS", 5)
    generator = torch.Generator().manual_seed(4)
    total = sum(lengths)
    shapes = ((1, 4, total, 8), (1, 2, total, 8), (1, 2, total, 8))
    inputs = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    upstream = torch.randn(1, 4, total, 8, generator=generator).to(dtype)
    ours, _ = document_attention(*inputs, positions, 0.3)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    parts = [x.split(lengths, 2) for x in exact]
    theirs = torch.cat(
        [
            F.scaled_dot_product_attention(*p, is_causal=True, scale=0.3, enable_gqa=True)
            for p in zip(*parts, strict=True)
        ],
        2,
    )
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours.double(), theirs, rtol=limit, atol=limit)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    expected = torch.autograd.grad(theirs, exact, upstream.double())
    for gradient, value in zip(gradients, expected, strict=True):
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), value, rtol=limit, atol=limit * value.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_branch_sees_what_it_goes_on_from(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents with no, one and two branches, beside a dense mask; positions that name no prefix begin a document."""
    monkeypatch.setattr(operator, "BLOCK_ROWS", 3)
    runs = [(0, 6), (2, 9), (6, 11), (0, 5), (0, 7), (3, 4), (9, 12)]  # positions from, to
    positions = torch.cat([torch.arange(*run) for run in runs])[None]
    mask = torch.zeros(positions.numel(), positions.numel(), dtype=torch.bool)
    lengths, starts = [b - a for a, b in runs], [0]
    for length in lengths[:-1]:
        starts.append(starts[-1] + length)
    for i, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        mask[start : start + length, start : start + length] = torch.ones(length, length).tril().bool()
        prefix, of = {1: (2, 0), 2: (6, 0), 5: (3, 4)}.get(i, (0, 0))
        mask[start : start + length, starts[of] : starts[of] + prefix] = True
    generator = torch.Generator().manual_seed(4)
    shapes = ((1, 4, len(mask), 8), (1, 2, len(mask), 8), (1, 2, len(mask), 8))
    inputs = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(shapes[0], generator=generator).to(dtype)
    ours, _ = document_attention(*inputs, positions, 0.3)
    theirs = F.scaled_dot_product_attention(*exact, attn_mask=mask, scale=0.3, enable_gqa=True)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(ours.double(), theirs, rtol=limit, atol=limit)
    gradients = torch.autograd.grad(ours, inputs, upstream)
    for gradient, value in zip(gradients, torch.autograd.grad(theirs, exact, upstream.double()), strict=True):
        torch.testing.assert_close(gradient.double(), value, rtol=limit, atol=limit * value.abs().max().item())


def test_operator_is_what_torch_compile_expects() -> None:
    query, key, value = torch.randn(3, 2, 2, 6, 4).requires_grad_().unbind(0)
    leaves = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(
        document_attention,
        (*leaves, torch.tensor([[0, 1, 2, 0, 1, 2]]), 0.5),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        document_attention, (*leaves, torch.arange(6)[None], 0.5), test_utils=("test_schema", "test_faketensor")
    )


def test_kernels_of_the_backward_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 40, 8).bfloat16().requires_grad_()
    key, value = torch.randn(2, 1, 1, 40, 8).bfloat16().unbind(0)
    monkeypatch.setattr(operator, "BLOCK_ROWS", 16)
    gradients = []
    for threshold in (2**40, 1):
        monkeypatch.setattr(kernels, "LARGE", threshold)
        output, _ = document_attention(query, key, value, torch.arange(40)[None], 0.3)
        gradients.append(torch.autograd.grad(output.float().sum(), query)[0].float())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-2, atol=2e-2)


def test_documents_of_similar_length_are_computed_together() -> None:
    """In bfloat16, up to so many tokens; elsewhere each by itself, as it is."""
    lengths = (40, 3, 64, 600, 33, 300, *[50] * 6)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    parts = operator._documents(positions, 1, sum(lengths))
    groups = operator._groups(parts, torch.bfloat16)
    assert [(group.length, len(group.places)) for group in groups] == [(64, 8), (32, 1), (608, 1), (320, 1), (64, 1)]
    alone = operator._groups(parts, torch.float32)
    assert [group.length for group in alone] == list(lengths)
    flat = torch.randn(1, 2, sum(lengths), 4)
    assert alone[1].stack(flat).data_ptr() == flat[:, :, 40:].data_ptr()
    back = torch.empty_like(flat)
    for group in groups:
        group.unstack((group.stack(flat),), (back,))
    assert torch.equal(back, flat)


def test_names() -> None:
    assert resolve_attention("auto", "cpu") == "blocked"
    assert resolve_attention("auto", torch.device("cuda")) in ("sdpa", "flash_attention_2")
    assert resolve_attention("auto", torch.device("mps")) == "sdpa"
    assert resolve_attention("eager", "cpu") == "eager"
    with pytest.raises(ValueError, match="flash_attention_2"):
        resolve_attention("fast", "cpu")
