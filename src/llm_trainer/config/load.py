"""YAML files to `TrainConfig` and back."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from llm_trainer.config.errors import ConfigError, expectation, explain, fields_of
from llm_trainer.config.files import PathSequence
from llm_trainer.config.registry import import_plugins
from llm_trainer.config.schema import TrainConfig
from llm_trainer.config.table import ALGORITHMS, key_of


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with the numbers of YAML 1.2 (`1e-3` is a number), and no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


# PyYAML wants a dot and a signed exponent, and would read 1e-3 as text (https://yaml.org/spec/1.2.2/#1032-tag-resolution).
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)


class _Dumper(yaml.SafeDumper):
    """Lists on one line, sections over several, and floats that every YAML reader takes for numbers."""

    def represent_numbers(self, value: float) -> yaml.ScalarNode:
        mantissa, e, exponent = repr(value).partition("e")
        text = f"{mantissa}.0e{exponent}" if e and "." not in mantissa else repr(value)
        return self.represent_scalar("tag:yaml.org,2002:float", text)

    def represent_lists(self, value: Sequence[Any]) -> yaml.SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


_Dumper.add_representer(float, _Dumper.represent_numbers)
_Dumper.add_representer(list, _Dumper.represent_lists)
_Dumper.add_representer(tuple, _Dumper.represent_lists)


def _read(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{where}: not readable as YAML{line}: {error.problem}") from None
    except yaml.YAMLError as error:  # characters that no YAML may hold
        raise ConfigError(f"{where}: not readable as YAML: {str(error).splitlines()[0]}") from None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration in a YAML file; relative paths inside it are relative to the working directory.

    Args:
        path: the YAML file.
        overrides: `a.b=value` each, `value` read as YAML: `optim_config.initial_lr=1e-3`.

    Raises:
        ConfigError: when the file cannot be read, or a key or value cannot be meant.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a text file: {error}") from None
    values = _read(text, str(path))
    for override in overrides:
        _override(values, override)
    return parse(values, str(path))


def _override(values: Any, override: str) -> None:
    """Sets one `a.b=value` in nested dictionaries, making sections that are missing or null."""
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all([*sections, last]):
        raise ConfigError(f"override {override!r}: expected key=value, such as optim_config.initial_lr=1e-3")
    for depth, name in enumerate([*sections, last]):
        if not isinstance(values, dict):
            raise ConfigError(
                f"override {override!r}: {'.'.join(sections[:depth]) or 'the file'} is no section but {values!r}"
            )
        if depth < len(sections):
            values[name] = {} if values.get(name) is None else values[name]
            values = values[name]
    values[last] = _read(text, f"override {override!r}")


def parse(values: Any, where: str) -> TrainConfig:
    """A configuration from nested dictionaries.

    Args:
        values: what the YAML file says.
        where: the origin of the values, for error messages.

    Raises:
        ConfigError: with one line per mistake.
    """
    if isinstance(values, dict) and isinstance(values.get("plugins"), list):
        import_plugins(map(str, values["plugins"]), where)  # before the keys that they add are looked at
    try:
        return TypeAdapter(TrainConfig).validate_python(values)
    except ValidationError as error:
        raise explain(error, TrainConfig, where) from None


# Objects that have no place in a text file.
PYTHON_ONLY = {"init_state_dict", "teacher_logits_provider", "pixel_values_provider"}

PATH_OR_OBJECT = {"ref_model_checkpoint", "teacher_model"}  # which has a place there where it is a path


def _is_text(name: str, value: Any) -> bool:
    """Whether a key can be written down: weights and functions given as objects cannot."""
    return name not in PYTHON_ONLY and not (name in PATH_OR_OBJECT and not isinstance(value, str | None))


def _plain(value: Any) -> Any:
    """A configuration as dictionaries, lists and scalars."""
    if dataclasses.is_dataclass(value):
        values = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _plain(given) for name, given in values.items() if _is_text(name, given)}
    if isinstance(value, str | dict):
        return value
    if isinstance(value, PathSequence):
        return [value[index] for index in range(len(value))]
    return value


def _yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def dump_config(config: TrainConfig) -> str:
    """The configuration as YAML with every default written out; it loads back to the same run."""
    return _yaml(_plain(config))


def example(name: str, plugins: Sequence[str] = ()) -> str:
    """A complete YAML file for the algorithm called `name`, each key with its meaning beside it.

    Args:
        name: a key of the table of algorithms, such as `sft`.
        plugins: modules or .py files that register further algorithms.

    Raises:
        ConfigError: no algorithm has this name.
    """
    import_plugins(plugins, f"example {name}")
    if name not in ALGORITHMS:
        raise ConfigError(f"stage: got {name!r}, expected one of {', '.join(ALGORITHMS)}")
    values = {
        **ALGORITHMS[name].example,
        "plugins": list(plugins),
        "file_dataset": "data/train.jsonl",
        "eval_dataset": "data/eval.jsonl",
        "eval_prompts": ["Once upon a time"],
        key_of(name): {},
    }
    config = parse(values, f"example {name}")
    return "\n".join([f"# {name}: llm-trainer train run.yaml", *_commented(config, ""), ""])


def _commented(section: Any, indent: str) -> Iterator[str]:
    """One line per key, `key: value  # meaning`, and sections indented under their own line."""
    for name, field in fields_of(type(section)).items():
        value = getattr(section, name)
        if name in PYTHON_ONLY or (value is None and name.endswith("_config")):
            continue
        if dataclasses.is_dataclass(value):
            yield f"{indent}{name}:  # {field.description}"
            yield from _commented(value, indent + "  ")
        else:
            line = f"{indent}{name}: {_yaml([_plain(value)]).strip()[1:-1]}"
            choices = f" ({expectation(field)})" if "one of" in expectation(field) else ""
            yield f"{line:<40}  # {field.description}{choices}"
