"""Losses of routers against the reference numbers (tests/reference/README.md, moe)."""

import torch

from llm_trainer.losses.experts import Routing, balance_loss, count_routes, router_z_loss, shares_of
from reference_cases import Case


def test_load_balancing(moe_case: Case) -> None:
    case, hyper = moe_case, moe_case.hyper
    for dtype in (torch.float64, torch.float32):
        logits = [
            case.inputs[f"router_logits.{i}"].to(dtype, copy=True).requires_grad_() for i in range(hyper["num_layers"])
        ]
        mask = case.inputs["attention_mask"] if hyper["use_attention_mask"] else None
        routing = count_routes(logits, hyper["top_k"], mask)
        loss = balance_loss(routing, shares_of(routing.assigned, hyper["top_k"]))
        loss.backward()
        case.assert_close(loss, case.expected["loss_hf"], dtype, "loss")
        case.assert_close(router_z_loss(routing), case.expected["router_z_loss_mean"], dtype, "z-loss")
        for i, layer in enumerate(logits):
            case.assert_close(layer.grad, case.outputs[f"grad_router_logits.{i}"], dtype, f"gradient of layer {i}")
        # Each layer by itself, as others balance.
        for i, expected in enumerate(case.expected["loss_per_layer"]):
            one = Routing(routing.assigned[i : i + 1], routing.prob_sum[i : i + 1], routing.z_sum, routing.tokens)
            case.assert_close(balance_loss(one, shares_of(one.assigned, hyper["top_k"])), expected, dtype, f"layer {i}")


def test_means_over_the_parts_of_a_step_add_up(moe_case: Case) -> None:
    """With f of all tokens, the means of micro-batches, each times its share of the tokens, are the loss and its gradient."""
    case, hyper = moe_case, moe_case.hyper
    whole = [case.inputs[f"router_logits.{i}"] for i in range(hyper["num_layers"])]
    mask = torch.ones(len(whole[0]), dtype=torch.long)
    if hyper["use_attention_mask"]:
        mask = case.inputs["attention_mask"].flatten()
    logits = [layer.clone().requires_grad_() for layer in whole]
    shares = shares_of(count_routes(whole, hyper["top_k"], mask).assigned, hyper["top_k"])
    total = torch.zeros((), dtype=torch.float64)
    for rows in torch.arange(len(mask)).split(3):
        routing = count_routes([layer[rows] for layer in logits], hyper["top_k"], mask[rows])
        total = total + balance_loss(routing, shares) * routing.tokens / mask.sum()
    total.backward()
    case.assert_close(total, case.expected["loss_hf"], torch.float64, "loss")
    for i, layer in enumerate(logits):
        case.assert_close(layer.grad, case.outputs[f"grad_router_logits.{i}"], torch.float64, f"gradient of layer {i}")
