"""Losses that learn from comparisons: DPO and its relatives. Those on single answers are in `unpaired`.

Every algorithm here sees a completion as one number, its log-probability under the policy, and usually a second one
under a frozen reference model. With `lc = log pi(chosen) - log ref(chosen)` and `lr` the same for the rejected one, DPO
is `-log sigmoid(beta * (lc - lr))`; the others change what is compared, or the curve it is put through.

    pairs = pairs_from_tokens(...)                          # `losses.pairs`: one number per answer
    terms = PreferenceLoss("sigmoid", beta=0.1)(pairs)      # one loss per pair [B], metrics per pair
    terms.total(num_pairs, num_nll_terms).backward()        # the counts of the whole optimizer step

Losses are returned per pair, so that cutting a step into micro-batches changes nothing; the exceptions are
named in `BATCH_COUPLED`. Metric names are those of TRL. Letter: `B` pairs.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_trainer.losses.language import mean_over
from llm_trainer.losses.pairs import Pairs


def _exp(x: Tensor) -> Tensor:
    """`exp` that saturates where its square would overflow, so that losses stay finite far from the reference."""
    return x.clamp(max=0.5 * math.log(torch.finfo(x.dtype).max)).exp()


# f-DPO (Wang et al. 2023, arXiv:2309.16240): the log-ratio x = log u is replaced by f'(u), up to a constant that
# cancels between chosen and rejected. (x [B], alpha) -> [B]. The alpha is that of u^-alpha in the paper's table 1, where
# 0 is the reverse KL and 1 the forward one; TRL's `f_alpha_divergence_coef` is 1 - alpha.
F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda x, alpha: x,
    "forward_kl": lambda x, alpha: -_exp(-x),
    "js_divergence": lambda x, alpha: F.logsigmoid(x),
    "alpha_divergence": lambda x, alpha: -_exp(-alpha * x) / alpha,
}


def _margin(pairs: Pairs, options: "PreferenceLoss", average: bool = False) -> Tensor:
    """`f'(chosen ratio) - f'(rejected ratio)` `[B]`, before beta; `lc - lr` for the usual reverse KL."""
    chosen, rejected = pairs.log_ratios(average)
    derivative = F_DIVERGENCES[options.f_divergence]
    return derivative(chosen, options.f_alpha) - derivative(rejected, options.f_alpha)


def _logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """`-log sigmoid(margin)`, where a fraction `label_smoothing` of the labels is believed to be flipped; `[B]`."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def sigmoid_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with label smoothing cDPO (Mitchell 2023). `[B]`.

    TRL's `sigmoid` ignores label smoothing; here it is applied.
    """
    return _logistic(options.beta * _margin(pairs, options), options.label_smoothing)


def sigmoid_norm_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """DPO on log-ratios per token (Lambert et al. 2024, Tulu 3, arXiv:2411.15124). `[B]`."""
    return _logistic(options.beta * _margin(pairs, options, average=True), options.label_smoothing)


def ld_dpo_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """LD-DPO (Liu et al. 2024, arXiv:2409.06411): DPO in which being long is rewarded less. `[B]`.

    The tokens by which one completion is longer than the other count `ld_alpha`.
    """
    if pairs.surplus is None:
        raise ValueError("loss_type 'ld_dpo' needs log-probs per token, found stored sums; use pairs_from_tokens.")
    chosen, rejected = pairs.log_ratios()
    less_chosen, less_rejected = pairs.surplus
    discount = 1 - options.ld_alpha
    margin = (chosen - discount * less_chosen) - (rejected - discount * less_rejected)
    return _logistic(options.beta * margin, options.label_smoothing)


def robust_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """Unbiased under flipped labels: rDPO (Chowdhury et al. 2024, arXiv:2403.00409); may be negative. `[B]`."""
    h = options.beta * _margin(pairs, options)
    eps = options.label_smoothing
    return (-(1 - eps) * F.logsigmoid(h) + eps * F.logsigmoid(-h)) / (1 - 2 * eps)


def hinge_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """`max(0, 1 - h)`: SLiC (Zhao et al. 2023, arXiv:2305.10425) with log-ratios. `[B]`."""
    return torch.relu(1 - options.beta * _margin(pairs, options))


def ipo_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, eq. 17) on log-ratios per token, as in TRL and LLaMA-Factory. `[B]`."""
    return (_margin(pairs, options, average=True) - 1 / (2 * options.beta)).square()


