"""Reward functions by name, as a configuration gives them: those that are built in, and those of a file of the user."""

import difflib
import importlib
import importlib.util
import inspect
import reprlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.registry import is_missing
from llm_trainer.rewards.answers import ExactMatch, MathVerify, Numeric
from llm_trainer.rewards.calling import in_words, place_of
from llm_trainer.rewards.code import CodeTests
from llm_trainer.rewards.judge import Judge
from llm_trainer.rewards.shape import Format, Overlong

BUILT_IN: dict[str, Callable[..., Callable[..., Any]]] = {
    "exact_match": ExactMatch,
    "numeric": Numeric,
    "math_verify": MathVerify,
    "format": Format,
    "overlong": Overlong,
    "code": CodeTests,
    "judge": Judge,
}
_OF_THE_ENTRY = ("name", "weight", "label")


class Named(NamedTuple):
    """A reward function as a configuration names it.

    Attributes:
        label: What it is called in metrics and messages.
        function: To call.
        weight: Of its values in the sum.
    """

    label: str
    function: Callable[..., Any]
    weight: float


def named(entry: str | Mapping[str, Any]) -> Named:
    """A reward function.

    Args:
        entry: a name, or a mapping of `name`, and where wanted `weight`, `label` and the function's options. The name is one of
            `BUILT_IN`, `file.py:function`, or `module:function`.

    Raises:
        ConfigError: there is no such function, or it has no such option.
    """
    options = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = options.get("name")
    if not isinstance(name, str):
        raise ConfigError(f"rewards: got {entry!r}, expected the name of a function, or a mapping with the key name")
    weight, label = options.get("weight", 1.0), options.get("label")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"rewards: {name}: got the weight {weight!r}, expected a number")
    own = {key: value for key, value in options.items() if key not in _OF_THE_ENTRY}
    if ":" in name:
        return Named(label or name.rpartition(":")[2], _imported(name, own), float(weight))
    if name not in BUILT_IN:
        raise ConfigError(
            f"rewards: got {name!r}, expected one of {', '.join(BUILT_IN)}, or your own as file.py:function or module:function"
        )
    return Named(label or name, _made(name, BUILT_IN[name], own), float(weight))


def several(entries: Sequence[str | Mapping[str, Any]]) -> tuple[dict[str, Callable[..., Any]], dict[str, float]]:
    """The functions of a configuration and their weights, by label.

    Raises:
        ConfigError: a function cannot be made, or two have one label.
    """
    functions: dict[str, Callable[..., Any]] = {}
    weights: dict[str, float] = {}
    for entry in entries:
        one = named(entry)
        if one.label in functions:
            raise ConfigError(f"rewards: two functions are called {one.label}; give one of them another label")
        functions[one.label], weights[one.label] = one.function, one.weight
    return functions, weights


def _made(name: str, make: Callable[..., Callable[..., Any]], options: Mapping[str, Any]) -> Callable[..., Any]:
    known = inspect.signature(make).parameters
    unknown = [key for key in options if key not in known]
    missing = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in options]
    if unknown or missing:
        wrong = [*(f"got the option {key}" for key in unknown), *(f"the option {key} is missing" for key in missing)]
        raise ConfigError(f"rewards: {name}: {', '.join(wrong)}; expected {', '.join(known)}")
    return make(**options)


def _imported(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    """A function of the user; options are keywords of a function, or of the class that makes one."""
    found = imported("rewards", name)
    if isinstance(found, type):
        try:
            return found(**options)  # type: ignore[no-any-return]
        except Exception as error:
            said = ", ".join(f"{key}={value!r}" for key, value in options.items())
            raise ConfigError(
                f"rewards: {name}({said}) raised {in_words(error)}; expected the keywords that the class takes"
            ) from error
    if options:
        raise ConfigError(
            f"rewards: {name}: got options ({', '.join(options)}); only a class, which makes the function, takes them"
        )
    return found


def imported(key: str, name: str) -> Any:
    """What the user calls `file.py:function` or `module:function`, in the configuration's `key`.

    Raises:
        ConfigError: there is no such function.
    """
    place, _, attribute = name.rpartition(":")
    if not place:
        raise ConfigError(f"{key}: got {name!r}, expected file.py:{name} or module:{name}")
    module = _file(key, Path(place)) if place.endswith(".py") else _module(key, place)
    found = getattr(module, attribute, None)
    if found is None:
        near = difflib.get_close_matches(attribute, vars(module), n=1)
        hint = "".join(f"; did you mean {place}:{other}?" for other in near)
        raise ConfigError(f"{key}: {name}: {place} has no function {attribute}{hint}")
    if not callable(found):
        raise ConfigError(f"{key}: {name}: found {reprlib.repr(found)}, expected a function, or a class that makes one")
    return found


def _file(key: str, path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {path} ({path.absolute()})")
    spec = importlib.util.spec_from_file_location(f"_{key}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with _explained(key, str(path)):
        spec.loader.exec_module(module)
    return module


def _module(key: str, name: str) -> Any:
    with _explained(key, name):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not is_missing(name, error):
                raise  # it is there, and something that it imports is not
    raise ConfigError(
        f"{key}: there is no module {name}; expected one that Python finds (PYTHONPATH), or the path of a .py file"
    )


@contextmanager
def _explained(key: str, name: str) -> Iterator[None]:
    """The context in which the user's code is imported.

    Raises:
        ConfigError: it raises.
    """
    try:
        yield
    except SyntaxError as error:
        where = f"{error.filename}, line {error.lineno}"
        raise ConfigError(f"{key}: {name} is no Python that can be read: {error.msg} ({where})") from error
    except Exception as error:
        raise ConfigError(f"{key}: {name} cannot be imported: it raised {in_words(error)}{place_of(error)}") from error
