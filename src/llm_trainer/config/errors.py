"""What a user is told about a wrong configuration: which key, what was found, what was expected, and the likely fix."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from itertools import zip_longest
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

_NOUNS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
    Callable: "a function",
}
_NOUNS_OF_MANY: dict[Any, str] = {int: "integers", float: "numbers", str: "strings", Any: "values"}
_BOUNDS: dict[type, tuple[str, str]] = {
    Ge: ("ge", "of at least"),
    Gt: ("gt", "above"),
    Le: ("le", "of at most"),
    Lt: ("lt", "below"),
}


# What other libraries call an option that has another name here.
ELSEWHERE = {
    "num_generations": "group_size",
    "max_completion_length": "gen_max_seq_len",
    "max_new_tokens": "gen_max_seq_len",
    "temperature": "gen_temperature",
    "top_k": "gen_k",
    "top_p": "gen_p",
    "beta": "loss_beta",
    "epsilon": "loss_clip_eps",
    "num_iterations": "grpo_steps",
    "reward_funcs": "rewards",
    "kl_coef": "loss_beta",
    "cliprange": "loss_clip_eps",
    "cliprange_value": "value_clip_eps",
    "response_length": "gen_max_seq_len",
    "learning_rate": "initial_lr",
    "lr": "initial_lr",
    "lr_scheduler_type": "lr_scheduler",
    "warmup_steps": "warmup_iters",
    "optim": "optim_type",
    "adam_epsilon": "eps",
    "num_train_epochs": "n_epochs",
    "num_epochs": "n_epochs",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "max_length": "dataset_block_size",
    "max_seq_length": "dataset_block_size",
    "cutoff_len": "dataset_block_size",
    "neat_packing": "packing",
    "assistant_only_loss": "train_on",
    "dataloader_num_workers": "data_loader_num_workers",
    "model_name_or_path": "model_config",
    "output_dir": "save_dir",
    "save_steps": "save_interval_steps",
    "save_total_limit": "checkpoints_to_keep",
    "logging_dir": "log_dir",
    "logging_steps": "log_interval",
    "eval_steps": "eval_batch_interval",
    "report_to": "writers",
    "resume_from_checkpoint": "resume",
    "bf16": "precision",
    "fp16": "precision",
    "attn_implementation": "attention",
    "torch_compile": "compile",
    "deepspeed": "ds_config",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_target": "target",
    "target_modules": "target",
    "use_dora": "dora",
    "use_rslora": "rslora",
    "load_in_4bit": "bits",
    "load_in_8bit": "bits",
}
# One option, as GRPO's section calls it and as PPO's does.
_GRPO_AND_PPO = {
    "loss_beta": "kl_beta",
    "loss_clip_eps": "clip_eps",
    "grpo_steps": "ppo_epochs",
    "rows_per_update": "ppo_batch_size",
    "group_size": "completions_per_prompt",
}
ALIKE = _GRPO_AND_PPO | {ppo: grpo for grpo, ppo in _GRPO_AND_PPO.items()}


# The class of a whole configuration, which `schema` puts here: a key in a wrong section is looked for in all of it.
WHOLE: list[type] = []


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line per mistake."""


def is_installed(package: str) -> bool:
    """Whether an optional package can be imported; it is not imported to say so, which may take seconds."""
    try:
        return find_spec(package) is not None
    except ValueError:  # blocked, by None in sys.modules
        return False


def require(package: str, what: str, instead: str) -> None:
    """Ask for an optional package.

    Args:
        package: its name, to import and to install.
        what: needs it, such as "engine: hf".
        instead: what can be done without it.

    Raises:
        ConfigError: it is not installed; the message has the command that installs it.
    """
    if not is_installed(package):
        raise ConfigError(
            f"{what} needs the package {package}, which is not installed: pip install {package}, or {instead}"
        )


def counted(number: int, noun: str) -> str:
    """`1 row`, `2,000 rows`, `2 batches`."""
    if number == 1:
        return f"1 {noun}"
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{number:,} {noun}{ending}"


def fields_of(section: type) -> Mapping[str, FieldInfo]:
    """The fields of a configuration class by name, with their types, bounds and descriptions."""
    return section.__pydantic_fields__  # type: ignore[attr-defined, no-any-return]


def has_choice(field: FieldInfo, choice: str | None) -> bool:
    """Whether None, or a word, is a value of its own for a field."""
    members = _members(field.annotation)
    if choice is None:
        return field.annotation is Any or type(None) in members
    return any(choice in typing.get_args(member) for member in members if typing.get_origin(member) is Literal)


def _is_section(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation)


def _members(annotation: Any) -> tuple[Any, ...]:
    """`(X, Y)` for `X | Y`, else the annotation alone; bare types without what annotates them."""
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    members = typing.get_args(annotation) if is_union else (annotation,)
    return tuple(typing.get_args(member)[0] if typing.get_origin(member) is Annotated else member for member in members)


