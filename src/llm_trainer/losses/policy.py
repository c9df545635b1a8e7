"""Losses that learn from a policy's own completions and how good they were: the policy gradient and its relatives.

Per token, with r = exp(log pi(y) - log pi_old(y)) how much more probable the token has become since it was sampled and A
its advantage, the loss is `-min(r A, clip(r) A)` (PPO); the others change r, the clipping, or what the mean is taken over.

    loss = PolicyLoss("dapo", kl_coef=0.02)
    sequences = Sequences.of_batch(batch)
    losses = loss.token_losses(logprobs, tokens, sequences)        # [B, T], 0 where nothing counts
    loss.mean(losses, sequences) * loss.num_terms(sequences)       # mean x weight: cutting a step changes nothing
    loss.metrics(logprobs, tokens, sequences)                      # name -> (total, count)

All take a padded batch `[B, T]` or one laid flat `[1, N]` alike, with `losses.sequences` to say whose token is whose.
Metric names are those of TRL. Letters: `B` rows, `T` positions, `R` sequences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llm_trainer.losses.language import mean_over
from llm_trainer.losses.sequences import Sequences

# exp(80) is finite in float32, so that an advantage of 0 gives a loss of 0 however far a token has drifted; a token
# beyond it has no gradient. No library clamps as late (verl: 20), so up to here all numbers are theirs.
MAX_LOG_RATIO = 80.0

Level = Literal["token", "seq"]


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """`exp` of a log-ratio that is kept within +-`MAX_LOG_RATIO`. Any shape."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


# Estimates of KL(policy || reference) from a token that the policy wrote, given x = log policy - log reference (Schulman
# 2020, http://joschu.net/blog/kl-approx.html). Any shape. As terms of a loss only k2 has the gradient of the KL on
# average; k1 has none.
KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda x: x,
    "k2": lambda x: 0.5 * x.square(),
    "k3": lambda x: torch.expm1((-x).clamp(max=MAX_LOG_RATIO)) + x,
    "abs": lambda x: x.abs(),
}


class PolicyTokens(NamedTuple):
    """What the losses know about the tokens of a batch besides the policy's log-probs.

    Attributes:
        advantages: `[R]`, one per sequence, or `[B, T]`, one per token.
        old_logprobs: `[B, T]` when the update began; None: they are those of now, so that every ratio is 1.
        ref_logprobs: `[B, T]` under the reference model; None: there is none.
        corrections: `[B, T]` what each token's loss is multiplied by, from `Correction`; None: 1.
    """

    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    corrections: Tensor | None = None


class _Drift(NamedTuple):
    """How far tokens have drifted, all of one shape: log-prob, log-ratio (over its sequence where `PolicyLoss` says so)."""

    logprobs: Tensor
    log_ratios: Tensor
    advantages: Tensor


def clipped_loss(drift: _Drift, options: "PolicyLoss") -> Tensor:
    """`-min(r A, clip(r, 1 - eps, 1 + eps_high) A)`: PPO (Schulman et al. 2017, arXiv:1707.06347, eq. 7).

    The two bounds may differ (DAPO, Yu et al. 2025, arXiv:2503.14476). `delta` bounds r also where A < 0, which the
    minimum does not (INTELLECT-2, arXiv:2505.07291, eq. 2; dual-clip PPO, Ye et al. 2020, arXiv:1912.09729).
    """
    low, high = options.bounds
    ratios = bounded_exp(drift.log_ratios)
    capped = ratios if options.delta is None else ratios.clamp(max=options.delta)
    return -torch.minimum(capped * drift.advantages, ratios.clamp(low, high) * drift.advantages)


def cispo_loss(drift: _Drift, options: "PolicyLoss") -> Tensor:
    """`-clip(r) A log pi(y)`, the clipped r held constant, so that no token loses its gradient.

    CISPO (MiniMax-M1, Chen et al. 2025, arXiv:2506.13585, eq. 4), above at 1 + eps_high; below only where `clip_eps` says.
    """
    weights = bounded_exp(drift.log_ratios.detach()).clamp(*options.bounds)
    return -weights * drift.advantages * drift.logprobs


