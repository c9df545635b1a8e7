"""Which parameters of a model are not trained: whole parts of a vision-language model, or those of some name."""

import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from llm_trainer.config.adapters import LANGUAGE_MODEL
from llm_trainer.config.algorithms import SFTConfig
from llm_trainer.models.inside import adapted_model
from llm_trainer.models.quantize import num_values
from llm_trainer.models.targets import Parts

LANGUAGE, VISION, PROJECTOR = "language", "vision", "projector"
# What transformers calls what makes tokens of a tower's features; in some models it is a part of the tower.
PROJECTORS = ("projector", "connector", "merger", "image_newline")
PROJECTOR_ALONE = (LANGUAGE, VISION)  # what `freeze_llm_model` means


def parts_to_freeze(frozen: Sequence[str], section: object) -> list[str]:
    """What a run freezes: as configured, and all but the projector where `section`, its algorithm's options, says so."""
    wanted = list(frozen)
    if isinstance(section, SFTConfig) and section.freeze_llm_model:
        wanted += PROJECTOR_ALONE
    return wanted


def freeze_parts(model: nn.Module, wanted: Sequence[str]) -> None:
    """Set `requires_grad` to False where `wanted` says, in place; what is frozen already stays so.

    Args:
        model: before an optimizer is made.
        wanted: `language`, `vision`, `projector`, or regular expressions that are found in names of parameters.

    Raises:
        ValueError: one names no parameter, or nothing is left that learns.
    """
    parts = dict(parts_of(model))
    for text in wanted:
        found = [name for name, part in parts.items() if _is_meant(text, name, part)]
        if not found:
            raise ValueError(
                f"freeze: {text!r} is no part of this {type(model).__name__} and found in the name of no parameter; expected "
                f"{', '.join(dict.fromkeys(parts.values()))}, or a regular expression such as {next(iter(parts))!r}"
            )
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: {', '.join(wanted)} leave nothing that learns; expected a part to train")


def _is_meant(text: str, name: str, part: str) -> bool:
    if text in (LANGUAGE, VISION, PROJECTOR):
        return part == text
    try:
        return re.search(text, name) is not None
    except re.error as error:
        raise ValueError(f"freeze: {text!r} is no regular expression: {error}") from error


def parts_of(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Each parameter's name and the part it belongs to."""
    parts = Parts(model)
    for name, _ in model.named_parameters():
        is_language = parts.of(name) == LANGUAGE_MODEL and "image_newline" not in name
        part = VISION
        if is_language:
            part = LANGUAGE
        elif any(word in name for word in PROJECTORS):
            part = PROJECTOR
        yield name, part


def describe_frozen(model: nn.Module) -> str:
    """How many parameters of which parts are not trained; empty: all are."""
    inner = adapted_model(model)
    said = []
    for part, (frozen, in_all) in _counts(inner).items():
        if frozen == in_all:
            said.append(f"{part}: {frozen:,} parameters")
        elif frozen:
            said.append(f"{part}: {frozen:,} of {in_all:,} parameters{_named(inner, part)}")
    return ", ".join(said)


def describe_parts(model: nn.Module) -> str:
    """How many parameters language model, tower and projector have; empty: it sees nothing."""
    counts = _counts(adapted_model(model))
    if len(counts) < 2:
        return ""
    return ", ".join(f"{part} {in_all:,}" for part, (_, in_all) in counts.items())


def _counts(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of each part how many parameters are frozen, and how many there are."""
    counts: dict[str, tuple[int, int]] = {}
    for name, part in parts_of(model):
        parameter = model.get_parameter(name)
        frozen, in_all = counts.get(part, (0, 0))
        size = num_values(parameter)
        counts[part] = frozen + size * (not parameter.requires_grad), in_all + size
    return counts


def _named(model: nn.Module, part: str) -> str:
    """The outermost modules of a part that are frozen as a whole, the first few; empty: there are none."""
    frozen = list[str]()
    parts = dict(parts_of(model))
    for name, module in model.named_modules():
        own = [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        is_inside = any(name.startswith(f"{outer}.") for outer in frozen)
        trained = any(parameter.requires_grad for parameter in module.parameters())
        if own and not trained and not is_inside and parts.get(own[0]) == part:
            frozen.append(name)
    if not frozen:
        return ""
    more = f" and {len(frozen) - 3} more" if len(frozen) > 3 else ""
    return f" ({', '.join(frozen[:3])}{more})"


def see_alike(model: nn.Module, other: nn.Module) -> bool:
    """Whether two models make the same of every image, and always will: `model` does not learn to see.

    Args:
        model: that is trained.
        other: frozen, or `model` itself, as it was at some time of its training.
    """
    own = _eyes_of(model)
    if not own or any(parameter.requires_grad for parameter in own.values()):
        return False
    theirs = own if other is model else _eyes_of(other)
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def _eyes_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of tower and projector, by name."""
    inner = adapted_model(model)
    return {name: inner.get_parameter(name) for name, part in parts_of(inner) if part != LANGUAGE}
