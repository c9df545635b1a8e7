"""Preference losses against the reference numbers: values, gradients and metrics, in float64 and float32."""

from dataclasses import replace

import pytest
import torch

from llm_trainer.losses.pairs import Pairs, pairs_from_tokens, sequence_logps
from llm_trainer.losses.preference import (
    PreferenceLoss,
)
from llm_trainer.losses.unpaired import UnpairedLoss, kto_kl
from reference_cases import Case, load_case

OPTIONS = {  # reference name -> ours, where they differ
    "kind": "loss_type",
    "gamma": "simpo_gamma",
    "nll_coef": "nll_loss_coef",
}
ORPO_METRICS = {
    "log_odds_chosen(mean log odds)": "log_odds_chosen",
    "log_odds_ratio(mean logsigmoid(log odds))": "log_odds_ratio",
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def inputs(case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a case in `dtype`; those that a gradient is expected for require one."""
    tensors = {k: v.to(dtype, copy=True) if v.is_floating_point() else v for k, v in case.inputs.items()}
    for name in case.outputs:
        if name.startswith("grad_"):
            tensors[name.removeprefix("grad_")].requires_grad_()
    return tensors


def check_gradients(case: Case, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, expected in case.outputs.items():
        if name.startswith("grad_"):
            case.assert_close(tensors[name.removeprefix("grad_")].grad, expected, dtype, name)


def token_logps(logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """`[B, T, V]`, `[B, T]` -> `[B, T - 1]` log-probs of the tokens that follow."""
    return logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def check_pairs(case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    pairs = pairs_from_tokens(
        tensors["policy_chosen_logps"],
        tensors["policy_rejected_logps"],
        tensors["chosen_mask"],
        tensors["rejected_mask"],
        tensors["ref_chosen_logps"],
        tensors["ref_rejected_logps"],
    )
    hyper = {k: v for k, v in case.hyper.items() if k != "optional"}
    terms = PreferenceLoss(**{"nll_loss_coef": 0.0} | {OPTIONS.get(k, k): v for k, v in hyper.items()})(pairs)
    loss = terms.total()
    loss.backward()
    check_gradients(case, tensors, dtype)

    nll = terms.nll_sums.sum() / terms.nll_counts.sum()
    found = {k: v.mean() for k, v in terms.metrics.items()}
    found |= {"loss": loss, "preference_loss": terms.losses.mean(), "nll_loss": nll}
    for name, expected in case.expected.items():
        case.assert_close(found[ORPO_METRICS.get(name, name)], expected, dtype, name)
    if "per_sequence_loss" in case.outputs:
        case.assert_close(terms.losses, case.outputs["per_sequence_loss"], dtype, "per pair")
        case.assert_close(terms.metrics["rewards/chosen"], case.outputs["chosen_rewards"], dtype, "chosen rewards")
        case.assert_close(
            terms.metrics["rewards/rejected"], case.outputs["rejected_rewards"], dtype, "rejected rewards"
        )


def check_from_logits(case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    mask = tensors["completion_mask"][:, 1:]
    policy = token_logps(tensors["policy_logits"], tensors["input_ids"])
    reference = token_logps(tensors["ref_logits"], tensors["input_ids"])
    (pc, pr), (rc, rr), (mc, mr) = (x.chunk(2) for x in (policy, reference, mask))
    terms = PreferenceLoss(case.hyper["kind"], beta=case.hyper["beta"])(pairs_from_tokens(pc, pr, mc, mr, rc, rr))
    terms.total().backward()
    check_gradients(case, tensors, dtype)
    case.assert_close(terms.total(), case.expected["loss"], dtype, "loss")
    case.assert_close(terms.metrics["rewards/chosen"].mean(), case.expected["rewards/chosen"], dtype)
    case.assert_close(terms.metrics["rewards/rejected"].mean(), case.expected["rewards/rejected"], dtype)
    case.assert_close(sequence_logps(policy, mask), case.outputs["policy_seq_logps"], dtype, "policy sums")
    case.assert_close(sequence_logps(reference, mask), case.outputs["ref_seq_logps"], dtype, "reference sums")


def check_unpaired(case: Case, dtype: torch.dtype) -> None:
    tensors = inputs(case, dtype)
    kl = kto_kl(sequence_logps(tensors["kl_policy_logps"] - tensors["kl_ref_logps"], tensors["kl_mask"]))
    log_ratios = sequence_logps(tensors["policy_logps"] - tensors["ref_logps"], tensors["mask"])
    options = {k: v for k, v in case.hyper.items() if k in ("beta", "desirable_weight", "undesirable_weight")}
    losses, metrics = UnpairedLoss(case.hyper["kind"], **options)(log_ratios, tensors["labels"], kl)
    losses.mean().backward()
    check_gradients(case, tensors, dtype)
    found = {k: v.mean() for k, v in metrics.items()} | {"loss": losses.mean()}
    found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    if case.hyper["kind"] == "apo_zero_unpaired":
        found["kl"] = torch.zeros(())  # the reference reports the KL it uses; we report the one it was given
    for name, expected in case.expected.items():
        case.assert_close(found[name], expected, dtype, name)
    rewards = torch.empty_like(log_ratios)
    rewards[tensors["labels"]], rewards[~tensors["labels"]] = metrics["rewards/chosen"], metrics["rewards/rejected"]
    case.assert_close(rewards, case.outputs["rewards"], dtype, "rewards")


@DTYPES
def test_reference_numbers(pref_case: Case, dtype: torch.dtype) -> None:
    if "policy_logits" in pref_case.inputs:
        check_from_logits(pref_case, dtype)
    elif "labels" in pref_case.inputs:
        check_unpaired(pref_case, dtype)
    else:
        check_pairs(pref_case, dtype)


def test_a_mix_is_the_weighted_sum_of_its_losses(reference_dir) -> None:
    """MPO's mix, of losses that the cases above hold to their own reference values."""
    tensors = load_case(reference_dir / "pref" / "sigmoid_0").inputs
    pairs = Pairs(
        *(sequence_logps(tensors[f"policy_{side}_logps"], tensors[f"{side}_mask"]) for side in ("chosen", "rejected")),
        *(tensors[f"{side}_mask"].sum(-1) for side in ("chosen", "rejected")),
        *(sequence_logps(tensors[f"ref_{side}_logps"], tensors[f"{side}_mask"]) for side in ("chosen", "rejected")),
    )
    mix = PreferenceLoss({"dpo": 0.8, "bco_pair": 0.2, "sft": 0.5})(pairs)
    single = {name: PreferenceLoss(name)(pairs).losses for name in ("sigmoid", "bco_pair")}
    torch.testing.assert_close(mix.losses, 0.8 * single["sigmoid"] + 0.2 * single["bco_pair"], rtol=1e-12, atol=0)
    nll = -pairs.chosen_logps.sum() / pairs.chosen_lengths.sum()
    torch.testing.assert_close(mix.total(), mix.losses.mean() + 0.5 * nll, rtol=1e-12, atol=0)
    baseline = torch.tensor(0.3, dtype=torch.float64)
    moved = PreferenceLoss("bco_pair")(replace(pairs, reward_baseline=baseline)).losses
    assert (moved - single["bco_pair"]).abs().max() > 1e-3