def sapo_loss(drift: _Drift, options: "PolicyLoss") -> Tensor:
    """`-4 / tau sigmoid(tau (r - 1)) A`: a soft gate in the place of clipping (SAPO, Gao et al. 2025, arXiv:2511.20347)."""
    positive, negative = drift.advantages.new_tensor(options.tau)
    tau = torch.where(drift.advantages > 0, positive, negative)
    gate = torch.sigmoid(tau * (bounded_exp(drift.log_ratios) - 1)) * 4 / tau
    return -gate * drift.advantages


# The weight of VESPO is computed where 1e-8 <= W <= e^20.
VESPO_LOG_LIMITS = (-18.420680743952367, 20.0)


def vespo_loss(drift: _Drift, options: "PolicyLoss") -> Tensor:
    """`-W^k exp(lambda (1 - W)) A log pi(y)`, W the probability ratio of the whole sequence, the factor held constant.

    VESPO (arXiv:2602.10693): as TRL, other k and lambda for A < 0.
    """
    log_weights = drift.log_ratios.detach().clamp(*VESPO_LOG_LIMITS)
    k_positive, lambda_positive, k_negative, lambda_negative = drift.advantages.new_tensor(options.vespo)
    is_good = drift.advantages >= 0
    k = torch.where(is_good, k_positive, k_negative)
    decay = torch.where(is_good, lambda_positive, lambda_negative)
    factor = (decay + k * log_weights - decay * log_weights.exp()).exp()
    return -factor * drift.advantages * drift.logprobs


class LossType(NamedTuple):
    """A loss type: its formula and the settings that its authors give.

    Attributes:
        formula: `(drift, options) -> ` losses, all of one shape.
        mean_over: what the loss is a mean of: "rows" (each the mean of its tokens), "row_sums" (each their sum),
            "tokens", or "constant" (each row its sum over the longest possible length).
        level: over what the ratio is taken: "token", "seq" (the geometric mean of its tokens', Zheng et al. 2025) or
            "product" (of its tokens').
        clip_eps: how far below 1 the ratio may be.
        clip_eps_high: how far above.
    """

    formula: Callable[[_Drift, "PolicyLoss"], Tensor]
    mean_over: Literal["rows", "row_sums", "tokens", "constant"]
    level: Literal["token", "seq", "product"] = "token"
    clip_eps: float = 0.2
    clip_eps_high: float = 0.2


# Means are over the whole optimizer step. So `bnpo`, elsewhere a mean over the tokens of a micro-batch, which changes with
# the micro-batches, is `dapo` with PPO's clipping here; with advantages per token it is PPO's loss.
POLICY_LOSSES: dict[str, LossType] = {
    "grpo": LossType(clipped_loss, "rows"),  # DeepSeekMath (Shao et al. 2024, arXiv:2402.03300)
    "bnpo": LossType(clipped_loss, "tokens"),
    "dr_grpo": LossType(clipped_loss, "constant"),  # Liu et al. 2025, arXiv:2503.20783
    "dapo": LossType(clipped_loss, "tokens", clip_eps_high=0.28),  # Yu et al. 2025, arXiv:2503.14476
    "cispo": LossType(cispo_loss, "tokens", clip_eps=float("inf"), clip_eps_high=0.28),
    "gspo": LossType(clipped_loss, "rows", "seq", 3e-4, 4e-4),  # Zheng et al. 2025, arXiv:2507.18071, section 5.1
    "luspo": LossType(clipped_loss, "row_sums", "seq", 2e-3, 2.5e-3),  # arXiv:2602.05261: longer rows weigh more
    "sapo": LossType(sapo_loss, "rows"),
    "vespo": LossType(vespo_loss, "tokens", "product"),
}


def unread_settings(loss_type: str) -> tuple[str, ...]:
    """Settings of `PolicyLoss` that a loss type does not look at."""
    formula = POLICY_LOSSES[loss_type].formula
    if formula is clipped_loss:
        return ()
    if formula is cispo_loss:
        return ("delta",)
    return ("clip_eps", "clip_eps_high", "delta")


