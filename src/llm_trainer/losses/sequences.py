"""Which tokens of a batch a loss counts and whose row each of them is, padded or laid flat.

Letters: `B` rows and `T` positions of a padded batch; a flat batch is `[1, N]` and holds `R` rows end to end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llm_trainer.losses.language import IGNORE, mean_over


@dataclass(frozen=True)
class Sequences:
    """The tokens that count, and the `R` sequences that they belong to; what stands elsewhere is never read.

    Attributes:
        mask: `[B, T]` or `[1, N]` bool, the tokens that count.
        lengths: `[R]` int64 on the host, tokens of each document of a flat batch; None: every line is a row.
        order: `[R]` int64, the document of each row, where documents lie in another order than the rows.
    """

    mask: Tensor
    lengths: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of_batch(cls, batch: Mapping[str, Tensor]) -> "Sequences":
        """Those of a micro-batch: `labels` other than -100 that something predicts, in whatever layout it is."""
        labels = batch["labels"]
        positions = torch.arange(labels.shape[1], device=labels.device)
        counts = (labels != IGNORE) & (positions > 0)
        return cls(counts, batch.get("document_lengths"), batch.get("document_order"))

    @cached_property
    def num_rows(self) -> int:
        """R."""
        return len(self.mask) if self.lengths is None else len(self.lengths)

    @cached_property
    def counts(self) -> Tensor:
        """`[R]` int64, tokens of each row that count."""
        return self.by_row(self.mask).sum(1)

    def keep(self, values: Tensor) -> Tensor:
        """`values [B, T]` in float32 or better with 0 where nothing counts, whatever stood there (NaN too)."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        return torch.where(self.mask, values, 0.0)

    def by_row(self, values: Tensor) -> Tensor:
        """`values [B, T]` or `[1, N]` -> `[R, longest]`, one line per row, 0 behind its end."""
        if self.lengths is None:
            return values
        documents = pad_sequence(values[0].split(self.lengths.tolist()), batch_first=True)
        return documents if self.order is None else documents[self.order.to(documents.device)]

    def sum(self, values: Tensor) -> Tensor:
        """`values [B, T]` -> `[R]`, summed over the tokens that count."""
        return self.by_row(self.keep(values)).sum(1)

    def mean(self, values: Tensor) -> Tensor:
        """`values [B, T]` -> `[R]`, the mean over the tokens that count; 0 for a row without any."""
        total = self.sum(values)
        return mean_over(total, self.counts.to(total.dtype))

    def spread(self, values: Tensor) -> Tensor:
        """`values [R]` -> `[B, T]`, each row's at all of its tokens; what is `[B, T]` already stays as it is."""
        if values.dim() == 2:
            return values
        if self.lengths is None:
            return values[:, None].expand(self.mask.shape)
        if self.order is not None:
            values = torch.zeros_like(values).index_copy(0, self.order.to(values.device), values)
        lengths = self.lengths.to(values.device)
        return values.repeat_interleave(lengths, output_size=self.mask.shape[1])[None]

    def compact(self, values: Tensor) -> Tensor:
        """`values [B, T]` -> `[R, most]`, the tokens of each row that count moved to its front, 0 behind them."""
        found = self.by_row(self.keep(values)).gather(1, self._front)
        return torch.where(self._is_front, found, 0.0)

    def expand(self, compact: Tensor) -> Tensor:
        """The inverse of `compact`: `[R, most]` -> `[B, T]`, 0 where nothing counts."""
        full = compact.new_zeros(self.mask.shape)
        # Tokens of all rows in the order of the batch, which is that of the documents.
        present = self._is_front
        if self.order is not None:
            documents = self.order.to(compact.device).argsort()
            compact, present = compact[documents], present[documents]
        return full.masked_scatter(self.mask, compact[present])

    @cached_property
    def _front(self) -> Tensor:
        """`[R, most]` places of the counted tokens in their rows, then of others. The host waits for the device."""
        order = (~self.by_row(self.mask)).byte().argsort(dim=1, stable=True)
        most = int(self.counts.max()) if self.num_rows else 0
        return order[:, :most]

    @cached_property
    def _is_front(self) -> Tensor:
        """`[R, most]` bool, which of `_front` are counted."""
        places = torch.arange(self._front.shape[1], device=self._front.device)
        return places < self.counts[:, None]
