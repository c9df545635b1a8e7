"""How the experts of a mixture are computed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import flat_batch, tiny_model
from torch import Tensor

from llm_trainer.checkpoint import write_model
from llm_trainer.models.build import build_model
from llm_trainer.models.experts import describe_experts, replayed_routers, set_experts, weights_of
from llm_trainer.models.scored import scored


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe"])
def test_both_ways_give_the_same_numbers(architecture: str) -> None:
    losses, gradients = [], []
    for how in ("grouped_mm", "eager"):
        model = tiny_model(architecture=architecture)
        set_experts(model, how)
        assert describe_experts(model)[0] == how  # type: ignore[index]
        loss = scored(model)(**flat_batch()).loss_sum
        loss.backward()
        losses.append(loss.detach())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_way_is_chosen_where_a_model_is_made(tmp_path: Path) -> None:
    model = tiny_model(architecture="glm4_moe")
    assert describe_experts(model) == ("grouped_mm", "one product for all experts of a layer")
    write_model(model, tmp_path / "model")
    loaded = build_model(tmp_path / "model", experts="eager")
    assert describe_experts(loaded)[0] == "eager"  # type: ignore[index]
    dense = tiny_model()
    assert describe_experts(dense) is None
    write_model(dense, tmp_path / "dense")
    with pytest.raises(ValueError, match="run_config.experts: got 'eager', but a Qwen3ForCausalLM has no experts"):
        build_model(tmp_path / "dense", experts="eager")


@pytest.mark.parametrize("architecture", ["qwen3_moe", "glm4_moe"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_routes_that_are_told_are_taken(architecture: str, recomputed: bool) -> None:
    """Their own change no bit; others change what is computed, and their weights are those of the live logits."""
    model = tiny_model(architecture=architecture).train()
    policy, batch, routers = scored(model), flat_batch(), replayed_routers(model)
    if recomputed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a new name
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy(
        **batch, routes=torch.full((*batch["input_ids"].shape, 4), -1)
    )  # whoever looks at routers now comes after it
    tokens = batch["input_ids"].shape[1]
    seen: list[tuple[Tensor, ...]] = [() for _ in routers]
    for layer, router in enumerate(routers):
        router.register_forward_hook(lambda _, inputs, output, layer=layer: seen.__setitem__(layer, output))

    def learned(routes: Tensor | None) -> tuple[Any, list[Tensor]]:
        model.zero_grad()
        scores = policy(**batch, routes=routes)
        scores.loss_sum.backward()
        return scores, [parameter.grad.clone() for parameter in model.parameters()]  # type: ignore[union-attr]

    # 1. its own, filled up as columns are
    plain, gradients = learned(None)
    own = torch.cat([output[2] for output in seen], dim=1)[None]  # (1, N, L * K)
    same, replayed = learned(torch.nn.functional.pad(own, (0, 3), value=-1))
    assert torch.equal(plain.loss_sum, same.loss_sum)
    assert all(torch.equal(a, b) for a, b in zip(gradients, replayed, strict=True))

    # 2. others, for all tokens but one
    told = (own + 1) % 4
    told[0, 3] = -1
    other, moved = learned(told)
    assert not torch.equal(plain.loss_sum, other.loss_sum) and not torch.equal(gradients[0], moved[0])
    for layer, (router, output) in enumerate(zip(routers, seen, strict=True)):
        wanted = told[0, :, 2 * layer : 2 * layer + 2]
        is_told = torch.arange(tokens) != 3
        assert torch.equal(output[2][is_told], wanted[is_told]) and (output[2][3] >= 0).all()
        torch.testing.assert_close(output[1], weights_of(router, output[0], output[2]), rtol=0, atol=0)
        expected = torch.bincount(output[2].flatten(), minlength=4).float()
        assert torch.equal(other.routing.assigned[layer], expected)
    with torch.no_grad():
        untold = model.eval()(batch["input_ids"]).logits  # as where it samples: whoever calls it itself is told nothing
        assert torch.equal(untold, tiny_model(architecture=architecture).eval()(batch["input_ids"]).logits)
    again, _ = learned(None)
    assert torch.equal(plain.loss_sum, again.loss_sum)


def test_routers_that_weigh_otherwise_are_told_nothing() -> None:
    model = tiny_model(architecture="qwen3_moe")
    router = model.model.layers[1].mlp.gate
    plain = router.forward
    router.forward = lambda hidden_states: (
        *plain(hidden_states)[:1],
        plain(hidden_states)[1] * 2,
        plain(hidden_states)[2],
    )
    with pytest.raises(
        ValueError, match="the routers of a Qwen3MoeForCausalLM are not of a kind whose routes can be told"
    ):
        replayed_routers(model)
