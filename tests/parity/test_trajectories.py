"""Whole training runs of other libraries, reproduced: ten optimizer steps from the same weights on the same batches."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llm_trainer import SFTTrainer
from reference_cases import follow

RUNS = ("hf_clm", "hf_clm_accum_wd", "trl_sft_assistant_only", "trl_sft_completion_only")


def batches_of(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The micro-batches `batch0.*`, `batch1.*`, ... in the order they were consumed."""
    numbers = sorted({int(name.split(".")[0].removeprefix("batch")) for name in tensors if name.startswith("batch")})
    return [
        {name.split(".")[1]: t.long() for name, t in tensors.items() if name.startswith(f"batch{number}.")}
        for number in numbers
    ]


@pytest.mark.parametrize("name", RUNS)
def test_trajectory(name: str, reference_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case = json.loads((reference_dir / "e2e" / f"{name}.json").read_text())
    tensors = load_file(reference_dir / "e2e" / f"{name}.safetensors")
    hyper = case["hyper"]
    model = AutoModelForCausalLM.from_pretrained(reference_dir / "e2e" / "policy", attn_implementation="eager")
    seen = follow(SFTTrainer, case, model, batches_of(tensors), tmp_path)
    limit = case["tolerance"]["loss_abs_float32"]
    assert len(seen) == hyper["max_steps"]
    for ours, theirs in zip(seen, case["logged"], strict=True):
        assert math.isclose(ours["loss"], theirs["loss"], abs_tol=limit)
        assert math.isclose(ours["grad_norm"], theirs["grad_norm"], rel_tol=1e-3)
        if "mean_token_accuracy" in theirs:
            assert math.isclose(ours["mean_token_accuracy"], theirs["mean_token_accuracy"], abs_tol=1e-6)
    for parameter, expected in case["final_params"].items():
        value = model.get_parameter(parameter).detach()
        assert math.isclose(value.double().norm(), expected["l2"], rel_tol=1e-5), parameter
        assert torch.allclose(value.flatten()[:4], torch.tensor(expected["first4"]), atol=1e-4), parameter
