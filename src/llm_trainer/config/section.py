"""What makes a class a section of the configuration."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from llm_trainer.config.errors import explain

S = TypeVar("S")


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
def config_section(cls: type[S]) -> type[S]:
    """Makes a keyword-only dataclass that checks what it is built from and raises `ConfigError` in our words."""
    section: Any = dataclass(cls, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
    checked_init = section.__init__

    @functools.wraps(checked_init)
    def init(self: Any, *args: Any, **values: Any) -> None:
        try:
            checked_init(self, *args, **values)
        except ValidationError as error:
            raise explain(error, section, cls.__name__) from None

    section.__init__ = init
    return cast(type[S], section)
