"""Learning rates that are multiples of the run's: of LoRA's B (LoRA+), of embeddings, of a projector."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

MULTIPLIER = "lr_multiplier"  # key of a parameter group whose rate is a multiple; others have none


def multiplied(
    groups: Sequence[dict[str, Any]], model: nn.Module, lr: float, multipliers: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Take apart parameter groups by what their learning rate is multiplied by; those of the run's own rate come first.

    LoRA+ (Hayou et al. 2024, arXiv 2402.12354) is `{"lora_B": 16}`.

    Args:
        groups: of the parameters that `model` trains, with lists as `params`.
        model: whose parameters have names.
        lr: of the run.
        multipliers: regular expression that is found in a parameter's name -> factor above 0; the first one counts.

    Raises:
        ValueError: an expression is none, names nothing that is trained, or a factor is not above 0.
    """
    if not multipliers:
        return list(groups)
    patterns = _compiled(multipliers)

    # 1. the factor of each parameter
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    factors: dict[Tensor, float] = {}
    used = set[str]()
    for name, parameter in trained.items():
        pattern = next((text for text, compiled in patterns.items() if compiled.search(name)), None)
        if pattern is not None:
            used.add(pattern)
            factors[parameter] = multipliers[pattern]
    for text in multipliers:
        if text not in used:
            raise ValueError(_unused(text, patterns[text], trained, model))

    # 2. each group by factor
    plain, others = [], []
    for group in groups:
        by_factor: dict[float, list[Tensor]] = {}
        for parameter in group["params"]:
            by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
        for factor, members in by_factor.items():
            if factor == 1.0:
                plain.append({**group, "params": members})
            else:
                others.append({**group, "params": members, "lr": lr * factor, MULTIPLIER: factor})
    return [*plain, *others]


def _compiled(multipliers: Mapping[str, float]) -> dict[str, re.Pattern[str]]:
    found = {}
    for text, factor in multipliers.items():
        if not factor > 0:
            raise ValueError(f"lr_multipliers: got {factor!r} for {text!r}, expected a number above 0")
        try:
            found[text] = re.compile(text)
        except re.error as error:
            raise ValueError(f"lr_multipliers: {text!r} is no regular expression: {error}") from error
    return found


def _unused(text: str, compiled: re.Pattern[str], trained: Mapping[str, Tensor], model: nn.Module) -> str:
    """What to say of an expression that no parameter is left for."""
    if any(compiled.search(name) for name in trained):
        return f"lr_multipliers: all parameters that {text!r} names are named by others before it; put it before them"
    frozen = next((name for name, _ in model.named_parameters() if compiled.search(name)), None)
    if frozen is not None:
        return f"lr_multipliers: {text!r} names parameters that are not trained, such as {frozen}; remove it"
    words: dict[str, str] = {}  # a word of a name -> the name
    for name in trained:
        words.update({word: words.get(word, name) for word in name.split(".") if not word.isdigit()})
    near = get_close_matches(text.rpartition(".")[2], words, n=3, cutoff=0.4) or list(words)[-3:]
    shown = ", ".join(words[word] for word in near)
    return f"lr_multipliers: {text!r} is found in the name of no parameter; there are {shown}"


def factor_of(group: Mapping[str, Any]) -> float:
    """What the run's learning rate is multiplied by in a parameter group."""
    return float(group.get(MULTIPLIER, 1.0))


def rate_of_run(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that the first group's is a multiple of: what people are shown, as it is now."""
    first = optimizer.param_groups[0]
    return float(first["lr"]) / factor_of(first)


def top_rate(optimizer: torch.optim.Optimizer) -> float:
    """The largest rate of the groups that a schedule has not changed yet, without multiples."""
    groups = [group for group in optimizer.param_groups if MULTIPLIER not in group] or optimizer.param_groups
    return max(float(group.get("initial_lr", group["lr"])) / factor_of(group) for group in groups)


def describe_multiples(optimizer: torch.optim.Optimizer) -> str:
    """`x 16 for 24 of 48 tensors`; empty: all have one rate."""
    tensors: dict[float, int] = {}
    for group in optimizer.param_groups:
        factor = factor_of(group)
        tensors[factor] = tensors.get(factor, 0) + len(group["params"])
    in_all = sum(tensors.values())
    said = [f"x {factor:g} for {number:,} of {in_all:,} tensors" for factor, number in tensors.items() if factor != 1]
    return ", ".join(said)
