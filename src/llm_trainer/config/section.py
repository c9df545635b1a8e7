"""What makes a class a section of the configuration, and how a section gains a field."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass, rebuild_dataclass

from llm_trainer.config.errors import explain

S = TypeVar("S")


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
def config_section(cls: type[S]) -> type[S]:
    """Makes a keyword-only dataclass that checks what it is built from and raises `ConfigError` in our words."""
    section: Any = dataclass(cls, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
    section.__init__ = _in_our_words(section)
    return cast(type[S], section)


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
