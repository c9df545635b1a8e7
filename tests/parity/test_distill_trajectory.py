"""A whole distillation run of TRL (GKD on given answers), reproduced step by step."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from llm_trainer import Distillation, SFTTrainer
from reference_cases import follow


def test_trajectory(reference_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = reference_dir / "e2e"
    case = json.loads((folder / "trl_gkd.json").read_text())
    tensors, hyper = load_file(folder / "trl_gkd.safetensors"), case["hyper"]
    model, teacher = (
        AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager") for name in ("policy", "ref")
    )
    numbers = range(sum(name.startswith("batch") and name.endswith(".input_ids") for name in tensors))
    keys = ("input_ids", "labels", "attention_mask")
    # The ends of TRL's beta are not those of the formula of the JSD but the two KLs.
    ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
    shape = (
        {"divergence": ends[hyper["beta"]]} if hyper["beta"] in ends else {"divergence": "jsd", "beta": hyper["beta"]}
    )
    batches = [{key: tensors[f"batch{i}.{key}"].long() for key in keys} for i in numbers]
    kd = Distillation(  # TRL's temperature is that of its sampling
        teacher_model=teacher, kd_coef=1.0, on_policy_fraction=hyper["lmbda"], **shape
    )
    seen = follow(SFTTrainer, case, model, batches, tmp_path, kd=kd)
    limit = case["tolerance"]["loss_abs_float32"]
    assert len(seen) == hyper["max_steps"]
    for ours, theirs in zip(seen, case["logged"], strict=True):
        assert math.isclose(ours["loss"], theirs["loss"], abs_tol=limit)
        assert math.isclose(ours["kd_loss"], theirs["loss"], abs_tol=limit)
        assert math.isclose(ours["grad_norm"], theirs["grad_norm"], rel_tol=1e-3)
    for parameter, expected in case["final_params"].items():
        value = model.get_parameter(parameter).detach()
        assert math.isclose(value.double().norm(), expected["l2"], rel_tol=1e-5), parameter
        assert torch.allclose(value.flatten()[:4], torch.tensor(expected["first4"]), atol=1e-4), parameter