@dataclass(frozen=True)
class PolicyLoss:
    """A policy loss with its settings; None: what `POLICY_LOSSES` says.

    Attributes:
        loss_type: one of `POLICY_LOSSES`.
        clip_eps: a ratio counts from `1 - clip_eps`. For `cispo` None means no lower bound.
        clip_eps_high: a ratio counts to `1 + clip_eps_high`; None: `clip_eps` where that is given, else the type's.
        delta: upper bound of the ratio of tokens with a negative advantage, above `1 + clip_eps_high`; None: no bound.
        importance: whether ratios are per "token" or per "seq"; None: what the type says.
        kl_coef: weight of the KL to the reference as a term of the loss.
        kl_estimator: one of `KL_ESTIMATORS`.
        kl_bias_correction: multiply each token's KL by its ratio, which makes its gradient that of the KL also where the
            sample is older than the policy (DeepSeek-V3.2, arXiv:2512.02556). TRL does by default.
        entropy_coef: weight of the entropy, which is made larger.
        max_completion_length: of `dr_grpo`: the longest possible completion, in tokens.
        count_empty_rows: rows without a token that counts are terms of the mean, of 0, as in TRL; else they are left out.
        tau: of `sapo`: sharpness for positive and for other advantages.
        vespo: of `vespo`: k and lambda for advantages from 0 up, then for negative ones.
    """

    loss_type: str = "grpo"
    clip_eps: float | None = None
    clip_eps_high: float | None = None
    delta: float | None = None
    importance: Level | None = None
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    max_completion_length: int | None = None
    count_empty_rows: bool = False
    tau: tuple[float, float] = (1.0, 1.05)
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0)

    def __post_init__(self) -> None:
        if self.loss_type not in POLICY_LOSSES:
            raise ValueError(f"loss_type {self.loss_type!r} is no policy loss; known: {', '.join(POLICY_LOSSES)}")
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(f"kl_estimator {self.kl_estimator!r} is not known; known: {', '.join(KL_ESTIMATORS)}")
        if self.importance not in (None, "token", "seq"):
            raise ValueError(f"importance {self.importance!r} is not known; expected 'token' or 'seq'")
        for name in ("clip_eps", "clip_eps_high", "kl_coef", "entropy_coef"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}={value} must not be negative")
        if self.loss_type == "vespo" and self.importance is not None:
            raise ValueError("loss_type 'vespo' weighs whole sequences by itself; leave importance out")
        if self._type.mean_over == "constant" and not (self.max_completion_length or 0) > 0:
            raise ValueError(
                f"loss_type {self.loss_type!r} divides by the longest possible completion; found "
                f"max_completion_length={self.max_completion_length}, expected a number of tokens above 0"
            )
        if self.delta is not None and not self.delta > self.bounds[1]:
            raise ValueError(
                f"delta={self.delta} must be above 1 + clip_eps_high = {self.bounds[1]}: it bounds the ratio where "
                "clipping does not"
            )

    @property
    def _type(self) -> LossType:
        return POLICY_LOSSES[self.loss_type]

    @property
    def bounds(self) -> tuple[float, float]:
        """The ratios between which nothing is clipped."""
        low = self._type.clip_eps if self.clip_eps is None else self.clip_eps
        high = self.clip_eps_high
        if high is None:
            high = self._type.clip_eps_high if self.clip_eps is None else self.clip_eps
        return 1 - low, 1 + high

    @property
    def level(self) -> str:
        """Over what a ratio is taken: "token", "seq" or "product"."""
        return self.importance or self._type.level

    @property
    def is_per_token(self) -> bool:
        """Whether a token's loss depends on no other token's log-prob, so that the head can make its gradient at once."""
        return self.level == "token"

    def __str__(self) -> str:
        """In words, for the screen before training: `grpo, ratios of tokens from 0.8 to 1.2, 0.05 x KL (k3)`."""
        ratios = "ratios of tokens" if self.is_per_token else "ratios of sequences"
        if self._type.formula in (clipped_loss, cispo_loss):
            low, high = self.bounds
            ratios += f" from {max(low, 0):g} to {high:g}"
        said = [self.loss_type, ratios]
        if self.delta is not None:
            said.append(f"at most {self.delta:g} where the advantage is negative")
        if self.kl_coef:
            said.append(f"{self.kl_coef:g} x KL ({self.kl_estimator})")
        if self.entropy_coef:
            said.append(f"-{self.entropy_coef:g} x entropy")
        return ", ".join(said)

    # What the loss is a mean of.

    def num_terms(self, sequences: Sequences) -> Tensor:
        """The number of terms that `mean` is a mean of: what a trainer's `_loss_weight` returns. `[]`."""
        if self._type.mean_over == "tokens":
            return sequences.mask.sum()
        if self.count_empty_rows:
            return torch.tensor(sequences.num_rows, device=sequences.mask.device)
        return (sequences.counts > 0).sum()

    def token_weights(self, sequences: Sequences, dtype: torch.dtype = torch.float32) -> Tensor:
        """What each token's loss is multiplied by before all are summed and divided by `num_terms`: `[B, T]`."""
        kind = self._type.mean_over
        weights = sequences.mask.to(dtype)
        if kind == "rows":
            weights = weights / sequences.spread(sequences.counts.clamp(min=1))
        elif kind == "constant":
            assert self.max_completion_length is not None
            weights = weights / self.max_completion_length
        return weights

    def mean(self, losses: Tensor, sequences: Sequences) -> Tensor:
        """The mean of `losses [B, T]` over as many terms as `num_terms` counts; 0 over none. `[]`."""
        total = (losses * self.token_weights(sequences, losses.dtype)).sum()
        return mean_over(total, self.num_terms(sequences).to(total.dtype))

    # Losses of tokens.

    def token_losses(
        self, logprobs: Tensor, tokens: PolicyTokens, sequences: Sequences, entropy: Tensor | None = None
    ) -> Tensor:
        """Losses of tokens, KL and entropy included.

        Args:
            logprobs: `[B, T]` log-prob of each token under the policy; gradients flow into it.
            tokens: what is known of them.
            sequences: which count, and whose they are.
            entropy: `[B, T]` of the distributions that they were drawn from; needed where `entropy_coef` is not 0.

        Returns:
            `[B, T]` in float32 or better, 0 where nothing counts.
        """
        logprobs = sequences.keep(logprobs)
        known = self._kept(tokens, sequences)
        if entropy is not None:
            entropy = sequences.keep(entropy)
        losses = self._losses(logprobs, self._log_ratios(logprobs, known, sequences), known, entropy)
        return sequences.keep(losses)

    def per_token(
        self, tokens: PolicyTokens, sequences: Sequences
    ) -> tuple[Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor], dict[str, Tensor]]:
        """The loss as a function of single tokens, for a head that makes log-probs and their gradient in one pass.

        Returns:
            `(logprobs [n], entropy [n], columns) -> [n]`, losses times `token_weights`, for any n of the tokens that count;
            and the columns `[B, T]`, which it is given `[n]` of each. The sum over all tokens is `mean * num_terms`.
        """
        assert self.is_per_token, f"{self.loss_type} with importance per {self.level} couples the tokens of a row"
        known = self._kept(tokens, sequences)
        columns = {name: value for name, value in known._asdict().items() if value is not None}
        columns["weights"] = self.token_weights(sequences, known.advantages.dtype)

        def losses(logprobs: Tensor, entropy: Tensor, columns: Mapping[str, Tensor]) -> Tensor:
            of_these = PolicyTokens(**{name: columns[name] for name in columns if name != "weights"})
            old = logprobs.detach() if of_these.old_logprobs is None else of_these.old_logprobs
            return self._losses(logprobs, logprobs - old, of_these, entropy) * columns["weights"]

        return losses, columns

    def _kept(self, tokens: PolicyTokens, sequences: Sequences) -> PolicyTokens:
        """All columns `[B, T]`, in float32 or better, 0 where nothing counts."""
        kept: dict[str, Tensor] = {"advantages": sequences.keep(sequences.spread(tokens.advantages))}
        for name in ("old_logprobs", "ref_logprobs", "corrections"):
            value = getattr(tokens, name)
            if value is not None:
                kept[name] = sequences.keep(value).detach()
        return PolicyTokens(**kept)

    def _log_ratios(self, logprobs: Tensor, known: PolicyTokens, sequences: Sequences) -> Tensor:
        """`[B, T]` at the level of this loss."""
        log_ratios = logprobs - (logprobs.detach() if known.old_logprobs is None else known.old_logprobs)
        if self.level == "seq":
            log_ratios = sequences.spread(sequences.mean(log_ratios))
        elif self.level == "product":
            log_ratios = sequences.spread(sequences.sum(log_ratios))
        return log_ratios

    def _losses(self, logprobs: Tensor, log_ratios: Tensor, known: PolicyTokens, entropy: Tensor | None) -> Tensor:
        """Losses of tokens, all arguments of one shape."""
        losses = self._type.formula(_Drift(logprobs, log_ratios, known.advantages), self)
        if known.corrections is not None:
            losses = losses * known.corrections
        if self.kl_coef:
            losses = losses + self.kl_coef * self._kl(logprobs, known)
        if self.entropy_coef:
            assert entropy is not None, "an entropy bonus needs the entropies"
            losses = losses - self.entropy_coef * entropy
        return losses

    def _kl(self, logprobs: Tensor, known: PolicyTokens) -> Tensor:
        """Estimates of the KL to the reference, all of one shape."""
        assert known.ref_logprobs is not None, "a KL needs the log-probs of a reference"
        kl = KL_ESTIMATORS[self.kl_estimator](logprobs - known.ref_logprobs)
        if self.kl_bias_correction:
            old = logprobs.detach() if known.old_logprobs is None else known.old_logprobs
            kl = kl * bounded_exp(logprobs - old)
        return kl

    @torch.no_grad()
    def metrics(
        self, logprobs: Tensor, tokens: PolicyTokens, sequences: Sequences, entropy: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """What one watches, as name -> (total, count), to be summed over micro-batches and ranks. Arguments as above.

        "ratio" and the shares that were clipped, "clip_ratio/low_mean" (A < 0), "clip_ratio/high_mean" (A > 0) and
        "clip_ratio/region_mean" (either), count sequences where ratios are per sequence; "kl", to the reference, "entropy"
        and "approx_kl", of the policy as it was (k3), count tokens.
        """
        logprobs, known = sequences.keep(logprobs), self._kept(tokens, sequences)
        old = logprobs if known.old_logprobs is None else known.old_logprobs
        log_ratios, advantages, counted = logprobs - old, known.advantages, sequences.mask
        of_tokens = {"approx_kl": KL_ESTIMATORS["k3"](old - logprobs)}  # the policy as it was wrote the tokens
        if known.ref_logprobs is not None:
            of_tokens["kl"] = self._kl(logprobs, known)
        if entropy is not None:
            of_tokens["entropy"] = entropy
        num_tokens = counted.sum()
        found = {name: (sequences.keep(values).sum(), num_tokens) for name, values in of_tokens.items()}
        if self.level == "seq":
            log_ratios, advantages = sequences.mean(log_ratios), sequences.mean(advantages)
            counted = sequences.counts > 0
        ratios, count = bounded_exp(log_ratios), counted.sum()
        of_ratios = {"ratio": ratios}
        if self._type.formula is clipped_loss:
            low = (ratios < self.bounds[0]) & (advantages < 0)
            high = (ratios > self.bounds[1]) & (advantages > 0)
            of_ratios |= {
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low | high,
            }
        elif self._type.formula is cispo_loss:
            low, high = ratios < self.bounds[0], ratios > self.bounds[1]
            of_ratios |= {
                "clip_ratio/low_mean": low,
                "clip_ratio/high_mean": high,
                "clip_ratio/region_mean": low | high,
            }
        return found | {name: ((values * counted).sum(), count) for name, values in of_ratios.items()}

    def replace(self, **changes: object) -> "PolicyLoss":
        """The same loss with some settings changed."""
        return replace(self, **changes)  # type: ignore[arg-type]
