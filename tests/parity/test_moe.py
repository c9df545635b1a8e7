"""Load balancing against the reference numbers (tests/reference/README.md, moe)."""

import torch

from llm_trainer.losses.language import load_balancing_loss
from reference_cases import Case


def test_load_balancing(moe_case: Case) -> None:
    case, hyper = moe_case, moe_case.hyper
    for dtype in (torch.float64, torch.float32):
        logits = [
            case.inputs[f"router_logits.{i}"].to(dtype, copy=True).requires_grad_() for i in range(hyper["num_layers"])
        ]
        mask = case.inputs["attention_mask"] if hyper["use_attention_mask"] else None
        sizes = hyper["num_experts"], hyper["top_k"], mask
        loss = load_balancing_loss(logits, *sizes)
        loss.backward()
        case.assert_close(loss, case.expected["loss_hf"], dtype, "loss")
        for i, layer in enumerate(logits):
            case.assert_close(layer.grad, case.outputs[f"grad_router_logits.{i}"], dtype, f"gradient of layer {i}")
