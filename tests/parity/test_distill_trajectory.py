"""A whole distillation run of TRL (GKD on given answers), reproduced step by step."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from llm_trainer import Distillation, SFTTrainer, configure_optimizer
from llm_trainer.hooks import Hook


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
    seen: list[dict[str, float]] = []
    SFTTrainer(
        model=model,
        optimizer=configure_optimizer(
            model=model,
            lr=hyper["learning_rate"],
            betas=(hyper["adam_beta1"], hyper["adam_beta2"]),
            eps=hyper["adam_epsilon"],
            weight_decay=hyper["weight_decay"],
        ),
        train_loader=[{key: tensors[f"batch{i}.{key}"].long() for key in keys} for i in numbers],
        kd=Distillation(teacher_model=teacher, kd_coef=1.0, **shape),  # TRL's temperature is that of its sampling
        device="cpu",
        max_epochs=1,
        grad_accum_steps=case["gradient_accumulation_steps"],
        max_grad_norm=hyper["max_grad_norm"],
        use_amp=False,
        log_interval=1,
        save_dir=str(tmp_path),
        save_interval=0,
        progress=False,
        hooks=[Hook("watch", lambda run: seen.append(dict(run._last_values)), every_steps=1)],
    ).train()
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
