"""One file per algorithm; `config.table` lists them all."""

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from llm_trainer.config.table import ALGORITHMS as TRAINERS

if TYPE_CHECKING:
    from llm_trainer.trainers.base import BaseTrainer


def get_trainer_class(name: str) -> "type[BaseTrainer]":
    """The trainer called `name`, whatever its case.

    Raises:
        ValueError: no trainer has this name; the message lists the known ones.
    """
    known = TRAINERS.get(name.lower())
    if known is None:
        near = get_close_matches(name.lower(), TRAINERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown trainer {name!r}: known are {', '.join(sorted(TRAINERS))}{hint}")
    return known.load()


def create_trainer(name: str, **kwargs: Any) -> "BaseTrainer":
    """`get_trainer_class(name)(**kwargs)`."""
    return get_trainer_class(name)(**kwargs)