def ipo_sum_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """IPO as in the paper and OpenRLHF: on summed log-ratios; its scale grows with the length. `[B]`."""
    return (_margin(pairs, options) - 1 / (2 * options.beta)).square()


def apo_zero_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """Chosen up, rejected down: APO-zero (D'Oosterlinck et al. 2024, arXiv:2408.06266). `[B]`."""
    chosen, rejected = pairs.log_ratios()
    return torch.sigmoid(-options.beta * chosen) + torch.sigmoid(options.beta * rejected)


def apo_down_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """Chosen down, rejected further down, for a policy better than its data: APO-down (arXiv:2408.06266). `[B]`."""
    chosen, rejected = pairs.log_ratios()
    return torch.sigmoid(options.beta * chosen) + torch.sigmoid(-options.beta * (chosen - rejected))


def exo_pair_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """EXO (Ji et al. 2024, arXiv:2402.00856): reverse KL to the smoothed label. `[B]`.

    Label smoothing 0 would make the loss infinite and therefore means 1e-3, the paper's value.
    """
    h = options.beta * _margin(pairs, options)
    eps = options.label_smoothing or 1e-3
    log_right, log_wrong = F.logsigmoid(h), F.logsigmoid(-h)
    return log_right.exp() * (log_right - math.log1p(-eps)) + log_wrong.exp() * (log_wrong - math.log(eps))


def nca_pair_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """NCA for pairs (Chen et al. 2024, arXiv:2402.05369): the chosen completion must not become less likely. `[B]`."""
    chosen, rejected = (options.beta * ratio for ratio in pairs.log_ratios())
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def sppo_hard_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """SPPO with hard labels (Wu et al. 2024, arXiv:2405.00675): ratios are pulled to +-1 / (2 beta). `[B]`."""
    chosen, rejected = pairs.log_ratios()
    return (chosen - 0.5 / options.beta).square() + (rejected + 0.5 / options.beta).square()


def bco_pair_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """BCO (Jung et al. 2024, arXiv:2404.04656): classify rewards as above or below their running mean. `[B]`.

    The mean is `pairs.reward_baseline`, kept by the caller from the reward metrics of every step: the mean before this
    step, 0 in the first one, so that the loss of a pair does not depend on the other pairs.
    """
    chosen, rejected = (options.beta * ratio for ratio in pairs.log_ratios())
    baseline = 0.0 if pairs.reward_baseline is None else pairs.reward_baseline
    return -F.logsigmoid(chosen - baseline) - F.logsigmoid(baseline - rejected)


def aot_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """AOT (Melnyk et al. 2024, arXiv:2406.05882): the policy's margins dominate the reference's as distributions.

    `[B]`, in the order of the sorted margins, not of the pairs: k-th smallest is compared with k-th smallest.
    """
    assert pairs.ref_chosen_logps is not None and pairs.ref_rejected_logps is not None
    policy = (pairs.chosen_logps - pairs.rejected_logps).sort().values
    reference = (pairs.ref_chosen_logps - pairs.ref_rejected_logps).sort().values
    return _logistic(options.beta * (policy - reference), options.label_smoothing)


def aot_unpaired_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """AOT for unpaired data (arXiv:2406.05882): sorted chosen ratios against sorted rejected ratios. `[B]`, sorted."""
    chosen, rejected = pairs.log_ratios()
    return _logistic(options.beta * (chosen.sort().values - rejected.sort().values), options.label_smoothing)


def discopop_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """DiscoPOP (Lu et al. 2024, arXiv:2406.08414): logistic and exponential loss, blended. `[B]`."""
    h = options.beta * _margin(pairs, options)
    blend = h / options.discopop_tau
    # exp(-h) * sigmoid(h / tau) in one exponent: for very negative h the factors are inf and 0.
    return -F.logsigmoid(h) * torch.sigmoid(-blend) + _exp(F.logsigmoid(blend) - h)


