"""What `auto` chooses on a device gives what the plain one gives: attention, head and optimizer kernel."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llm_trainer.models.attention import best_attention, describe_attention, slow_attention
from llm_trainer.models.scored import scored
from llm_trainer.optim.optimizers import create_optimizer, describe_kernel, slow_kernel

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from tiny_models import flat_batch, tiny_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "of_loss", "of_gradients"), [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 3e-2, 0.1)]
)
def test_attention_and_head_on_each_device(
    device: str, dtype: torch.dtype, of_loss: float, of_gradients: float
) -> None:
    """Loss and gradients of documents laid flat, against eager attention and whole logits of each: relative to the largest."""
    chosen, plain = tiny_model(best_attention(device)[0]).to(device), tiny_model("eager").to(device)
    plain.load_state_dict(chosen.state_dict())
    batch = {name: tensor.to(device) for name, tensor in flat_batch().items()}
    lengths = batch.pop("document_lengths").cpu()
    whole = torch.zeros((), device=device)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = scored(chosen)(**batch, document_lengths=lengths).loss_sum
        for document in batch["input_ids"].split(lengths.tolist(), dim=1):
            logits = plain(document).logits.float()
            whole = whole + nn.functional.cross_entropy(logits[0, :-1], document[0, 1:], reduction="sum")
    loss.backward()
    whole.backward()
    assert loss.item() == pytest.approx(whole.item(), rel=of_loss)
    for (name, found), expected in zip(chosen.named_parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and expected.grad is not None
        scale = expected.grad.abs().max()
        assert (found.grad - expected.grad).abs().max() <= of_gradients * scale, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["adamw", "adam", "muon"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_fused_updates_on_each_device(device: str, name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Weights after five updates with the same gradients."""

    def trained(fused: bool | None) -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(33, 17, device=device, dtype=dtype))
        bias = nn.Parameter(torch.randn(33, device=device, dtype=dtype))
        optimizer = create_optimizer([weight, bias], name, lr=1e-2, fused=fused)
        for _ in range(5):
            for parameter in (weight, bias):
                parameter.grad = torch.randn(parameter.shape).to(device, dtype)
            optimizer.step()
        return torch.cat([weight.detach().flatten(), bias.detach()]).float()

    torch.testing.assert_close(trained(None), trained(False), rtol=tolerance, atol=tolerance)


def test_what_is_said_of_them() -> None:
    config = tiny_model("blocked").config
    assert describe_attention(config, "cpu") == ("blocked", "no mask, each document by itself")
    config.model_type = "gpt_neox"
    assert describe_attention(config, "cpu") == ("sdpa", "torch's own kernels and the masks that gpt_neox makes")
    config._attn_implementation = "eager"
    assert describe_attention(config, "cpu") == ("eager", "transformers has no other for gpt_neox")
    assert best_attention("mps") == ("sdpa", "torch's own kernels")

    cpu = torch.device("cpu")
    assert "set_attn_implementation" in slow_attention(tiny_model("sdpa"), cpu)
    assert slow_attention(tiny_model("blocked"), cpu) == ""
    assert slow_attention(tiny_model("eager"), cpu) == ""  # somebody asked for it
    assert slow_attention(tiny_model("sdpa"), torch.device("meta")) == ""

    weight = nn.Parameter(torch.zeros(2, 2))
    assert describe_kernel(create_optimizer([weight])) == ("AdamW, fused", "one kernel for the whole update on cpu")
    assert describe_kernel(create_optimizer([weight], "lion")) is None
    assert "AdamW(..., fused=True)" in slow_kernel(torch.optim.AdamW([weight]))
    for told in (
        torch.optim.AdamW([weight], fused=True),
        torch.optim.AdamW([weight], foreach=False),
        torch.optim.SGD([weight], lr=0.1),
        create_optimizer([weight], fused=False),
    ):
        assert slow_kernel(told) == ""
    with pytest.raises(ValueError, match="'sgd' has no fused kernel, expected one of adam, adamw, muon"):
        create_optimizer([weight], "sgd", fused=True)
