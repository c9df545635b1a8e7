"""What of attention on a GPU can be shown without one: shapes by fake tensors, masks by plain arithmetic."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AttentionInterface, Qwen3Config

from llm_trainer.config.model import ModelConfig
from llm_trainer.data.collate import IGNORE
from llm_trainer.models import attention, gpu_attention
from llm_trainer.models.attention import blocked_mask, document_bounds
from llm_trainer.models.build import build_model
from llm_trainer.models.document_attention import document_attention
from llm_trainer.models.scored import scored

LENGTHS = (5, 1, 9)
OURS = Qwen3Config(num_hidden_layers=1, attn_implementation="blocked")
OTHERS = Qwen3Config(num_hidden_layers=1, attn_implementation="sdpa")


def positions() -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in LENGTHS])[None]


def test_packed_documents_do_not_see_each_other() -> None:
    """With the mask of the positions, attention is that of our CPU operator, document by document."""
    torch.manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 8)
    key, value = torch.randn(2, 1, 2, sum(LENGTHS), 8)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    expected, _ = document_attention(query, key, value, positions(), 0.3)
    for bounds in (None, torch.tensor([0, 5, 6, 15])):  # float32 has no flash kernel: positions tell in both cases
        found, _ = gpu_attention.gpu_attention(module, query, key, value, 0.3, positions(), bounds, {})
        torch.testing.assert_close(found.transpose(1, 2), expected, atol=1e-6, rtol=1e-5)


def test_rows_of_one_document_need_no_mask() -> None:
    assert gpu_attention.packed_mask(None) is None
    assert gpu_attention.packed_mask(torch.arange(7)[None]) is None
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 6, 8)
    module = SimpleNamespace(is_causal=True)
    wrong_positions = torch.zeros(2, 6)  # not looked at: the bounds say that rows are documents
    found, _ = gpu_attention.gpu_attention(
        module, query, key, value, None, wrong_positions, torch.tensor([0, 6, 12]), {}
    )
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(found.transpose(1, 2), expected)


def test_the_flash_kernel_is_called_as_torch_wants_it() -> None:
    """Shapes of the output and of all gradients, with fewer key than query heads, on the meta device."""
    total = sum(LENGTHS)
    query = torch.empty(1, 4, total, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    key = torch.empty(1, 2, total, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    value = torch.empty(1, 2, total, 64, device="meta", dtype=torch.bfloat16, requires_grad=True)
    bounds = torch.empty(4, device="meta", dtype=torch.int32)
    output = gpu_attention.packed_flash(query, key, value, bounds, 128, 0.3)
    assert output.shape == (1, total, 4, 64)
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    for tensor in (query, key, value):
        assert tensor.grad is not None
        assert tensor.grad.shape == tensor.shape


def test_bounds_are_given_where_ours_runs_on_a_gpu() -> None:
    flat, lengths = torch.empty(1, 15, dtype=torch.int64), torch.tensor(LENGTHS)
    assert document_bounds(OURS, flat, positions(), lengths) == {}  # on the CPU positions tell
    on_gpu = SimpleNamespace(shape=flat.shape, device=SimpleNamespace(type="cuda"))
    assert document_bounds(OURS, on_gpu, positions(), None) == {}  # only the positions tell
    assert document_bounds(OTHERS, on_gpu, None, lengths) == {}


def test_no_mask_is_made_on_either_device() -> None:
    for device in ("cpu", "cuda"):
        given = {"batch_size": 1, "allow_is_causal_skip": False, "config": OURS, "device": device}
        assert blocked_mask(q_length=15, kv_length=15, **given) is None


def test_a_whole_model_on_the_path_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a GPU without a flash kernel gives the same scores and gradients; bounds reach every layer."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    model = scored(build_model(config, attention="blocked"))
    ids = torch.randint(0, 64, (1, sum(LENGTHS)))
    flat = {"input_ids": ids, "position_ids": positions(), "document_lengths": torch.tensor(LENGTHS)}
    rows = {"input_ids": torch.randint(0, 64, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    flat["labels"] = ids.masked_fill(positions() == 0, IGNORE)

    def scores_and_gradient(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        scores = model(**batch)
        scores.loss_sum.backward()
        return scores.logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = [scores_and_gradient(batch) for batch in (flat, rows)]
    calls = []

    def as_on_a_gpu(module, query, key, value, mask, dropout=0.0, scaling=None, position_ids=None, **kwargs):
        assert mask is None
        calls.append(kwargs["cu_seq_lens_q"].tolist())
        assert kwargs["max_length_q"] == 128
        bounds = kwargs["cu_seq_lens_q"]
        return gpu_attention.gpu_attention(module, query, key, value, scaling, position_ids, bounds, kwargs)

    AttentionInterface.register("blocked", as_on_a_gpu)
    monkeypatch.setattr(attention, "GPU", "cpu")
    try:
        found = [scores_and_gradient(batch) for batch in (flat, rows)]
    finally:
        attention.register()
    assert calls == [[0, 5, 6, 15]] * 2 + [[0, 7, 14, 21]] * 2
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
