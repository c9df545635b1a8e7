"""An algorithm as small as one can be, for tests of what runs it."""

import torch

from llm_trainer import BaseTrainer


class Regression(BaseTrainer):
    """Inputs and targets, each `[n]`, as one tensor `[2, n]`; the loss is a mean over n, and 0 / 0 where n is 0."""

    def _loss_weight(self, batch: torch.Tensor) -> float:
        return float(batch.shape[1])

    def _count_tokens(self, batch: torch.Tensor) -> int:
        return batch.shape[1]

    def _prepare_batch(self, batch: torch.Tensor) -> torch.Tensor:
        return batch

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch[0][:, None])[:, 0]

    def _compute_loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return (outputs - batch[1]).pow(2).mean()
