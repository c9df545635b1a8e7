"""Whole preference and reward runs of TRL, reproduced: ten optimizer steps from the same weights on the same batches."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

from llm_trainer import DPOTrainer, KTOTrainer, RewardTrainer
from llm_trainer.models.rewarding import reward_model
from reference_cases import follow

Batch = dict[str, torch.Tensor]


class MicroBatchNLL(DPOTrainer):
    """TRL's NLL term: a mean per micro-batch, where ours is one over the whole step."""

    def _prepare_batch(self, batch: Batch) -> Batch:
        self._begin_step([batch], [self._loss_weight(batch)], lambda numbers: numbers)
        return super()._prepare_batch(batch)


# run -> trainer, and what is TRL's own way and no option of it: its ORPO also counts the prompt in the NLL term.
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "trl_dpo_sigmoid": (DPOTrainer, {}),
    "trl_dpo_ipo": (DPOTrainer, {}),
    "trl_dpo_rpo": (MicroBatchNLL, {}),
    "trl_orpo": (DPOTrainer, {"loss_type": "orpo", "mask_prompt": False}),
    "trl_cpo": (DPOTrainer, {}),
    "trl_simpo": (DPOTrainer, {}),
    "trl_kto": (KTOTrainer, {}),
    "trl_reward": (RewardTrainer, {}),
    "trl_reward_margin_center": (RewardTrainer, {}),
}
RENAMED = {  # TRL's options -> ours
    "beta": "beta",
    "simpo_gamma": "simpo_gamma",
    "cpo_alpha": "nll_loss_coef",
    "desirable_weight": "desirable_weight",
    "undesirable_weight": "undesirable_weight",
    "center_rewards_coefficient": "center_coef",
}


def options_of(hyper: dict[str, Any]) -> dict[str, Any]:
    """What a run was told, in our words."""
    options = {ours: hyper[theirs] for theirs, ours in RENAMED.items() if theirs in hyper}
    losses = hyper.get("loss_type")
    if isinstance(losses, list):
        weights = hyper.get("loss_weights") or [1.0] * len(losses)
        options["loss_type"] = dict(zip(losses, weights, strict=True))
    elif losses is not None:  # the CPO trainer's, whose "sigmoid" is CPO itself
        options["loss_type"] = {"sigmoid": "cpo"}.get(losses, losses)
    return options


def test_every_option_of_a_case_is_read() -> None:
    rpo = {"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.3], "beta": 0.7}
    assert options_of(rpo) == {"beta": 0.7, "loss_type": {"sigmoid": 0.8, "sft": 0.3}}
    simpo = {"loss_type": "simpo", "simpo_gamma": 0.9, "cpo_alpha": 0.2, "beta": 2.0}
    assert options_of(simpo) == {"beta": 2.0, "loss_type": "simpo", "simpo_gamma": 0.9, "nll_loss_coef": 0.2}


def labelled(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return ids.where(mask.bool(), -100)


def ours(raw: Batch) -> Batch:
    """A batch as TRL's trainers consumed it, as a joined batch."""
    if "chosen_input_ids" in raw:  # ORPO and CPO keep the sides apart, each with its prompt
        sides = [
            {k.removeprefix(f"{s}_"): v for k, v in raw.items() if k.startswith(s)} for s in ("chosen", "rejected")
        ]
        width = max(side["input_ids"].shape[1] for side in sides)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        return {
            name: torch.cat([pad(side[name], (0, width - side[name].shape[1]), value=value) for side in sides])
            for name, value in fill.items()
        }
    batch = {name: raw[name] for name in ("input_ids", "attention_mask", "margin") if name in raw}
    batch["labels"] = labelled(raw["input_ids"], raw.get("completion_mask", raw["attention_mask"]))
    if "label" in raw:
        kl = {name: raw[f"KL_{name}"] for name in ("input_ids", "attention_mask")}
        kl["labels"] = labelled(raw["KL_input_ids"], raw["KL_completion_mask"])
        batch |= {f"kl_{name}": value for name, value in kl.items()} | {"desirable": raw["label"].bool()}
    return batch


def batches_of(tensors: Batch) -> list[Batch]:
    numbers = sorted({int(name.split(".")[0].removeprefix("batch")) for name in tensors if name.startswith("batch")})
    return [
        ours(
            {
                name.split(".")[1]: value if value.is_floating_point() else value.long()
                for name, value in tensors.items()
                if name.startswith(f"batch{number}.")
            }
        )
        for number in numbers
    ]


@pytest.mark.parametrize("name", RUNS)
def test_trajectory(name: str, reference_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = reference_dir / "e2e"
    case = json.loads((folder / f"{name}.json").read_text())
    hyper, trainer_class, own = case["hyper"], *RUNS[name]
    options = options_of(hyper) | own
    model = AutoModelForCausalLM.from_pretrained(folder / "policy", attn_implementation="eager")
    if trainer_class is RewardTrainer:
        model = reward_model(model, pad_token_id=0)
        head = load_file(folder / "reward_score_head.safetensors")
        model.score.weight.data.copy_(next(iter(head.values())))
    elif name.startswith(("trl_dpo", "trl_kto")):
        options["ref_model"] = AutoModelForCausalLM.from_pretrained(folder / "ref", attn_implementation="eager")
    tensors = load_file(folder / f"{name}.safetensors")
    seen = follow(trainer_class, case, model, batches_of(tensors), tmp_path, **options)
    limit = case["tolerance"]["loss_abs_float32"]
    assert len(seen) == hyper["max_steps"]
    for found, expected in zip(seen, case["logged"], strict=True):
        assert math.isclose(found["loss"], expected["loss"], abs_tol=limit)
        assert math.isclose(found["grad_norm"], expected["grad_norm"], rel_tol=1e-3)
        for metric in set(found) & set(expected) - {"loss", "grad_norm", "num_tokens"}:
            assert math.isclose(found[metric], expected[metric], rel_tol=1e-4, abs_tol=1e-3), metric
    for parameter, expected in case["final_params"].items():
        value = model.get_parameter(parameter).detach()
        assert math.isclose(value.double().norm(), expected["l2"], rel_tol=1e-5), parameter
        assert torch.allclose(value.flatten()[:4], torch.tensor(expected["first4"]), atol=1e-4), parameter
