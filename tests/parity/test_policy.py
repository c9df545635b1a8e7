"""Policy losses, advantages and what PPO needs against the reference numbers: values, gradients and metrics.

Each case of a loss is taken as it is, padded, and laid flat with its rows in another order; in float64 and float32.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_trainer.losses.advantages import Advantages, group_statistics, level_share, weighted_rewards
from llm_trainer.losses.policy import KL_ESTIMATORS, PolicyLoss, PolicyTokens
from llm_trainer.losses.sequences import Sequences
from llm_trainer.losses.value import AdaptiveKL, gae, kl_estimates, token_rewards, value_loss, whiten
from reference_cases import Case, iter_cases, load_case

ROOT = Path(__file__).parents[1] / "reference"
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
LAYOUTS = pytest.mark.parametrize("flat", [False, True], ids=["padded", "flat"])
METRICS = {  # the reference's name -> ours
    "kl": "kl",
    "entropy": "entropy",
    "ratio_mean": "ratio",
    "clip_ratio/low_mean": "clip_ratio/low_mean",
    "clip_ratio/high_mean": "clip_ratio/high_mean",
    "clip_ratio/region_mean": "clip_ratio/region_mean",
    "approx_kl_old(k3 of old||new)": "approx_kl",
    "clip_fraction": "clip_ratio/region_mean",
    "approx_kl_k3": "approx_kl",
}
BETWEEN_LIBRARIES = ("outside_range_fraction(sign-agnostic, peer)", "approx_kl_k1", "approx_kl_k2")


def names(group: str, *parts: str) -> list[str]:
    return [case.name.split("/")[1] for case in iter_cases(ROOT, group) if case.name.split("/")[1].startswith(parts)]


def case_of(group: str, name: str) -> Case:
    return load_case(ROOT / group / name)


class Laid:
    """The tensors `[B, T]` of a case in a layout; flat rows lie in reverse order."""

    def __init__(self, flat: bool, mask: Tensor) -> None:
        self.flat, (self.num_rows, self.width) = flat, mask.shape
        lengths = order = None
        if flat:
            lengths = torch.full((self.num_rows,), self.width)
            order = torch.arange(self.num_rows).flip(0)
        self.sequences = Sequences(self.lay(mask).bool(), lengths, order)

    def lay(self, values: Tensor) -> Tensor:
        return values.flip(0).reshape(1, -1) if self.flat and values.dim() == 2 else values

    def back(self, values: Tensor) -> Tensor:
        return values.view(self.num_rows, self.width).flip(0) if self.flat else values


def loss_of(hyper: dict[str, Any]) -> PolicyLoss:
    """Our options for those of a reference case."""
    name = hyper["loss_type"]
    if name == "grpo" and hyper["level"] == "sequence":
        name = "gspo"
    options: dict[str, Any] = {"clip_eps": hyper["epsilon"], "clip_eps_high": hyper["epsilon_high"]}
    if name == "cispo":
        if not hyper.get("cispo_lower"):
            del options["clip_eps"]
        if hyper["cispo_eps"] == "absolute":
            options["clip_eps_high"] = hyper["epsilon_high"] - 1
    if "tau_pos" in hyper:
        options["tau"] = (hyper["tau_pos"], hyper["tau_neg"])
    if "vespo" in hyper:
        options["vespo"] = tuple(hyper["vespo"])
    return PolicyLoss(
        name,
        **options,
        delta=hyper["delta"] or hyper.get("dual_clip"),  # one bound under two names
        kl_coef=hyper["beta"],
        kl_estimator=hyper["kl_estimator"],
        kl_bias_correction=hyper.get("kl_importance_corrected", False),
        max_completion_length=hyper.get("max_completion_length"),
        count_empty_rows=hyper["aggregation"] == "seq_mean_token_mean",
    )


def tokens_of(inputs: dict[str, Tensor], laid: Laid) -> PolicyTokens:
    columns = [inputs["advantages"], inputs["old_logps"], inputs.get("ref_logps")]
    return PolicyTokens(*(None if value is None else laid.lay(value) for value in columns))


def in_dtype(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in case.inputs.items()}


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("name", [name for name in names("grpo", "") if name != "dapo_two_microbatches"])
def test_policy_loss(name: str, dtype: torch.dtype, flat: bool) -> None:
    case = case_of("grpo", name)
    inputs = in_dtype(case, dtype)
    laid = Laid(flat, inputs["completion_mask"] * inputs["tool_mask"])
    loss, tokens = loss_of(case.hyper), tokens_of(inputs, laid)
    logprobs = laid.lay(inputs["logps"]).requires_grad_()
    losses = loss.token_losses(logprobs, tokens, laid.sequences)
    num_terms = loss.num_terms(laid.sequences)
    # The step may have further terms: tokens of other micro-batches, or as many rows in each of them.
    all_terms = case.hyper.get("num_items", num_terms * case.hyper.get("grad_accum", 1))
    mean = loss.mean(losses, laid.sequences) * num_terms / all_terms
    mean.backward()
    case.assert_close(mean, case.expected["loss"], dtype, "loss")
    case.assert_close(laid.back(losses), case.outputs["per_token_loss"], dtype, "per token")
    assert logprobs.grad is not None
    case.assert_close(laid.back(logprobs.grad), case.outputs["grad_logps"], dtype, "gradient")
    check_metrics(case, loss.metrics(logprobs, tokens, laid.sequences, laid.lay(inputs["entropies"])), dtype)

    if loss.is_per_token:  # the same from single tokens, as the head makes it
        function, columns = loss.per_token(tokens, laid.sequences)
        chosen = laid.sequences.mask
        flat_columns = {name: value[chosen] for name, value in columns.items()}
        own = logprobs.detach()[chosen].requires_grad_()
        total = function(own, torch.zeros_like(own), flat_columns).sum() / all_terms
        total.backward()
        assert own.grad is not None
        case.assert_close(total, case.expected["loss"], dtype, "loss per token")
        case.assert_close(own.grad, logprobs.grad[chosen], dtype, "gradient per token")


def check_metrics(case: Case, metrics: dict[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> None:
    seen = 0
    for name, expected in case.expected.items():
        if name in METRICS:
            total, count = metrics[METRICS[name]]
            case.assert_close(total.double() / count, expected, dtype, name)
            seen += 1
        else:
            assert name in ("loss", "policy_loss", *BETWEEN_LIBRARIES), name
    assert seen >= 3


@DTYPES
def test_tokens_of_the_whole_step_divide_where_it_is_cut(dtype: torch.dtype) -> None:
    case = case_of("grpo", "dapo_two_microbatches")
    inputs = in_dtype(case, dtype)
    loss = loss_of(case.hyper)
    parts = [{k[4:]: v for k, v in inputs.items() if k.startswith(part)} for part in ("mb0.", "mb1.")]
    sequences = [Sequences(part["mask"].bool()) for part in parts]
    weights = [loss.num_terms(one) for one in sequences]
    assert sum(weights) == case.hyper["num_items"]
    total = 0.0
    for number, (part, one, weight) in enumerate(zip(parts, sequences, weights, strict=True)):
        logprobs = part["logps"].requires_grad_()
        tokens = PolicyTokens(part["advantages"], part["old_logps"], part["ref_logps"])
        mean = loss.mean(loss.token_losses(logprobs, tokens, one), one) * weight / sum(weights)
        mean.backward()
        total += mean.item()
        case.assert_close(logprobs.grad, case.outputs[f"mb{number}.grad_logps"], dtype, f"gradient {number}")
    case.assert_close(total, case.expected["loss_total"], dtype, "loss")


ADVANTAGE_KINDS: dict[str, Callable[[], Advantages]] = {
    "adv_group_std_ddof1_eps1e-4": Advantages,
    "adv_group_std_ddof1_eps1e-6": lambda: Advantages(eps=1e-6),
    "adv_group_std_ddof1_eps1e-9": lambda: Advantages(eps=1e-9),
    "adv_group_std_ddof0_eps1e-4": lambda: Advantages(ddof=0),
    "adv_batch_std_ddof1_eps1e-4": lambda: Advantages("batch"),
    "adv_no_scale": lambda: Advantages("dr_grpo"),
    "adv_rloo": lambda: Advantages("rloo"),
}


@DTYPES
@pytest.mark.parametrize("name", ["binary", "group", "tiny_var", "zero_var"])
def test_advantages(name: str, dtype: torch.dtype) -> None:
    case = case_of("advantage", name)
    assert case.outputs.keys() == ADVANTAGE_KINDS.keys()
    rewards = in_dtype(case, dtype)["rewards"]
    size = case.hyper["num_generations"]
    groups = torch.arange(len(rewards)) // size
    mixed = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(0))
    for kind, expected in case.outputs.items():
        given = rewards
        if name == "tiny_var" and kind.endswith(("eps1e-6", "eps1e-9")):
            given = case.inputs["rewards"]  # 0.5 +- 4e-6 in float32 are other rewards
        found, is_missing = ADVANTAGE_KINDS[kind]()(given[:, None], groups)
        case.assert_close(found, expected, dtype, kind)
        assert not is_missing.any()
        found, _ = ADVANTAGE_KINDS[kind]()(given[mixed, None], groups[mixed])
        case.assert_close(found, expected[mixed], dtype, kind)
    group = group_statistics(rewards, groups)
    case.assert_close(group.mean[::size], case.expected["group_means"], dtype)
    case.assert_close(group.std[::size], case.expected["group_stds_ddof1"], dtype)
    level, total = level_share(rewards, groups)
    case.assert_close(level / total, case.expected["frac_groups_zero_std"], dtype)
    case.assert_close(rewards.mean(), case.expected["reward_mean"], dtype)
    case.assert_close(rewards.std(), case.expected["reward_std_ddof1"], dtype)


@DTYPES
def test_rewards_that_are_missing(dtype: torch.dtype) -> None:
    case = case_of("advantage", "multi_reward_nan")
    rewards = in_dtype(case, dtype)["rewards_per_func"]
    weights = torch.tensor(case.hyper["weights"])
    groups = torch.arange(len(rewards)) // case.hyper["num_generations"]
    advantages, is_missing = Advantages(weights=weights)(rewards, groups)
    case.assert_close(advantages, case.outputs["advantages"], dtype)
    case.assert_close(weighted_rewards(rewards, weights), case.outputs["total_reward"], dtype)
    assert is_missing.tolist() == case.outputs["total_reward"].isnan().tolist()


@DTYPES
def test_gdpo(dtype: torch.dtype) -> None:
    case = case_of("advantage", "gdpo_normalize_then_sum")
    rewards = in_dtype(case, dtype)["rewards_per_func"]
    groups = torch.arange(len(rewards)) // case.hyper["num_generations"]
    advantages, _ = Advantages("gdpo", torch.tensor(case.hyper["weights"]))(rewards, groups)
    case.assert_close(advantages, case.outputs["advantages"], dtype)


@DTYPES
def test_kl_estimators(dtype: torch.dtype) -> None:
    case = case_of("kl", "estimators")
    inputs = in_dtype(case, dtype)
    mask = inputs["mask"].bool()
    for name, estimator in KL_ESTIMATORS.items():
        logprobs = inputs["logps"].clone().requires_grad_()
        values = estimator(logprobs - inputs["ref_logps"])
        values.sum().backward()
        case.assert_close(values, case.outputs[name], dtype, name)
        case.assert_close(logprobs.grad, case.outputs[f"grad_{name}"], dtype, f"gradient of {name}")
        case.assert_close(values[mask].mean(), case.expected[f"masked_mean_{name}"], dtype, name)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("name", names("ppo", "gae"))
def test_gae(name: str, dtype: torch.dtype, flat: bool) -> None:
    case = case_of("ppo", name)
    inputs = in_dtype(case, dtype)
    laid = Laid(flat, inputs["mask"])
    found = gae(
        laid.lay(inputs["rewards"]), laid.lay(inputs["values"]), laid.sequences, case.hyper["gamma"], case.hyper["lam"]
    )
    for what, values in zip(("advantages", "returns"), found, strict=True):
        case.assert_close(laid.back(values), case.outputs[what], dtype, what)
    whitened = whiten(found[0], laid.sequences.mask)
    case.assert_close(laid.back(whitened), case.outputs["advantages_whitened"], dtype, "whitened")


@DTYPES
def test_whitening(dtype: torch.dtype) -> None:
    case = case_of("ppo", "whiten")
    inputs = in_dtype(case, dtype)
    kinds = {"ddof1_shift": (True, 1), "ddof1_noshift": (False, 1), "ddof0_shift": (True, 0)}
    assert case.outputs.keys() == kinds.keys()
    for name, (shift, ddof) in kinds.items():
        case.assert_close(whiten(inputs["values"], inputs["mask"], shift, ddof), case.outputs[name], dtype, name)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("name", names("ppo", "pipeline"))
def test_from_scores_to_advantages(name: str, dtype: torch.dtype, flat: bool) -> None:
    case = case_of("ppo", name)
    hyper, inputs = case.hyper, in_dtype(case, dtype)
    laid = Laid(flat, inputs["mask"])
    sequences = laid.sequences
    old, reference = laid.lay(inputs["logps_old"]), laid.lay(inputs["logps_ref"])
    kl = kl_estimates(old, reference, sequences, hyper["kl_estimator"])
    rewards = token_rewards(
        inputs["scores"], sequences, kl, hyper["kl_coef"], inputs["has_eos"], hyper["missing_eos_penalty"]
    )
    case.assert_close(laid.back(rewards), case.outputs["token_rewards"], dtype, "rewards")
    if hyper["whiten_rewards"]:
        rewards = whiten(rewards, sequences.mask, shift_mean=False)
    case.assert_close(laid.back(rewards), case.outputs["token_rewards_after_whitening"], dtype, "whitened rewards")
    advantages, returns = gae(rewards, laid.lay(inputs["values"]), sequences, hyper["gamma"], hyper["lam"])
    case.assert_close(laid.back(advantages), case.outputs["advantages"], dtype, "advantages")
    case.assert_close(laid.back(returns), case.outputs["returns"], dtype, "returns")
    whitened = whiten(advantages, sequences.mask)
    case.assert_close(laid.back(whitened), case.outputs["advantages_whitened"], dtype, "whitened advantages")
    case.assert_close(sequences.sum(kl).mean(), case.expected["objective_kl"], dtype)
    non_score = -hyper["kl_coef"] * sequences.sum(kl).mean()
    case.assert_close(non_score, case.expected["objective_non_score_reward"], dtype)
    case.assert_close(sequences.sum(-old).mean(), case.expected["objective_entropy"], dtype)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("name", names("ppo", "policy"))
def test_policy_loss_of_ppo(name: str, dtype: torch.dtype, flat: bool) -> None:
    case = case_of("ppo", name)
    hyper, inputs = case.hyper, in_dtype(case, dtype)
    laid = Laid(flat, inputs["mask"])
    loss = PolicyLoss("bnpo", hyper["clip_low"], hyper["clip_high"], delta=hyper["dual_clip"])
    tokens = tokens_of(inputs, laid)
    logprobs = laid.lay(inputs["logps"]).requires_grad_()
    mean = loss.mean(loss.token_losses(logprobs, tokens, laid.sequences), laid.sequences)
    mean.backward()
    assert logprobs.grad is not None
    case.assert_close(mean, case.expected["policy_loss"], dtype, "loss")
    case.assert_close(laid.back(logprobs.grad), case.outputs["grad_logps"], dtype, "gradient")
    check_metrics(case, loss.metrics(logprobs, tokens, laid.sequences), dtype)


@DTYPES
@pytest.mark.parametrize("name", names("ppo", "value"))
def test_value_loss(name: str, dtype: torch.dtype) -> None:
    case = case_of("ppo", name)
    inputs = in_dtype(case, dtype)
    values, mask = inputs["values"].requires_grad_(), inputs["mask"]
    losses, metrics = value_loss(values, inputs["returns"], mask, inputs["old_values"], case.hyper["cliprange_value"])
    mean = losses.sum() / mask.sum()
    mean.backward()
    case.assert_close(mean, case.expected["value_loss"], dtype, "loss")
    case.assert_close(mean * case.hyper["vf_coef"], case.expected["value_loss_times_vf_coef"], dtype, "loss")
    case.assert_close(values.grad, case.outputs["grad_values"], dtype, "gradient")
    total, count = metrics["val/clipfrac_avg"]
    case.assert_close(total.double() / count, case.expected["clip_fraction"], dtype, "clipped")


def test_adaptive_kl() -> None:
    case = case_of("ppo", "adaptive_kl")
    kl = AdaptiveKL(case.hyper["init"], case.hyper["target"], case.hyper["horizon"])
    for observed, expected in zip(case.hyper["observed_kl"], case.expected["coef_after"], strict=True):
        kl.update(observed, case.hyper["n_steps"])
        case.assert_close(kl.coef, expected)
        resumed = AdaptiveKL(0.0, case.hyper["target"], case.hyper["horizon"])
        resumed.load_state_dict(kl.state_dict())
        assert resumed.coef == kl.coef
