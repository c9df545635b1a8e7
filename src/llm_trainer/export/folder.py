"""A model in memory as a folder of transformers: what `hf` and `merged` write."""

from dataclasses import replace
from typing import Any

import torch

from llm_trainer.checkpoint.adapter_bases import place_of
from llm_trainer.checkpoint.tensor_files import TensorFolder
from llm_trainer.checkpoint.weights import write_model
from llm_trainer.export.asking import is_tied
from llm_trainer.export.gate import SAME, Refused
from llm_trainer.export.opened import reopened
from llm_trainer.export.probe import Probe
from llm_trainer.export.request import Request, Written
from llm_trainer.models.adapter_folder import in_dtype
from llm_trainer.models.inside import untie


def write_folder(request: Request, model: Any, answers: Probe) -> Written:
    """Write weights, configuration, generation config and tokenizer; see `formats.py`.

    Args:
        request: of the format.
        model: in memory; it is rounded in place.
        answers: of it, in fp32, before.

    Raises:
        Refused: the weights have other names than in the folder that the model came from.
    """
    source, notes = request.source, []
    dtype = request.dtype or usual_dtype(request, model)
    is_rounded = dtype != model.dtype
    in_dtype(model, dtype)
    if not is_tied(model):
        untie(model.config)
    write_model(model, request.folder, source.processor or source.tokenizer)
    notes += _names(request, model)
    facts = source.opened(model, with_weights=True).facts()
    expected = replace(answers, facts=facts)
    if is_rounded:
        expected = replace(source.ask(model), facts=facts)
        rounding = moved_by_rounding(answers, expected)
        notes.append(f"the weights were rounded to {_name(dtype)}, which moves log-probabilities by {rounding}")
    for note in notes:
        request.say(note)
    return Written(expected, reopened, SAME, tuple(notes))


def usual_dtype(request: Request, model: Any) -> torch.dtype:
    """The one that it was trained in: adapters are merged in a wider one."""
    base = request.source.found.base
    if base is None or not base.dtype:
        found: torch.dtype = model.dtype
        return found
    return getattr(torch, base.dtype)  # type: ignore[no-any-return]


def moved_by_rounding(before: Probe, after: Probe) -> str:
    """How far log-probabilities are apart, in words."""
    apart = []
    for one, other in zip(_all_logprobs(before), _all_logprobs(after), strict=True):
        apart += [abs(a - b) for a, b in zip(one, other, strict=True)]
    return f"{max(apart):.2g} nats at most, {sum(apart) / len(apart):.2g} in the mean"


def _all_logprobs(probe: Probe) -> list[list[float]]:
    """Of texts, and of what is shown."""
    return [*probe.logprobs, *(look.logprobs for look in probe.looks or ())]


def _names(request: Request, model: Any) -> list[str]:
    """Compare the names of weights with those in the folder that the model came from; what has to be said of them.

    Raises:
        Refused: a name is missing, or new.
    """
    found = request.source.found
    revision = None if found.base is None else found.base.revision
    place = place_of(str(found.model_source), revision)
    original = {} if place is None else TensorFolder(place).shapes
    if not original:  # another format of files
        return []
    written = TensorFolder(request.folder).shapes
    missing, more = sorted(original.keys() - written.keys()), sorted(written.keys() - original.keys())
    heads = {name for name in (*missing, *more) if name.endswith("lm_head.weight")}
    if set(missing) - heads or set(more) - heads or (missing and not is_tied(model)):
        raise Refused(
            f"the weights have other names than in '{found.model_source}': missing {', '.join(missing[:3]) or 'none'}, new "
            f"{', '.join(more[:3]) or 'none'}"
        )
    if more:
        return [
            "training took head and embeddings apart, which were one matrix: both are saved (tie_word_embeddings: false)"
        ]
    return []


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
