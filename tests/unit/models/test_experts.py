"""How the experts of a mixture are computed."""

from pathlib import Path

import pytest
import torch
from tiny_models import flat_batch, tiny_model

from llm_trainer.checkpoint import write_model
from llm_trainer.models.build import build_model
from llm_trainer.models.experts import describe_experts, set_experts
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
