"""The service that decodes in the process that asks."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.readers import all_logits, device_of, unwrapped
from llm_trainer.generation.sampler import evaluating, make_batch
from llm_trainer.generation.service import Completion, Interrupted, Request
from llm_trainer.generation.verify import hashes_of


class InProcess:
    """Decodes with `model` as it is, in the precision around the call.

    Args:
        model: A transformers causal LM, or any module whose `forward(ids [B, T])` gives causal logits `[B, T, V]`.
        max_rows: How many completions are decoded together.
    """

    def __init__(self, model: nn.Module, max_rows: int = 64) -> None:
        self.model, self.max_rows = model, max_rows
        self.version = -1

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """The weights are those of the model; only their version moves."""
        for _ in weights:
            pass
        self.version = version

    def held(self) -> dict[str, int]:
        """As `GenerationService.held` says."""
        return hashes_of(unwrapped(self.model))

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, stop: Callable[[], bool]
    ) -> list[list[Completion]]:
        """As `GenerationService.generate` says."""
        num_rows = min(self.max_rows, sum(request.samples for request in requests))
        with evaluating(self.model):
            batch = make_batch(self.model, requests, decoding, num_rows, self.version, keeps_cuts=True)
            while batch.is_busy:
                batch.step()
                if stop():
                    raise Interrupted
        return batch.completions()

    @torch.no_grad()
    def logprobs(self, ids: Sequence[Sequence[int]], decoding: Decoding) -> list[list[float]]:
        """As `GenerationService.logprobs` says."""
        model = unwrapped(self.model)
        found = []
        with evaluating(model):
            for row in ids:
                tokens = torch.tensor([list(row)], device=device_of(model))
                logits = all_logits(model, tokens)[0, :-1]
                seen = _seen(tokens[0], logits.shape[1]) if decoding.repetition_penalty != 1 else None
                found.append(decoding.logprobs(logits, tokens[0, 1:], seen).tolist())
        return found


def _seen(ids: Tensor, vocabulary: int) -> Tensor:
    """Whether each token of the vocabulary stands before or at each position but the last. `[T - 1, V]`"""
    first = torch.zeros(len(ids) - 1, vocabulary, dtype=torch.bool, device=ids.device)
    for place, token in enumerate(ids[:-1].tolist()):
        first[place:, token] = True
    return first
