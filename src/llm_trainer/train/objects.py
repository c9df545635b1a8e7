"""What a user hands over as objects: each is of the kind that its name says, or the message says what it is instead."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from torch import nn

PATHS = (str, PurePath)
PLAIN = (bool, int, float, bytes, type, *PATHS)


class _Kind(NamedTuple):
    """
    Attributes:
        fits: whether an object is of it.
        words: what it is, for the message.
    """

    fits: Callable[[Any], bool]
    words: str


def _is_model(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _is_no_path(value: Any) -> bool:
    return not isinstance(value, PATHS)


def _is_no_class(value: Any) -> bool:
    return not isinstance(value, type)


def _is_no_plain_value(value: Any) -> bool:
    return not isinstance(value, PLAIN)


def _is_path(value: Any) -> bool:
    return isinstance(value, PATHS) or hasattr(value, "__fspath__")


def _has_steps(value: Any) -> bool:
    return _is_no_plain_value(value) and hasattr(value, "step")


def _generates(value: Any) -> bool:
    return _is_no_plain_value(value) and hasattr(value, "generate")


def _are_hooks(value: Any) -> bool:
    return _is_no_plain_value(value) and isinstance(value, Sequence) and all(hasattr(hook, "call") for hook in value)


_MODEL = _Kind(_is_model, "a model that is loaded, a torch.nn.Module")
_LOADER = _Kind(
    _is_no_path,
    "an iterable of micro-batches, such as a DataLoader or a list; the path of a file belongs in a configuration",
)
KINDS = {
    "model": _MODEL,
    "ref_model": _MODEL,
    "reward_model": _MODEL,
    "value_model": _MODEL,
    "teacher_model": _MODEL,
    "train_loader": _LOADER,
    "val_loader": _LOADER,
    "ptx_loader": _LOADER,
    "scheduler": _Kind(_has_steps, "a schedule with a method step, as those of torch.optim.lr_scheduler"),
    "tokenizer": _Kind(
        _is_no_plain_value, "a tokenizer or processor that is loaded, as by AutoTokenizer.from_pretrained"
    ),
    "generation_service": _Kind(
        _generates, "an object with the methods of llm_trainer.generation.service.GenerationService"
    ),
    "reward_func": _Kind(_is_no_class, "a function, or an object that can be called"),
    "hooks": _Kind(_are_hooks, "a list of llm_trainer.Hook"),
    "save_dir": _Kind(_is_path, "the path of a folder"),
}


def check_objects(trainer: str, given: Mapping[str, Any]) -> None:
    """Look at what a trainer is made of, before anything is made of it.

    Args:
        trainer: its name.
        given: arguments by their names; None is left to who takes it, but for the model.

    Raises:
        TypeError: one is of another kind.
    """
    for name, value in given.items():
        kind = KINDS.get(name)
        may_be_none = value is None and name != "model"
        if kind is None or may_be_none or kind.fits(value):
            continue
        found = type(value).__name__
        if isinstance(value, type):
            found = f"the class {value.__name__}, which is not an object yet"
        elif isinstance(value, PLAIN):
            found = f"the {found} {value!r}"
        raise TypeError(f"{trainer}: {name}: got {found}; expected {kind.words}")
