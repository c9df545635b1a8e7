"""What losses on comparisons know about pairs: one log-probability per answer, from one per token.

Letters: `B` pairs, `T` positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# A branch costs attention further kernels, which as much time as this part of a pair's tokens pays for. Measured:
# benchmarks/preference_throughput.py.
MIN_SHARED = 0.02


@dataclass(frozen=True)
class Pairs:
    """What the losses know about `B` pairs; all `[B]`. Made by `pairs_from_tokens`, or directly from stored sums.

    Attributes:
        chosen_logps: log-prob of the chosen completion under the policy, summed over its tokens; rejected likewise.
        chosen_lengths: number of tokens of the chosen completion; rejected likewise.
        ref_chosen_logps: the sums under the reference model; rejected likewise. None: no reference model.
        surplus: for `ld_dpo`, log-ratios of (chosen, rejected) over the tokens by which one is longer than the other.
        reward_baseline: `[]`, for `bco_pair`, the running mean of the rewards of earlier steps; 0 if not given.
        nll_logps: what the NLL term is the mean of, when it is not the chosen completion alone, such as prompt and
            completion; with `nll_lengths`, its number of tokens.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    surplus: tuple[Tensor, Tensor] | None = None
    reward_baseline: Tensor | None = None
    nll_logps: Tensor | None = None
    nll_lengths: Tensor | None = None

    def log_ratios(self, average: bool = False) -> tuple[Tensor, Tensor]:
        """`(lc, lr)`, both `[B]`: policy minus reference log-prob of chosen and rejected, per token if `average`."""
        assert self.ref_chosen_logps is not None and self.ref_rejected_logps is not None
        ratios = self.chosen_logps - self.ref_chosen_logps, self.rejected_logps - self.ref_rejected_logps
        return self._per_token(*ratios) if average else ratios

    def average_logps(self) -> tuple[Tensor, Tensor]:
        """Per-token mean log-prob of chosen and rejected under the policy, both `[B]`; 0 for an empty completion."""
        return self._per_token(self.chosen_logps, self.rejected_logps)

    def _per_token(self, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
        return chosen / self.chosen_lengths.clamp(min=1), rejected / self.rejected_lengths.clamp(min=1)


def sequence_logps(logps: Tensor, mask: Tensor) -> Tensor:
    """Sum the log-probs `[B, T]` of a completion's tokens, where mask `[B, T]` is nonzero, in float32 or better: `[B]`.

    Whatever stands outside the mask (NaN too) is ignored.
    """
    logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
    return torch.where(mask.bool(), logps, 0.0).sum(-1)


def pairs_from_tokens(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
) -> Pairs:
    """Reduce per-token log-probs to one number per completion.

    Args:
        chosen_logps: `[B, T]` per-token log-probs of the chosen completions; `rejected_logps`: `[B, T']` likewise.
        chosen_mask: `[B, T]` nonzero on completion tokens; `rejected_mask`: `[B, T']` likewise.
        ref_chosen_logps: `[B, T]` under the reference model; `ref_rejected_logps`: `[B, T']`. Or None.
    """
    lengths = chosen_mask.bool().sum(-1), rejected_mask.bool().sum(-1)
    sums = sequence_logps(chosen_logps, chosen_mask), sequence_logps(rejected_logps, rejected_mask)
    if ref_chosen_logps is None or ref_rejected_logps is None:
        return Pairs(*sums, *lengths)
    shared = torch.minimum(*lengths).unsqueeze(-1)  # [B, 1]

    def surplus(logps: Tensor, ref_logps: Tensor, mask: Tensor) -> Tensor:
        beyond = mask.bool() & (mask.bool().cumsum(-1) > shared)
        return sequence_logps(logps - ref_logps, beyond)

    return Pairs(
        *sums,
        *lengths,
        sequence_logps(ref_chosen_logps, chosen_mask),
        sequence_logps(ref_rejected_logps, rejected_mask),
        surplus=(
            surplus(chosen_logps, ref_chosen_logps, chosen_mask),
            surplus(rejected_logps, ref_rejected_logps, rejected_mask),
        ),
    )


def num_shared(
    chosen: Tensor, chosen_lengths: Tensor, rejected: Tensor, rejected_lengths: Tensor, is_label: Tensor
) -> Tensor:
    """Tokens that begin both sides of each pair and are worth running once.

    Args:
        chosen: `[N]` ids of prompt and answer of all pairs, end to end; `chosen_lengths [B]` says where each ends.
        rejected: `[N']` likewise, `rejected_lengths [B]`.
        is_label: `[N']` bool, what of `rejected` is predicted; the token before the first of them is not shared.

    Returns:
        `[B]` int64, 0 where sharing does not pay.
    """
    chosen_starts = chosen_lengths.cumsum(0) - chosen_lengths
    rejected_starts = rejected_lengths.cumsum(0) - rejected_lengths
    # 1. up to the token before the first label, but for a label on a first token, which nothing predicts; without a label
    #    all but the last token, so that something is left
    first_label = _first_true(is_label.index_fill(0, rejected_starts, False), rejected_lengths)
    before_label = (first_label - 1).clamp(min=0)
    # 2. of these tokens, as many as are equal
    limit = torch.minimum(chosen_lengths, before_label)
    pair = torch.repeat_interleave(limit)
    position = torch.arange(len(pair), device=pair.device) - (limit.cumsum(0) - limit)[pair]
    differ = chosen[chosen_starts[pair] + position] != rejected[rejected_starts[pair] + position]
    shared = _first_true(differ, limit)
    return shared.where(shared >= MIN_SHARED * (chosen_lengths + rejected_lengths), 0)


def _first_true(values: Tensor, lengths: Tensor) -> Tensor:
    """`[B]` where the first True of each piece is, of pieces of `lengths [B]` end to end in `values [N]`; else its length."""
    ends = lengths.cumsum(0)
    found = torch.cat([values.nonzero().flatten(), ends[-1:]])  # one more, behind the last piece
    first = found[torch.searchsorted(found, ends - lengths)]
    return torch.minimum(first, ends) - (ends - lengths)