def _noun(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)} {_NOUNS_OF_MANY[_members(arguments[0])[0]]}"
    if origin is list:
        return f"a list of {' or '.join(map(_noun_of_many, _members(arguments[0])))}"
    if _is_section(annotation):
        return "a section (mapping)"
    return _NOUNS.get(origin or annotation, "a value")


def _noun_of_many(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return " or ".join(typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        return f"lists of {' or '.join(map(_noun_of_many, _members(typing.get_args(annotation)[0])))}"
    return _NOUNS_OF_MANY[annotation]


def expectation(field: FieldInfo) -> str:
    """What a field accepts, in words: `an integer of at least 1`, `one of auto, fp32, bf16`, `a string or null`."""
    bounds = []
    for rule in field.metadata:
        if type(rule) in _BOUNDS:
            name, words = _BOUNDS[type(rule)]
            bounds.append(f"{words} {getattr(rule, name):g}")
    nouns = [_noun(member) for member in _members(field.annotation)]
    nouns[0] = " ".join([nouns[0], " and ".join(bounds)]).rstrip()
    return " or ".join(dict.fromkeys(nouns))


def explain(error: ValidationError, section: type, where: str) -> ConfigError:
    """Pydantic's list of mistakes as lines like `run.yaml: batch_size: got 0, expected an integer of at least 1`.

    Args:
        error: what pydantic found while building `section`.
        section: the configuration class the keys are looked up in.
        where: the origin of the values, a file name or the name of the class that was called.
    """
    lines = []
    for mistake in error.errors(include_url=False):
        if mistake["loc"][-1:] == ("str",) and isinstance(mistake["input"], Mapping):
            continue  # `section or string` was given a section: what is wrong inside it is reported beside this
        lines.append(f"{where}: {_explain_one(section, mistake)}")
    return ConfigError("\n".join(dict.fromkeys(lines)))  # both members of a union report the same mistake


def _explain_one(section: type, mistake: ErrorDetails) -> str:
    kind, location, found = mistake["type"], mistake["loc"], reprlib.repr(mistake["input"])
    path: list[str] = []
    field: FieldInfo | None = None
    for part, following in zip_longest(location, location[1:]):
        fields = fields_of(section)
        if part in fields:
            field = fields[str(part)]
            path.append(str(part))
            # Beside keys, a location has the names of union members, which no user wrote.
            members = [member for member in _members(field.annotation) if _is_section(member)]
            members.sort(key=lambda member: member.__name__ != following)
            section = next(iter(members), section)
    key = ".".join(path)
    if kind == "unexpected_keyword_argument":
        return _unknown_key(".".join([*path, str(location[-1])]), str(location[-1]), section)
    if kind == "value_error":
        return ": ".join([*filter(None, [key]), str(mistake["ctx"]["error"])])
    if field is None:
        return f"got {found}, expected a mapping of keys to values"
    if kind == "missing" and location[-1] == path[-1]:
        return f"{key} is missing: {field.description}"
    example = ""
    if kind == "list_type" and isinstance(mistake["input"], str | int | float):
        text = str(mistake["input"])
        if not text.isprintable():
            text = repr(text)
        example = f": [{text}]"
    return f"{key}: got {found}, expected {expectation(field)}{example}"


def _unknown_key(path: str, key: str, section: type) -> str:
    """What to say of a key that `section` does not have."""
    known, name = list(fields_of(section)), ELSEWHERE.get(key, key)
    for same in (name, ALIKE.get(name)):
        if same in known:
            return f"{path} is not a known key; it is {same} here"
    for wanted in (key, name):
        if homes := _homes(wanted):
            return f"{path} is not a known key; {wanted} is a key of {homes}"
    for near in difflib.get_close_matches(key, known, n=1, cutoff=0.5):
        return f"{path} is not a known key; did you mean {near}?"
    all_keys = set[str]()
    for level in _levels():
        all_keys.update(*map(fields_of, level.values()))
    for near in difflib.get_close_matches(key, sorted(all_keys), n=1, cutoff=0.8):
        return f"{path} is not a known key; did you mean {near}, a key of {_homes(near)}?"
    return f"{path} is not a known key; known here: {', '.join(known)}"


def _homes(key: str) -> str:
    """The sections of a whole configuration that have a key, the nearest to the top alone; empty: none."""
    for level in _levels():
        homes = [(place, owner) for place, owner in level.items() if key in fields_of(owner)]
        if homes:
            return " or ".join(f"{place or 'the top level'} ({owner.__name__})" for place, owner in homes)
    return ""


def _levels() -> Iterator[dict[str, type]]:
    """The sections of a whole configuration by their paths: the top, whose path is empty, those in it, those in these ..."""
    level = {"": WHOLE[0]} if WHOLE else {}
    while level:
        yield level
        below: dict[str, type] = {}
        for place, section in level.items():
            for name, field in fields_of(section).items():
                members = [member for member in _members(field.annotation) if _is_section(member)]
                below |= {f"{place}.{name}".lstrip("."): member for member in members}
        level = below
