"""The service that decodes in the process that asks, with a copy of the weights or with the trained ones in place."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from llm_trainer.engine.out_of_memory import OutOfMemoryError, is_out_of_memory, let_go, release
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.readers import all_logits, device_of
from llm_trainer.generation.sampler import make_batch, sampling
from llm_trainer.generation.service import Completion, Interrupted, Request
from llm_trainer.generation.verify import Hashes, hashes_of
from llm_trainer.generation.weights import WeightsCopy
from llm_trainer.models.experts import Routes, dtype_when_sent, recorded_routers
from llm_trainer.models.inside import adapted_model, unwrapped

NOT_LOADED = -1


class InProcess:
    """Decodes in this process.

    Args:
        model: A transformers causal LM, or any module whose `forward(ids [B, T])` gives causal logits `[B, T, V]`.
        dtype: Of a copy of the weights, which `load` fills: autocast would cast float32 weights again for every token.
            None: no copy, where memory is short. The trained weights are used in place, in the precision around the
            call, and `load` only takes their version.
        max_rows: How many completions are decoded together at most.
        max_cache_bytes: Of keys and values; there are fewer rows where longer ones would need more.
        around: The context in which trained weights compute in place; None: that of the call.
        sees_routes: Whether completions say which experts their tokens were sent to; of a copy that is read from slots.
        alone: Whether no other process takes part in its forwards, so that what does not fit may be drawn again.

    Attributes:
        version: See `GenerationService`.
        model: What decodes: the copy, or the model itself, without what is only around it.
        updates_in_flight: See `GenerationService`.
    """

    updates_in_flight = False

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        max_rows: int = 64,
        max_cache_bytes: int = 4 * 2**30,
        around: Callable[[], AbstractContextManager[object]] | None = None,
        sees_routes: bool = False,
        alone: bool = True,
    ) -> None:
        if max_rows < 1 or max_cache_bytes < 1:
            raise ValueError(f"max_rows={max_rows}, max_cache_bytes={max_cache_bytes}: expected at least 1 of both")
        self._trained = unwrapped(model)  # by whose names weights arrive
        self.copy = None if dtype is None else WeightsCopy(self._trained, dtype, device_of(model))
        decoding = self._trained if self.copy is None else self.copy.model
        self.model = adapted_model(decoding)
        self.max_rows, self.max_cache_bytes, self._alone = max_rows, max_cache_bytes, alone
        self._around = around or nullcontext
        self._routes = None
        if sees_routes:
            assert self.copy is not None  # hooks on the modules that learn would see their forwards too
            self._routes = Routes(list(recorded_routers(self.model).values()))
        self.version = NOT_LOADED

    @property
    def in_place(self) -> bool:
        """Whether the trained weights decode themselves."""
        return self.copy is None

    @property
    def dtype(self) -> torch.dtype | None:
        """As `GenerationService.dtype` says."""
        return None if self.copy is None else self.copy.dtype

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `GenerationService.load` says.

        Raises:
            ValueError: A tensor is unknown, missing, or of another shape; no weights count as loaded then.
        """
        self.version = NOT_LOADED
        with torch.no_grad():
            if self.copy is None:
                for _ in weights:  # all ranks take part in what makes them
                    pass
            else:
                self.copy.load(weights)
        self.version = version

    def held(self) -> dict[str, int]:
        """As `GenerationService.held` says."""
        if self.copy is None:
            return hashes_of(self._trained)
        hashes = Hashes()
        for name, tensor in self.copy.held():
            wanted = dtype_when_sent(name, tensor, self.copy.dtype)
            hashes.note(name, tensor.to(wanted))  # as it was sent: a model may keep a few tensors in another dtype
        return hashes.read()

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, stop: Callable[[], bool]
    ) -> list[list[Completion]]:
        """As `GenerationService.generate` says. Where memory runs out, fewer rows are decoded together, which none notices.

        Raises:
            OutOfMemoryError: A single row does not fit.
        """
        self._check_loaded()
        while True:
            try:
                return self._written(requests, decoding, stop)
            except Exception as error:
                if not (self._alone and is_out_of_memory(error)):
                    raise
                said = let_go(error)
            release(device_of(self.model))
            self._take_fewer(sum(request.samples for request in requests), said)

    def _take_fewer(self, num_samples: int, said: str) -> None:
        """
        Args:
            num_samples: So many completions were asked for.
            said: Why they did not fit.

        Raises:
            OutOfMemoryError: There was one row.
        """
        rows = min(self.max_rows, num_samples)
        if rows == 1:
            raise OutOfMemoryError(
                f"drawing a completion ran out of memory ({said}), with a single row. What helps: fewer new tokens "
                "(gen_max_seq_len, or eval_config.max_seq_len of answers to eval_prompts), shorter prompts, or rollout servers"
            )
        self.max_rows = rows // 2
        warnings.warn(
            f"drawing completions ran out of memory ({said}). They are drawn again, and from now on at most {self.max_rows:,} "
            "at a time",
            stacklevel=3,
        )

    def _written(
        self, requests: Sequence[Request], decoding: Decoding, stop: Callable[[], bool]
    ) -> list[list[Completion]]:
        limits = {"max_rows": self.max_rows, "max_cache_bytes": self.max_cache_bytes}
        with sampling(self.model), self._precision():
            batch = make_batch(
                self.model, requests, decoding, self.version, keeps_cuts=True, routes=self._routes, **limits
            )
            while batch.is_busy:
                batch.step()
                if stop():
                    raise Interrupted
        return batch.completions()

    @torch.no_grad()
    def logprobs(self, ids: Sequence[Sequence[int]], decoding: Decoding) -> list[list[float]]:
        """As `GenerationService.logprobs` says."""
        self._check_loaded()
        found = []
        with sampling(self.model), self._precision():
            for row in ids:
                tokens = torch.tensor([list(row)], device=device_of(self.model))
                logits = all_logits(self.model, tokens)[0, :-1]
                seen = _seen(tokens[0], logits.shape[1]) if decoding.repetition_penalty != 1 else None
                found.append(decoding.logprobs(logits, tokens[0, 1:], seen).tolist())
        return found

    def _check_loaded(self) -> None:
        if self.copy is not None and self.version == NOT_LOADED:
            raise ValueError(
                "the sampler's copy holds no weights, or those of a load that failed: call load(weights, version) first"
            )

    def _precision(self) -> AbstractContextManager[object]:
        """A copy computes in its own dtype; the trained weights in the precision that they are trained in."""
        if self.copy is None:
            return self._around()
        return torch.autocast(device_of(self.model).type, enabled=False)


def _seen(ids: Tensor, vocabulary: int) -> Tensor:
    """Whether each token of the vocabulary stands before or at each position but the last. `[T - 1, V]`"""
    seen = torch.zeros(len(ids) - 1, vocabulary, dtype=torch.bool, device=ids.device)
    for place, token in enumerate(ids[:-1].tolist()):
        seen[place:, token] = True
    return seen
