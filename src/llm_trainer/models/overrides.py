"""What is changed in a loaded model's configuration: how its positions are stretched, its context, its dropout.

Every value is looked up in the model that it is for: what that model does not read is refused, not kept beside it.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llm_trainer.models.inside import auto_class, language_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

KEY = "model_overrides"
ROPE, CONTEXT = "rope_parameters", "max_position_embeddings"
ROPE_NAMES = (ROPE, "rope_scaling")  # the second is the first's name before transformers 5
ORIGINAL = "original_max_position_embeddings"  # the context that a model had before its positions were stretched
# rope_type -> the keys it needs, and those it may have (transformers, `modeling_rope_utils`)
ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        (ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (("factor", "short_factor", "long_factor"), (ORIGINAL, "attention_factor")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), (ORIGINAL,)),
}
OF_ANY_TYPE = ("rope_type", "rope_theta", "partial_rotary_factor")
LOCAL = ("sliding", "chunked")  # beginnings of the names of layers that look back a fixed number of tokens
PROBE = 0.123456789  # a dropout that no model has by itself
# What is said elsewhere: key -> where.
ELSEWHERE = {
    "vocab_size": "vocabulary_config",
    "dtype": "run_config.precision",
    "torch_dtype": "run_config.precision",
    "attn_implementation": "run_config.attention",
}


def overridden(config: "PretrainedConfig", overrides: Mapping[str, Any]) -> "PretrainedConfig":
    """A copy of a model's configuration with other values; where positions are stretched, with the longer context.

    Args:
        config: of the model, as it was loaded.
        overrides: `rope_parameters` (or `rope_scaling`), `max_position_embeddings`, and whatever dropout the model has, by
            transformers' names. Rope parameters with a `rope_type` take the place of the model's own, except for
            `rope_theta` and `partial_rotary_factor`; without one they are put into them. Where layers of several types have
            positions of their own (Gemma 3), they are given by the names of these types.

    Raises:
        ValueError: a key that the model does not have or read, or that would change what its weights are; a type of RoPE
            that is not known; a context above what the positions give.
    """
    config = deepcopy(config)
    inner = language_config(config)
    given = dict(overrides)
    rope = _take_rope(given)
    context = given.pop(CONTEXT, None)
    dropouts = _dropouts(inner, given)
    if rope is not None or context is not None:
        _stretch(inner, rope, context)
    for name, value in dropouts.items():
        setattr(inner, name, value)
    _check_read(config, inner, dropouts, rope is not None)
    return config


def check_rope(parameters: Mapping[str, Any], where: str) -> None:
    """Look at the parameters of one RoPE, those of an older `rope_scaling` included.

    Args:
        parameters: with a `rope_type`.
        where: the key they stand at, for messages.

    Raises:
        ValueError: a type that is not known, a key that is missing or that this type does not have, a number that cannot be.
    """
    # 1. the type
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(
            f"{where}.rope_type: got {kind!r}, and transformers knows no such RoPE, or it was never trained with here; "
            f"expected one of {', '.join(ROPE_TYPES)}"
        )
    # 2. its keys
    needed, allowed = ROPE_TYPES[kind]
    known = (*OF_ANY_TYPE, *needed, *allowed)
    for name in parameters:
        if name not in known:
            raise ValueError(f"{where}.{name}: rope_type {kind} has no such parameter; {_nearest(name, known)}")
    missing = [name for name in needed if name not in parameters]
    if missing:
        raise ValueError(f"{where}: rope_type {kind} needs {' and '.join(missing)}; found {', '.join(parameters)}")
    # 3. their numbers
    factor, theta = parameters.get("factor", 1.0), parameters.get("rope_theta", 1.0)
    if not _is_number(factor) or factor < 1.0:
        raise ValueError(
            f"{where}.factor: got {factor!r}, expected a number of at least 1: how much longer rows may be"
        )
    if not _is_number(theta) or theta <= 0.0:
        raise ValueError(f"{where}.rope_theta: got {theta!r}, expected a number above 0")
    if kind == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
        raise ValueError(
            f"{where}.high_freq_factor: got {parameters['high_freq_factor']}, expected a number above low_freq_factor, "
            f"{parameters['low_freq_factor']}"
        )


def with_rope_type(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters with `rope_type`, which older configurations call `type`."""
    found = dict(parameters)
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    return found


