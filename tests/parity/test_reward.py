"""The reward model's loss against the reference numbers: values, gradients and metrics, in float64 and float32."""

import pytest
import torch

from llm_trainer.losses.reward import bradley_terry
from reference_cases import Case


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_reference_numbers(reward_case: Case, dtype: torch.dtype) -> None:
    case = reward_case
    inputs = {k: v.to(dtype, copy=True) for k, v in case.inputs.items()}
    chosen, rejected = inputs["rewards_chosen"].requires_grad_(), inputs["rewards_rejected"].requires_grad_()
    losses, metrics = bradley_terry(
        chosen, rejected, inputs.get("margin"), case.hyper["center_rewards_coefficient"] or 0.0
    )
    losses.mean().backward()
    case.assert_close(chosen.grad, case.outputs["grad_rewards_chosen"], dtype, "gradient of chosen")
    case.assert_close(rejected.grad, case.outputs["grad_rewards_rejected"], dtype, "gradient of rejected")
    reductions = {"min_reward": torch.min, "max_reward": torch.max}
    found = {k: reductions.get(k, torch.mean)(v) for k, v in metrics.items()} | {"loss": losses.mean()}
    assert found.keys() == case.expected.keys()
    for name, expected in case.expected.items():
        case.assert_close(found[name], expected, dtype, name)
