"""Batched decoding: prompts in, completions out, with a model as it is.

A row's completion depends on its prompt, the seed and the row's number, never on what it is batched with.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_trainer.generation.batch import Batch
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.readers import Reader, cache_bytes, device_of, make_reader
from llm_trainer.generation.seeing import SeeingReader
from llm_trainer.generation.service import Request
from llm_trainer.generation.slots import SlotReader
from llm_trainer.image_batch import ImageBatch
from llm_trainer.models.experts import Routes
from llm_trainer.models.inside import adapted_model, evaluating, model_context

# Samples per prompt from which on attention reads prompts by themselves: that costs a second call for every layer.
SHARED_FROM = 2


@dataclass(frozen=True)
class Completions:
    """What the model wrote after each prompt.

    Attributes:
        ids: New tokens per row, with the stop token that ended it, if one did; neither prompt nor padding.
        logprobs: Of each of them under the distribution that it was drawn from: see `service.Completion`.
        finished: Whether a stop token or a stop string ended the row; otherwise it was truncated.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]


def generate(model: nn.Module, prompts: Sequence[Sequence[int]], **settings: Any) -> Completions:
    """Write a completion of each prompt, all prompts in one batch.

    Precision is the caller's (autocast around the call). The model is in evaluation mode meanwhile.

    Args:
        model: A transformers causal LM, or any module whose `forward(ids [B, T])` gives causal logits `[B, T, V]`: a
            tensor, an object with `.logits`, or a mapping with `"logits"`.
        prompts: Token ids per row, without padding.
        **settings: Those of `Decoding`; `max_new_tokens` is required.

    Raises:
        ValueError: A prompt is empty or fills the context, a setting is out of range, or the logits are not finite.
    """
    decoding = Decoding(**settings)
    numbers = range(len(prompts)) if decoding.row_numbers is None else decoding.row_numbers
    if len(numbers) != len(prompts):
        raise ValueError(f"row_numbers has {len(numbers)} entries for {len(prompts)} prompts; expected one per prompt")
    requests = [Request(ids, number) for ids, number in zip(prompts, numbers, strict=True)]
    with sampling(model):
        batch = make_batch(model, requests, decoding)
        while batch.is_busy:
            batch.step()
    written = [completions[0] for completions in batch.done]
    ids = [completion.ids for completion in written]
    logprobs = [completion.logprobs for completion in written]
    return Completions(ids, logprobs, [completion.finish == "stop" for completion in written])


def stream(
    model: nn.Module, prompt_ids: Sequence[int], images: ImageBatch | None = None, **settings: Any
) -> Iterator[int]:
    """Yield the completion of one prompt token by token: the ids that `generate` returns for the same settings.

    The model is in evaluation mode until the iterator ends or is closed.

    Args:
        prompt_ids: Token ids.
        images: Those that the prompt shows.
        **settings: Those of `Decoding`; `max_new_tokens` is required.
    """
    decoding = Decoding(**settings)
    number = 0 if decoding.row_numbers is None else decoding.row_numbers[0]
    with sampling(model):
        batch = make_batch(model, [Request(prompt_ids, number, images=images)], decoding)
        while batch.is_busy:
            yield int(batch.step())


def make_batch(
    model: nn.Module,
    requests: Sequence[Request],
    decoding: Decoding,
    version: int = 0,
    keeps_cuts: bool = False,
    max_rows: int | None = None,
    max_cache_bytes: int | None = None,
    routes: Routes | None = None,
) -> Batch:
    """The completions of `requests`, yet to be written, at most `max_rows` at a time (None: all).

    Args:
        routes: sees whom the model's routers choose, which completions then say; a `SlotReader` reads it.

    Raises:
        ValueError: A prompt is empty or fills the context, or has images and the model makes nothing of them.
    """
    # 1. how far each row may go
    model = adapted_model(model)
    prompts = [request.ids for request in requests]
    budgets = decoding.budgets(prompts, decoding.context_length or model_context(model))
    for place, request in enumerate(requests):
        if request.most is not None:
            budgets[place] = min(budgets[place], request.most)
    longest_prompt, longest_budget = max(map(len, prompts), default=0), max(budgets, default=0)

    # 2. how many fit
    num_samples = sum(request.samples for request in requests)
    num_rows = min(num_samples, max_rows or num_samples)
    if max_cache_bytes is not None and requests:
        bytes_of_row = (longest_prompt + longest_budget) * cache_bytes(model)
        num_rows = min(num_rows, max(1, max_cache_bytes // bytes_of_row))
    shares = num_samples >= SHARED_FROM * len(requests)
    if any(request.images is not None for request in requests):
        reader: Reader = SeeingReader(model, decoding.pad_token_id)
    else:
        reader = make_reader(model, num_rows, longest_prompt, longest_budget, decoding.pad_token_id, shares)
    if routes is not None:
        assert isinstance(reader, SlotReader)  # `trainers.routes.check_replay` has refused the others
        reader.routes = routes
    return Batch(reader, requests, budgets, decoding, num_rows, device_of(model), version, keeps_cuts)


@contextmanager
def sampling(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, in which nothing is compiled anew."""
    with evaluating(model), _not_compiled(model):
        yield


def _not_compiled(model: nn.Module) -> AbstractContextManager[object]:
    """What was compiled for training is not compiled again for rows of one token."""
    if any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
