"""`--to gguf`: a model as one file for llama.cpp, which is asked what it makes of it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llm_trainer.config.errors import require
from llm_trainer.export.folder import moved_by_rounding, usual_dtype
from llm_trainer.export.gate import Limits
from llm_trainer.export.gguf_settings import settings_of
from llm_trainer.export.gguf_writer import (
    declared_in,
    other_weights,
    read_gguf,
    round_as_written,
    write_gguf,
)
from llm_trainer.export.llama_cpp import LlamaCpp
from llm_trainer.export.probe import ANSWER_TOKENS, Probe
from llm_trainer.export.request import Request, Written

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_QUANTIZED = ("Q8_0", "Q4_0")
# How far llama.cpp may be from transformers. It rounds what a matrix is multiplied with to the type of the matrix. In F32
# the most of it comes from its server, which adds up the probabilities of the whole vocabulary in 32 bits.
_F32 = Limits(worst=1e-2, mean=5e-4)
_F16 = Limits(worst=1e-2, mean=2e-3)
_ROUNDED = Limits(worst=0.3, mean=0.04)
# A token between two experts that are nearly as good may be sent to the other one.
_F16_EXPERTS = Limits(worst=0.25, mean=1e-2)
_ROUNDED_EXPERTS = Limits(worst=1.0, mean=0.1)


def write(request: Request) -> Written:
    """See `formats.py`. In F32 and F16 the file must answer as the model; in fewer bits, as the model with the numbers of
    the file, and what these change is said.

    Raises:
        ConfigError: a package is missing.
        ValueError: a type that there is not; GGUF has no such model or tokenizer (`GgufError`), or the model sees images.
        Refused: the checkpoint does not answer as the model did in training.
    """
    source = request.source
    if source.found.sees_images:
        raise ValueError(
            f"--to gguf: {source.folder} is a vision-language model, of which llama.cpp wants two files, its tower in one of "
            f"its own (mmproj); expected --to hf or merged, and on that folder llama.cpp's convert_hf_to_gguf.py, once as it "
            f"is and once with --mmproj"
        )
    for package in ("gguf", "xllamacpp"):  # said before a large model is loaded
        require(package, "--to gguf", "use --to hf or --to merged")
    wanted = _wanted(request)
    if source.tokenizer is None:
        raise ValueError(
            f"--to gguf: {source.folder} has no tokenizer, which is a part of the file; expected a tokenizer.json beside the "
            f"weights"
        )
    model, answers = source.whole_with_answers()
    dtype = wanted or _NAMES[usual_dtype(request, model)]

    # 1. the file
    path = request.folder / f"model-{dtype}.gguf"
    others = write_gguf(model, source.tokenizer, path, dtype)
    notes = [f"matrices in {dtype}, vectors in F32: {path.name}, {path.stat().st_size / 1e6:,.1f} MB"]
    for kind in sorted(set(others.values())):
        names = [name for name, other in others.items() if other == kind]
        notes.append(f"in {kind}: {len(names)} of the matrices, such as {names[0]}")

    # 2. how it has to answer
    round_as_written(model, dtype)
    expected = answers
    if dtype not in ("F32", "F16"):
        expected = source.ask(model)
        notes.append(f"{dtype} moves log-probabilities by {moved_by_rounding(answers, expected)}")
    for note in notes:
        request.say(note)
    return answering(model, expected, path, dtype, tuple(notes))


def answering(
    model: "PreTrainedModel", expected: Probe, path: Path, dtype: str, notes: tuple[str, ...] = ()
) -> Written:
    """How a file has to answer, what it has to hold, and how it is asked.

    Args:
        model: that it is of, rounded as it was written (`round_as_written`).
        expected: what a model of transformers answers.
    """
    config = model.config.get_text_config()
    stops = expected.stop_token_ids
    if not stops:  # a file always names an end
        stops = list(declared_in(read_gguf(path)).stop_ids)
    facts = {**expected.facts, "file": settings_of(config), "other weights": []}

    asked = expected.questions
    context = ANSWER_TOKENS + 8 + max((len(row) for row in (*asked.rows, *asked.prompts)), default=0)

    def reopen(folder: Path) -> LlamaCpp:
        file = folder / path.name
        reader = read_gguf(file)
        declared = declared_in(reader)
        found = {"file": declared.settings, "other weights": other_weights(reader, model, dtype)}
        return LlamaCpp(file, declared, stops, found, context, torch.get_num_threads())

    return Written(
        replace(expected, stop_token_ids=sorted(stops), facts=facts),
        reopen,
        _limits(dtype, has_experts="moe" in config.model_type),
        notes,
        library="gguf",
    )


def _wanted(request: Request) -> str | None:
    """
    Raises:
        ValueError: there is no such type, or two are named.
    """
    if request.quantize is None:
        return None if request.dtype is None else _NAMES[request.dtype]
    quantized = request.quantize.upper()
    if quantized not in _QUANTIZED:
        raise ValueError(f"--quantize: got {request.quantize!r}, expected one of {', '.join(_QUANTIZED)}")
    if request.dtype is not None:
        raise ValueError(
            f"--quantize {quantized}: it is the type of the weights, and so is --dtype; expected one of the two"
        )
    return quantized


def _limits(dtype: str, has_experts: bool) -> Limits:
    if dtype == "F32":
        return _F32
    if dtype == "F16":
        return _F16_EXPERTS if has_experts else _F16
    return _ROUNDED_EXPERTS if has_experts else _ROUNDED