def steady_context(config: Any) -> int | None:
    """How many tokens a row may have so that its positions do not depend on the other rows of a micro-batch; None: any number.

    transformers chooses the frequencies of `dynamic`, and the list of `longrope`, by the longest row that a forward sees.

    Args:
        config: of a transformers model, as it was loaded.
    """
    inner = language_config(config)
    limits = []
    for parameters in _by_layer_type(inner, getattr(inner, ROPE, None) or {}).values():
        kind = parameters.get("rope_type")
        if kind == "dynamic":
            limits.append(getattr(inner, CONTEXT))
        if kind == "longrope" and list(parameters["short_factor"]) != list(parameters["long_factor"]):
            limits.append(parameters.get(ORIGINAL) or getattr(inner, ORIGINAL, getattr(inner, CONTEXT)))
    return min(limits, default=None)


def check_steady(length: int, limit: int | None, where: str) -> None:
    """
    Args:
        length: of the longest row, in tokens.
        limit: `steady_context`.
        where: what says how long rows are, to begin the message with.

    Raises:
        ValueError: the positions of such a row would depend on the other rows of its micro-batch.
    """
    if limit is None or length <= limit:
        return
    raise ValueError(
        f"{where}: rows of {length} tokens, and this model's RoPE (dynamic, or longrope with two lists) turns those above "
        f"{limit} by the longest one of their micro-batch, so that a row's loss would depend on how a step is cut. Expected at "
        f"most {limit} tokens (dataset_block_size), or positions that stay as they are: {KEY}.{ROPE} with rope_type yarn, or "
        f"longrope with the long_factor twice"
    )


# What may be changed.


def _take_rope(given: dict[str, Any]) -> Mapping[str, Any] | None:
    """Take the RoPE parameters out of `given`; None: there are none."""
    names = [name for name in ROPE_NAMES if given.get(name) is not None]
    if len(names) > 1:
        raise ValueError(f"{KEY}: got {' and '.join(names)}, two names of one thing; expected {ROPE}")
    rope = None
    for name in ROPE_NAMES:
        value = given.pop(name, None)
        if value is not None and not isinstance(value, Mapping):
            raise ValueError(
                f"{KEY}.{name}: got {value!r}, expected a mapping such as {{rope_type: yarn, factor: 4.0}}"
            )
        rope = value if value is not None else rope
    return rope


def _dropouts(config: "PretrainedConfig", given: Mapping[str, Any]) -> dict[str, float]:
    """The rest of the overrides, which must be dropout.

    Raises:
        ValueError: one is something else, or no probability.
    """
    names = _names(config)
    has_rope = ROPE in names
    allowed = sorted(name for name in names if _is_dropout(name))
    allowed += [ROPE, CONTEXT] if has_rope else []
    found: dict[str, float] = {}
    for name, value in given.items():
        where = f"{KEY}.{name}"
        if name in ELSEWHERE:
            raise ValueError(f"{where}: is no override of a loaded model; expected it at {ELSEWHERE[name]}")
        if name not in names:
            raise ValueError(f"{where}: {type(config).__name__} has no such key; {_nearest(name, allowed)}")
        if not _is_dropout(name):
            raise ValueError(
                f"{where}: would change the shape of the weights that are loaded, or what they mean; expected one of "
                f"{', '.join(allowed)}"
            )
        if not _is_number(value) or not 0.0 <= value < 1.0:
            raise ValueError(f"{where}: got {value!r}, expected a number of at least 0 and below 1")
        found[name] = float(value)
    return found


def _names(config: "PretrainedConfig") -> set[str]:
    return {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)  # type: ignore[arg-type]


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("pdrop")