def simpo_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, eq. 6): no reference, log-probs per token, a target margin. `[B]`.

    gamma is absolute (`simpo_gamma`), not relative to beta. The paper's settings are beta 2 to 10, gamma 0.3 to 1.6.
    """
    chosen, rejected = pairs.average_logps()
    return _logistic(options.beta * (chosen - rejected) - options.simpo_gamma, options.label_smoothing)


def cpo_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """The preference part of CPO (Xu et al. 2024, arXiv:2401.08417): DPO with a uniform reference. `[B]`."""
    return _logistic(options.beta * (pairs.chosen_logps - pairs.rejected_logps), options.label_smoothing)


def log_odds(pairs: Pairs) -> Tensor:
    """ORPO's log odds ratio `[B]`; odds = p / (1 - p), p the geometric mean probability per token."""

    def logit(average: Tensor) -> Tensor:
        # Just below 0, where 1 - p is still a number; log(-expm1(a)) keeps the digits that log(1 - exp(a)) loses.
        average = average.clamp(max=-torch.finfo(average.dtype).tiny)
        return average - torch.log(-torch.expm1(average))

    chosen, rejected = pairs.average_logps()
    return logit(chosen) - logit(rejected)


def orpo_loss(pairs: Pairs, options: "PreferenceLoss") -> Tensor:
    """The preference part of ORPO (Hong et al. 2024, arXiv:2403.07691): `-beta log sigmoid(log odds ratio)`. `[B]`."""
    return -options.beta * F.logsigmoid(log_odds(pairs))


