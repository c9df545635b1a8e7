"""Log-probabilities under the distribution that a token was really drawn from, where that was not over all ids.

Top-k, top-p and min-p leave some ids over and suppressed ids are never drawn. A ratio of probabilities of which only one
is restricted is biased, so the trainer takes its softmax over the same ids as the sampler did.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The logit of an id that could not be drawn: exp of it is 0, and 0 times it is 0 even where a gradient multiplies it.
EXCLUDED = -1e30


class DrawnFrom(NamedTuple):
    """The ids that each of N tokens was drawn from, where these were not all: the softmax is taken over them alone.

    Attributes:
        kept: `[M]` int64, ids of all tokens end to end (top-k, top-p and min-p leave them over).
        counts: `[N]` int64, how many of them are each token's; 0: all ids. For `ScoredModel` in the layout of its labels.
        suppressed: `[S]` int64, ids that no token was drawn from, or None.
    """

    kept: Tensor
    counts: Tensor
    suppressed: Tensor | None = None

    def excluded(self, rows: slice, num_ids: int) -> Tensor:
        """`[n, V]` bool, which ids the tokens of `rows` could not be. The host waits for the device."""
        counts = self.counts[rows]
        before, own = int(self.counts[: rows.start].sum()), int(counts.sum())
        token = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=own)
        excluded = (counts > 0)[:, None].repeat(1, num_ids)
        excluded[token, self.kept[before : before + own]] = False
        if self.suppressed is not None:
            excluded[:, self.suppressed] = True
        return excluded

    def of(self, chosen: Tensor) -> "DrawnFrom":
        """What belongs to the tokens that are `chosen`, bool of the shape of `counts`."""
        kept = self.kept[chosen.flatten().repeat_interleave(self.counts.flatten())]
        return DrawnFrom(kept, self.counts[chosen], self.suppressed)


def excluding(logits: Tensor, excluded: Tensor) -> Tensor:
    """`logits [n, V]` with no probability where `excluded [n, V]`."""
    return logits.masked_fill(excluded, max(EXCLUDED, torch.finfo(logits.dtype).min / 2))
