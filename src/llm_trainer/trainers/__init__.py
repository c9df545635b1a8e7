"""One file per algorithm, and the visible dict of them all."""

from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trainer.trainers.base import BaseTrainer

TRAINERS = {  # name -> module and class
    "pretrain": "llm_trainer.trainers.language:Trainer",
    "sft": "llm_trainer.trainers.language:SFTTrainer",
    "dpo": "llm_trainer.trainers.preference:DPOTrainer",
    "kto": "llm_trainer.trainers.unpaired:KTOTrainer",
    "reward": "llm_trainer.trainers.reward:RewardTrainer",
}


def get_trainer_class(name: str) -> "type[BaseTrainer]":
    """The trainer called `name`, whatever its case.

    Raises:
        ValueError: no trainer has this name; the message lists the known ones.
    """
    target = TRAINERS.get(name.lower())
    if target is None:
        near = get_close_matches(name.lower(), TRAINERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown trainer {name!r}: known are {', '.join(sorted(TRAINERS))}{hint}")
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def create_trainer(name: str, **kwargs: Any) -> "BaseTrainer":
    """`get_trainer_class(name)(**kwargs)`."""
    return get_trainer_class(name)(**kwargs)
