"""Whole runs of TRL's GRPO trainer, reproduced: ten optimizer steps from the same weights on the same completions."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llm_trainer import GRPOTrainer
from reference_cases import follow

RENAMED = {  # TRL's options -> ours
    "loss_type": "loss_type",
    "beta": "kl_coef",
    "epsilon": "clip_eps",
    "epsilon_high": "loss_clip_eps_high",
    "use_bias_correction_kl": "kl_bias_correction",
    "max_completion_length": "gen_max_seq_len",
}
NAMES = {  # a tensor of TRL's batch -> a key of ours
    "prompt_ids": "prompts",
    "prompt_mask": "prompt_attention_mask",
    "completion_ids": "responses",
    "completion_mask": "response_attention_mask",
    "advantages": "advantages",
    "old_per_token_logps": "old_logprobs",
    "ref_per_token_logps": "ref_logprobs",
}


class MeanOverRollout(GRPOTrainer):
    """TRL's DAPO: the divisor is the mean number of tokens of the rollout's steps, where ours is that of each step."""

    shares: list[float]

    def _compute_loss(self, outputs: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return super()._compute_loss(outputs, batch) * self.shares[self.machine.step]


SAME = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")


def batches_of(tensors: dict[str, torch.Tensor], given: tuple[str, ...]) -> list[dict[str, torch.Tensor]]:
    """The batches as TRL consumed them, with the columns that are `given`."""
    numbers = sorted({int(name.split(".")[0].removeprefix("batch")) for name in tensors if name.startswith("batch")})
    batches = []
    for number in numbers:
        batch = {ours: tensors.get(f"batch{number}.{theirs}") for theirs, ours in NAMES.items()}
        batches.append({name: value for name, value in batch.items() if value is not None and name in given})
    return batches


@pytest.mark.parametrize(
    ("name", "own_reference"),  # whether the reference's log-probs are computed, or those of the batches
    [("trl_grpo", True), ("trl_grpo_kl_is", True), ("trl_grpo", False), ("trl_dapo", False), ("trl_gspo", False)],
)
def test_trajectory(name: str, own_reference: bool, reference_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = reference_dir / "e2e"
    case = json.loads((folder / f"{name}.json").read_text())
    hyper = case["hyper"]
    options: dict[str, Any] = {ours: hyper[theirs] for theirs, ours in RENAMED.items() if theirs in hyper}
    if hyper.get("importance_sampling_level") == "sequence":
        options["loss_importance_sampling_level"] = "seq"
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", attn_implementation="eager")
    given = tuple(NAMES.values())
    if own_reference:
        options["ref_model"] = AutoModelForCausalLM.from_pretrained(folder / "ref", attn_implementation="eager")
        given = tuple(name for name in given if name != "ref_logprobs")

    tensors = load_file(folder / f"{name}.safetensors")
    trainer_class = GRPOTrainer
    if name == "trl_dapo":
        trainer_class = MeanOverRollout
        steps = range(hyper["max_steps"])
        tokens = [float(tensors[f"batch{n}.completion_mask"].sum()) for n in steps]
        divisors = [float(tensors[f"batch{n}.num_items_in_batch"]) / hyper["steps_per_generation"] for n in steps]
        MeanOverRollout.shares = [count / divisor for count, divisor in zip(tokens, divisors, strict=True)]

    seen = follow(trainer_class, case, model, batches_of(tensors, given), tmp_path, **options)
    limit = case["tolerance"]["loss_abs_float32"]
    assert len(seen) == hyper["max_steps"]
    for found, expected in zip(seen, case["logged"], strict=True):
        assert math.isclose(found["loss"], expected["loss"], abs_tol=limit)
        assert math.isclose(found["grad_norm"], expected["grad_norm"], rel_tol=1e-3, abs_tol=1e-6)
        metrics = set(SAME) & set(expected)
        if not hyper.get("use_bias_correction_kl"):  # TRL then logs the corrected one
            metrics |= {"kl"} & set(expected)
        for metric in metrics:
            assert math.isclose(found[metric], expected[metric], rel_tol=1e-3, abs_tol=2e-2), metric
    for parameter, expected in case["final_params"].items():
        value = model.get_parameter(parameter).detach()
        assert math.isclose(value.double().norm(), expected["l2"], rel_tol=1e-5), parameter
        assert torch.allclose(value.flatten()[:4], torch.tensor(expected["first4"]), atol=1e-4), parameter