# (pairs, options) -> [B].
PAIR_LOSSES: dict[str, Callable[[Pairs, "PreferenceLoss"], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "robust": robust_loss,
    "hinge": hinge_loss,
    "ipo": ipo_loss,
    "ipo_sum": ipo_sum_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "exo_pair": exo_pair_loss,
    "nca_pair": nca_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "bco_pair": bco_pair_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
    "discopop": discopop_loss,
    "ld_dpo": ld_dpo_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
}
ALIASES = {"dpo": "sigmoid", "cdpo": "sigmoid", "rdpo": "robust", "sppo": "sppo_hard"}
REFERENCE_FREE = frozenset({"simpo", "cpo", "orpo", "sft"})
PER_TOKEN_REWARDS = frozenset({"simpo", "orpo"})  # their rewards and log-probs are reported per token
BATCH_COUPLED = frozenset({"aot", "aot_unpaired"})  # they sort pairs: split differently, a step changes
_WITH_NLL = frozenset({"cpo", "orpo"})  # defined with the NLL term, coefficient 1
_OF_MARGIN = frozenset({"sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "ipo_sum", "exo_pair", "discopop"})
_SMOOTHED = frozenset(
    {"sigmoid", "sigmoid_norm", "robust", "exo_pair", "aot", "aot_unpaired", "ld_dpo", "simpo", "cpo"}
)

# The NLL term: (log-probs, lengths), both [B] -> numerators and denominators per pair, both [B]. "token": every token
# of the step counts the same; "sequence": every completion does (RPO, Pang et al. 2024, arXiv:2404.19733).
NLL_NORMS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "token": lambda logps, lengths: (-logps, lengths),
    "sequence": lambda logps, lengths: (-logps / lengths.clamp(min=1), lengths.clamp(max=1)),
}


def resolve_loss_type(loss_type: str | Mapping[str, float], ipo: bool = False) -> dict[str, float]:
    """Translate a loss type as users write it into weights per loss.

    Args:
        loss_type: a name of `PAIR_LOSSES` or `ALIASES`, in any case, or weights of several:
            `{"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}` is MPO (Wang et al. 2024, arXiv:2411.10442); "sft" is the
            NLL term.
        ipo: the older spelling of `loss_type="ipo"`.

    Raises:
        ValueError: a name is unknown, the mix is empty, or `ipo` contradicts `loss_type`.
    """
    weights = {loss_type: 1.0} if isinstance(loss_type, str) else dict(loss_type)
    resolved: dict[str, float] = {}
    for name, weight in weights.items():
        known = ALIASES.get(name.lower(), name.lower())
        if known not in PAIR_LOSSES and known != "sft":
            names = sorted([*PAIR_LOSSES, *ALIASES, "sft"])
            close = difflib.get_close_matches(known, names, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"loss_type: unknown preference loss {name!r}; {hint}Known: {', '.join(names)}.")
        resolved[known] = resolved.get(known, 0.0) + weight
    if not resolved:
        raise ValueError("loss_type: the mix of losses is empty; give at least one name, for example {'sigmoid': 1.0}.")
    if not ipo or set(resolved) == {"ipo"}:
        return resolved
    if set(resolved) != {"sigmoid"}:
        raise ValueError(f"loss_ipo=True contradicts loss_type={loss_type!r}; leave one of the two out.")
    return {"ipo": 1.0}


@dataclass(frozen=True)
class PreferenceTerms:
    """What `B` pairs contribute to an optimizer step.

    `losses` `[B]` per pair; `nll_sums`, `nll_counts` `[B]` numerators and denominators of the NLL term, and `nll_coef`
    its weight; `metrics` detached, `[B]` per pair.
    """

    losses: Tensor
    nll_sums: Tensor
    nll_counts: Tensor
    nll_coef: float
    metrics: dict[str, Tensor]

    def weighted(self, weights: Tensor) -> "PreferenceTerms":
        """The terms where each pair counts as much as `weights [B]` say; the metrics stay those of the pairs."""
        weights = weights.to(self.losses.dtype)
        return replace(
            self,
            losses=self.losses * weights,
            nll_sums=self.nll_sums * weights,
            nll_counts=self.nll_counts * weights,
        )

    def total(self, num_pairs: Tensor | float | None = None, num_nll_terms: Tensor | float | None = None) -> Tensor:
        """The loss `[]`: `sum(losses) / num_pairs + nll_coef * sum(nll_sums) / num_nll_terms`.

        With the counts of the whole step (`len(losses)` and `nll_counts.sum()` over its micro-batches and ranks), the
        contributions of the micro-batches add up to the step's loss however it was split. None: these pairs alone.
        """
        if num_pairs is None:
            num_pairs = len(self.losses)
        if num_nll_terms is None:
            num_nll_terms = self.nll_counts.sum()
        nll = mean_over(self.nll_sums.sum(), torch.as_tensor(num_nll_terms))
        return mean_over(self.losses.sum(), torch.as_tensor(num_pairs)) + self.nll_coef * nll


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss with its settings; call it with `Pairs`.

    Attributes:
        loss_type: a name, or a mix with weights: see `resolve_loss_type`.
        beta: how strongly the policy is held to the reference (IPO: tau; ORPO: lambda).
        label_smoothing: in [0, 0.5): share of labels believed to be flipped (cDPO, rDPO); EXO's epsilon.
        simpo_gamma: SimPO's absolute target margin.
        nll_loss_coef: weight of the NLL of the chosen completion (RPO). None: 1 for `orpo` and `cpo`, which are defined
            with it, 0 otherwise.
        nll_norm: "token" or "sequence", see `NLL_NORMS`.
        f_divergence: a name of `F_DIVERGENCES`.
        f_alpha: of "alpha_divergence", as in u^-alpha of Wang et al. (2023); TRL's coefficient is 1 - alpha.
        discopop_tau: DiscoPOP's temperature.
        ld_alpha: what the surplus tokens of the longer completion count in `ld_dpo`.

    Raises:
        ValueError: an option is unknown, out of range, or has no effect on the chosen loss.
    """

    loss_type: str | Mapping[str, float] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    nll_loss_coef: float | None = None
    nll_norm: str = "token"
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    ld_alpha: float = 0.5

    def __post_init__(self) -> None:
        names = set(resolve_loss_type(self.loss_type))
        smoothing, divergence = self.label_smoothing, self.f_divergence
        checks = [
            (self.beta > 0, f"beta={self.beta} must be above 0"),
            (0 <= smoothing < 0.5, f"label_smoothing={smoothing} must be in [0, 0.5)"),
            (0 <= self.ld_alpha <= 1, f"ld_alpha={self.ld_alpha} must be in [0, 1]"),
            (self.nll_norm in NLL_NORMS, f"nll_norm={self.nll_norm!r} must be one of {sorted(NLL_NORMS)}"),
            (divergence in F_DIVERGENCES, f"f_divergence={divergence!r} must be one of {sorted(F_DIVERGENCES)}"),
            (smoothing == 0 or names & _SMOOTHED, f"label_smoothing only acts on {sorted(_SMOOTHED)}; set it to 0"),
            (
                divergence == "reverse_kl" or names <= _OF_MARGIN | {"sft"},
                f"f_divergence={divergence!r} is only defined for {sorted(_OF_MARGIN)}; use 'reverse_kl'",
            ),
        ]
        for fine, problem in checks:
            if not fine:
                raise ValueError(f"preference loss {'+'.join(sorted(names))}: {problem}.")

    def __call__(self, pairs: Pairs) -> PreferenceTerms:
        """The contributions of `B` pairs. Raises `ValueError` if a loss lacks its reference model."""
        weights = resolve_loss_type(self.loss_type)
        if pairs.ref_chosen_logps is None and not weights.keys() <= REFERENCE_FREE:
            raise ValueError(
                f"loss_type {sorted(weights.keys() - REFERENCE_FREE)} needs the log-probs of a reference model; "
                f"give it one, or choose one of {sorted(REFERENCE_FREE)}."
            )
        losses = torch.zeros_like(pairs.chosen_logps)
        for name, weight in weights.items():
            if name != "sft":
                losses = losses + weight * PAIR_LOSSES[name](pairs, self)
        logps = pairs.chosen_logps if pairs.nll_logps is None else pairs.nll_logps
        lengths = pairs.chosen_lengths if pairs.nll_lengths is None else pairs.nll_lengths
        nll_sums, nll_counts = NLL_NORMS[self.nll_norm](logps, lengths)
        metrics = {name: value.detach() for name, value in self._metrics(pairs, set(weights)).items()}
        return PreferenceTerms(losses, nll_sums, nll_counts, self.nll_weight, metrics)

    @property
    def names(self) -> frozenset[str]:
        """The losses that are mixed, "sft" for the NLL term."""
        return frozenset(resolve_loss_type(self.loss_type))

    @property
    def couples_rows(self) -> bool:
        """Whether a pair's part depends on the others that it is computed with."""
        return not BATCH_COUPLED.isdisjoint(self.names)

    @property
    def needs_reference(self) -> bool:
        """Whether a loss compares with a reference model."""
        return not self.names <= REFERENCE_FREE

    @property
    def nll_weight(self) -> float:
        """The weight that the NLL term has in the end."""
        weights = resolve_loss_type(self.loss_type)
        coef = self.nll_loss_coef
        if coef is None:
            coef = sum(weights[name] for name in weights.keys() & _WITH_NLL)
        return coef + weights.get("sft", 0.0)

    def _metrics(self, pairs: Pairs, names: set[str]) -> dict[str, Tensor]:
        """Per pair, `[B]`. Rewards are `beta` times summed log-ratios, whatever the loss averages (as in TRL)."""
        logps = pairs.chosen_logps, pairs.rejected_logps
        if names <= PER_TOKEN_REWARDS | {"sft"}:
            logps = pairs.average_logps()
        compared = logps if names <= REFERENCE_FREE else pairs.log_ratios()
        chosen, rejected = (self.beta * value for value in compared)
        metrics = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
            "logps/chosen": logps[0],
            "logps/rejected": logps[1],
        }
        if "orpo" in names:
            metrics["log_odds_chosen"] = log_odds(pairs)
            metrics["log_odds_ratio"] = F.logsigmoid(metrics["log_odds_chosen"])
        return metrics