def _nearest(name: str, known: Collection[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"expected one of {', '.join(known)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# Positions.


def _stretch(config: "PretrainedConfig", rope: Mapping[str, Any] | None, context: int | None) -> None:
    """Change the positions and the context of `config`.

    Raises:
        ValueError: it has no rotary positions, they cannot be stretched so, or they do not reach as far as `context`.
    """
    before = getattr(config, ROPE, None)
    if not before:
        raise ValueError(
            f"{KEY}: the positions of {type(config).__name__} are weights, or it has none; expected a model with rotary "
            f"positions (RoPE) to change {ROPE} or {CONTEXT} of"
        )
    if context is not None and (not isinstance(context, int) or isinstance(context, bool) or context < 1):
        raise ValueError(f"{KEY}.{CONTEXT}: got {context!r}, expected an integer of at least 1")
    entries = _by_layer_type(config, before)
    if rope is None:
        _check_context(context, getattr(config, CONTEXT), "positions as they were loaded")
        config.max_position_embeddings = context  # type: ignore[attr-defined]
        return

    # 1. the new parameters of each type of layers
    trained_on = _trained_on(config, entries)
    changed = _changed(entries, rope)
    reach, default = math.inf, 0
    for name, parameters in changed.items():
        where = f"{KEY}.{ROPE}.{name}" if name else f"{KEY}.{ROPE}"
        check_rope(parameters, where)
        _check_constant(config, parameters, where)
        if name.startswith(LOCAL):
            continue
        if parameters["rope_type"] in ("yarn", "longrope", "llama3"):
            parameters.setdefault(ORIGINAL, trained_on)
        # 2. how far they reach
        original = parameters.get(ORIGINAL, trained_on)
        factor = 1.0 if parameters["rope_type"] == "dynamic" else parameters.get("factor", 1.0)
        stretch = _theta_stretch(config, entries[name], parameters)
        reach = min(reach, original * factor * stretch)
        default = max(default, int(original * factor))
    if context is None:
        context = min(default, round(reach))
    kinds = {parameters["rope_type"] for parameters in changed.values()}
    by = f"{ROPE} as they are given here"
    if "dynamic" in kinds:
        by = f"{ROPE} of the type dynamic, which stretch what is longer than that by the longest row so far, at inference,"
    _check_context(context, round(reach), by)
    # 3. in transformers' own form, which looks at it as well
    config.max_position_embeddings = context  # type: ignore[attr-defined]
    setattr(config, ROPE, changed.get("", changed))
    try:
        config.standardize_rope_params()
        config.validate_rope()
    except (KeyError, ValueError) as error:
        message = error.args[0] if error.args else error
        raise ValueError(f"{KEY}.{ROPE}: {type(config).__name__} cannot have them: {message}") from error


def _by_layer_type(config: "PretrainedConfig", rope: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """RoPE parameters by the type of layers; one entry without a name, where they are those of all layers."""
    names = config.nested_rope_parameter_keys(dict(rope))
    if not names:
        return {"": with_rope_type(rope)}
    return {name: with_rope_type(rope[name]) for name in names if rope[name] is not None}


def _changed(entries: Mapping[str, dict[str, Any]], rope: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries with what `rope` says of them."""
    given: Mapping[str, Any] = rope if "" not in entries else {"": rope}
    unknown = [name for name in given if name not in entries]
    if unknown:
        raise ValueError(
            f"{KEY}.{ROPE}: got {', '.join(unknown)}, and each type of layers of this model has positions of its own; "
            f"expected a mapping for one of {', '.join(entries)}"
        )
    changed: dict[str, dict[str, Any]] = {}
    for name, before in entries.items():
        new = with_rope_type(given.get(name) or {})
        kept = before
        if "rope_type" in new:
            kept = {key: value for key, value in before.items() if key in OF_ANY_TYPE}
        changed[name] = {**kept, **new}
    return changed


def _trained_on(config: "PretrainedConfig", entries: Mapping[str, Mapping[str, Any]]) -> int:
    """The context before anything was stretched."""
    found: int = getattr(config, CONTEXT)
    for name, parameters in entries.items():
        if name.startswith(LOCAL):
            continue
        original = getattr(config, ORIGINAL, None) or parameters.get(ORIGINAL)
        if original:
            return int(original)
        if parameters.get("rope_type") == "linear":
            return round(found / parameters["factor"])
    return found


def _theta_stretch(config: "PretrainedConfig", before: Mapping[str, Any], after: Mapping[str, Any]) -> float:
    """How much longer the slowest rotation takes by another base alone.

    The angle of pair i of `d` numbers turns by `theta^(-2i/d)` per token, that of the slowest, i = d/2 - 1, by
    `theta^(-(d-2)/d)`: with `theta * r` it takes `r^((d-2)/d)` times as long, which is the scaling called NTK-aware (bloc97
    2023, in Peng et al. 2023, arXiv 2309.00071, section 3.1).
    """
    width = _rotary_width(config, after)
    ratio: float = after["rope_theta"] / before["rope_theta"]
    return ratio ** ((width - 2) / width)


def _rotary_width(config: Any, parameters: Mapping[str, Any]) -> int:
    """Numbers of a head that are rotated."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width * parameters.get("partial_rotary_factor", 1.0))


def _check_constant(config: "PretrainedConfig", parameters: Mapping[str, Any], where: str) -> None:
    """
    Raises:
        ValueError: the frequencies would depend on the other rows of a micro-batch.
    """
    if parameters["rope_type"] != "longrope":
        return
    expected = _rotary_width(config, parameters) // 2
    for name in ("short_factor", "long_factor"):
        factors = parameters[name]
        if not isinstance(factors, Sequence) or len(factors) != expected or not all(map(_is_number, factors)):
            raise ValueError(f"{where}.{name}: got {factors!r}, expected a list of {expected} numbers")
    if list(parameters["short_factor"]) != list(parameters["long_factor"]):
        raise ValueError(
            f"{where}.short_factor: differs from long_factor, and transformers takes the one or the other for all rows of a "
            f"micro-batch, by the longest of them; the loss would depend on how a step is cut. Expected the long_factor twice"
        )


def _check_context(context: int | None, reach: int, by: str) -> None:
    """
    Raises:
        ValueError: the context is above what the positions reach.
    """
    if context is not None and context > reach:
        raise ValueError(
            f"{KEY}.{CONTEXT}: got {context}, and {by} reach {reach} tokens; expected at most {reach}, or a larger factor in "
            f"{ROPE}, such as {{rope_type: yarn, factor: {math.ceil(context / reach)}.0}} on positions that are not stretched "
            f"yet"
        )


# What the model reads.


def _check_read(
    config: "PretrainedConfig", inner: "PretrainedConfig", dropouts: Mapping[str, float], has_rope: bool
) -> None:
    """
    Raises:
        ValueError: nothing in the model changes by a value that was changed.
    """
    for name in dropouts:
        probed = deepcopy(config)
        setattr(language_config(probed), name, PROBE)
        model = _empty(probed)
        if not any(_has_number(module, PROBE) for module in model.modules()):
            raise ValueError(
                f"{KEY}.{name}: is a key of {type(inner).__name__}, and nothing in {type(model).__name__} reads it; leave it "
                f"out"
            )
    if not has_rope:
        return
    model = _empty(config)
    read = "; ".join(str(vars(module).get("rope_type", "")) for module in model.modules())
    for parameters in _by_layer_type(inner, getattr(inner, ROPE)).values():
        if parameters["rope_type"] not in read:
            raise ValueError(f"{KEY}.{ROPE}: nothing in {type(model).__name__} reads a rope_type; leave it out")


def _empty(config: "PretrainedConfig") -> "PreTrainedModel":
    with torch.device("meta"):
        return cast("PreTrainedModel", auto_class(config).from_config(config))


def _has_number(module: nn.Module, number: float) -> bool:
    return any(isinstance(value, float) and value == number for value in vars(module).values())
