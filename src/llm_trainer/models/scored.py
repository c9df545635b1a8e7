"""The model's forward ends in per-token scores: every algorithm is then arithmetic on `[B, T]`."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.losses.chunked import HeadScores, chunked_logprobs, chunked_loss
from llm_trainer.losses.language import IGNORE, LanguageLoss, load_balancing_loss, token_losses


@dataclass
class TokenScores:
    """What a model says about the labels of a batch.

    Attributes:
        loss_sum: scalar, sum of the supervised tokens' losses; differentiable unless log-probabilities are.
        num_tokens: scalar, supervised tokens.
        logprobs: `[B, T]`, position t holds log p(labels[t]); 0 where nothing is supervised.
        correct: `[B, T]` bool, the label is the likeliest token.
        entropy: `[B, T]` in nats, or None when not asked for.
        aux_loss: scalar load-balancing loss of a mixture of experts, else None.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    logprobs: Tensor
    correct: Tensor
    entropy: Tensor | None
    aux_loss: Tensor | None


class ScoredModel(nn.Module):
    """See `scored`."""

    def __init__(self, base: nn.Module, loss: LanguageLoss) -> None:
        super().__init__()
        self.base = base
        self.loss = loss
        accepted = inspect.signature(base.forward).parameters
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
        names = ("attention_mask", "position_ids")
        self._accepts = {name for name in names if everything or name in accepted}

    def compile_backbone(self) -> None:
        """Compile everything but the head."""
        self.base.compile()

    def _logits(self, input_ids: Tensor, **inputs: Any) -> tuple[Tensor, Any]:
        output = self.base(input_ids, **{name: value for name, value in inputs.items() if name in self._accepts})
        if isinstance(output, Tensor):
            return output, None
        if isinstance(output, dict):
            return output["logits"], output
        return output.logits, output

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        differentiable_logprobs: bool = False,
    ) -> TokenScores:
        """Scores of `labels [B, T]` (un-shifted, by default `input_ids`) under the model."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        logits, _ = self._logits(input_ids, **{name: value for name, value in given.items() if value is not None})
        labels = input_ids if labels is None else labels
        supervised = labels[:, 1:] != IGNORE
        nll = token_losses(logits, labels)
        losses = token_losses(logits, labels, self.loss)
        correct = torch.zeros_like(labels, dtype=torch.bool)
        correct[:, 1:] = supervised & (logits[:, :-1].argmax(-1) == labels[:, 1:])
        logprobs = -nll if differentiable_logprobs else -nll.detach()
        return TokenScores(losses.sum(), supervised.sum(), logprobs, correct, None, None)


def scored(model: nn.Module, loss: LanguageLoss | None = None) -> ScoredModel:
    """`model` with a forward that ends in scores."""
    return ScoredModel(model, loss or LanguageLoss())
