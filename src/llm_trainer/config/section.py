"""What makes a class a section of the configuration, and how a section gains a field."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass, rebuild_dataclass
from pydantic_core import ArgsKwargs

from llm_trainer.config.errors import explain, fields_of, has_choice

S = TypeVar("S")


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
def config_section(cls: type[S]) -> type[S]:
    """Makes a keyword-only dataclass that checks what it is built from and raises `ConfigError` in our words.

    None is the default of a key for which it means nothing of its own; so is a word that the class names in `means_default`.
    """
    cls.means_default = getattr(cls, "means_default", ())  # type: ignore[attr-defined]
    cls._defaults_by_name = model_validator(mode="before")(_leave_defaults_out)  # type: ignore[attr-defined]
    section: Any = dataclass(cls, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
    section.__init__ = _in_our_words(section)
    return cast(type[S], section)


@classmethod  # type: ignore[misc]
def _leave_defaults_out(cls: Any, given: Any) -> Any:
    """What a section is built from, without the keys for which nothing was chosen."""
    values = given.kwargs if isinstance(given, ArgsKwargs) and not given.args else given
    if not isinstance(values, Mapping):
        return given
    return {name: value for name, value in values.items() if not _means_default(cls, name, value)}


def _means_default(section: Any, name: str, value: Any) -> bool:
    """Whether `value` says that nothing was chosen for the key `name`."""
    field = fields_of(section).get(name)
    if field is None or field.is_required():
        return False
    if value is not None and not (isinstance(value, str) and value in section.means_default):
        return False
    return not has_choice(field, value)


def _in_our_words(section: Any) -> Callable[..., None]:
    """The `__init__` of a section that pydantic has just made, with `ConfigError` in place of its errors."""
    checked_init = section.__init__

    @functools.wraps(checked_init)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            checked_init(self, *args, **values)
        except ValidationError as error:
            raise explain(error, section, section.__name__) from None

    return init


def add_section(whole: type, key: str, section: type, description: str) -> None:
    """Give the section `whole` one more field, `key: section | None = None`, as if its class stated it.

    pydantic builds its validator from `__dataclass_fields__`, and can build it again.
    """
    field: Any = dataclasses.field(default=Field(default=None, description=description), kw_only=True)
    field.name, field.type = key, section | None
    field._field_type = dataclasses._FIELD  # type: ignore[attr-defined]  # what `dataclasses.fields` looks at
    whole.__annotations__[key] = section | None
    whole.__dataclass_fields__[key] = field  # type: ignore[attr-defined]
    setattr(whole, key, None)
    rebuild_dataclass(whole, force=True)  # type: ignore[arg-type]
    whole.__init__ = _in_our_words(whole)  # type: ignore[misc]
