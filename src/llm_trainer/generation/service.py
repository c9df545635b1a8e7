"""What makes completions: tokens in, tokens out. Text is never read and never tokenised here.

A trainer learns from what a service wrote, so a service says of every token which weights drew it and how probable it
was under the distribution that it was drawn from.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from llm_trainer.generation.decoding import Decoding
from llm_trainer.image_batch import ImageBatch


class Request(NamedTuple):
    """A prompt, and how many completions of it are wanted.

    Attributes:
        ids: Of the prompt; at least one.
        number: Names the noise, which is that of (seed, number, sample, token), whatever else is asked for.
        samples: How many completions.
        sample: Number of the first of them, in the noise.
        first: Number of their first token, in the noise: what goes on after something was said in between has other noise
            than what was drawn before it.
        most: New tokens of each; None: as many as the decoding says.
        images: Those that the prompt shows, where its ids have their placeholders; None: it shows none.
    """

    ids: Sequence[int]
    number: int
    samples: int = 1
    sample: int = 0
    first: int = 0
    most: int | None = None
    images: ImageBatch | None = None


@dataclass(frozen=True)
class Completion:
    """What was written after a prompt.

    Attributes:
        ids: Without the prompt; with the stop token that ended it, if one did.
        logprobs: Of each id under the distribution that it was drawn from: of `softmax(logits / temperature)` after
            suppression and repetition penalty, and where the distribution is cut (top-k, top-p, min-p) normalised over
            what is left. At temperature 0 that of temperature 1, not cut.
        finish: `"stop"`: a stop token or a stop string; `"length"`: as long as it may be, or as the context is;
            `"aborted"` and `"error"`: it was not finished.
        versions: Spans (first token, version of the weights), the first at 0.
        kept: For each token the ids that the distribution was cut to; None where it was not cut.
        trained: For each token whether the policy wrote it, where others have spoken in between; None: all of them.
        routes: `[T, R]` of each token of prompt and completion, the experts of all layers that it was sent to; -1 for the last,
            which was not read. None: nobody has asked, or there are none.
    """

    ids: list[int]
    logprobs: list[float]
    finish: str
    versions: list[tuple[int, int]]
    kept: list[list[int]] | None = None
    trained: list[bool] | None = None
    routes: np.ndarray | None = None


class Interrupted(Exception):
    """Generation was asked to stop before it was done."""


class GenerationService(Protocol):
    """Makes completions with weights that it was given.

    Attributes:
        version: That of the weights that are loaded whole; -1: none are.
        dtype: That floating-point weights are kept in; None: as they come.
        updates_in_flight: Whether `load` may be called while another thread is in `generate`: what is under way goes on with
            the new weights, and `Completion.versions` says from which token on. Missing: it may not.
    """

    version: int
    updates_in_flight: bool

    @property
    def dtype(self) -> torch.dtype | None: ...

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Take over all weights, each whole and under its name in the trained model; `version` moves at the end."""

    def held(self) -> dict[str, int]:
        """The hash (`verify.Hashes`) of every tensor that it decodes with, as it lies there, by its names."""

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, stop: Callable[[], bool]
    ) -> list[list[Completion]]:
        """The completions of each request, in the order of the requests.

        Args:
            stop: Asked after every token.

        Raises:
            Interrupted: `stop` said so.
            ValueError: A request cannot be answered, or the logits are not finite.
        """

    def logprobs(self, ids: Sequence[Sequence[int]], decoding: Decoding) -> list[list[float]]:
        """Of every token but the first, given those before it, under the distribution that `decoding` would draw from.

        -inf where that could not have drawn the token.
        """
