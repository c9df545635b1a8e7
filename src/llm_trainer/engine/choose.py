"""Which engine a run is executed by."""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from llm_trainer.config.env import environment
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.device import choose_precision
from llm_trainer.engine.torch import TorchEngine

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings

ENGINES = ("auto", "torch", "fsdp", "deepspeed", "hf")
OF_PARALLEL_TYPE = {"ds": "deepspeed", "ddp": "torch", "fsdp": "fsdp", "none": "torch"}


def engine_name(name: str, *, fsdp: bool, deepspeed: bool) -> str:
    """Resolve 'auto': what PARALLEL_TYPE says, else the engine that options are given for, else 'torch'.

    Args:
        name: one of `ENGINES`.
        fsdp: whether options of FSDP are given.
        deepspeed: whether a configuration of DeepSpeed is given.

    Raises:
        ValueError: `name` is unknown.
    """
    if name not in ENGINES:
        raise ValueError(f"engine: got {name!r}, expected one of {', '.join(ENGINES)}")
    wanted = OF_PARALLEL_TYPE.get(environment().parallel_type or "")
    if name == "auto":
        name = wanted or ("deepspeed" if deepspeed else "fsdp" if fsdp else "torch")
    return name


def engine_of(settings: "Settings") -> str:
    """The engine that `settings` ask for, by name and never 'auto'."""
    return engine_name(settings.engine, fsdp=settings.fsdp is not None, deepspeed=settings.deepspeed is not None)


def check_precision(
    engine: str, precision: str, deepspeed: Mapping[str, Any] | None, device: torch.device, use_amp: bool = True
) -> None:
    """Refuse arithmetic that this machine does not have, before anything is read, tokenized or built.

    Args:
        engine: its name, never 'auto'.
        precision: as it was asked for.
        deepspeed: DeepSpeed's JSON, if any.
        use_amp: whether mixed precision may be used.

    Raises:
        ValueError: (or a subclass) this device, or DeepSpeed on it, does not compute in that precision.
    """
    chosen = choose_precision(precision, device) if use_amp else "fp32"
    if engine == "deepspeed":
        from llm_trainer.engine.deepspeed import check_arithmetic
        from llm_trainer.engine.zero import complete

        config, _ = complete(deepspeed or {}, chosen)
        check_arithmetic(config, device)


def _is_not_about_its_choice(record: logging.LogRecord) -> bool:
    """Whether a line of DeepSpeed's log says more than which kind of device it has found."""
    return "Setting accelerator to" not in record.getMessage()


def choose_engine(settings: "Settings", device: torch.device, use_amp: bool, together: bool) -> Engine:
    """The engine that `settings` ask for.

    Args:
        use_amp: whether mixed precision may be used.
        together: whether this process trains with others.
    """
    name = engine_of(settings)
    precision = choose_precision(settings.precision, device) if use_amp else "fp32"
    if name == "hf":  # transformers' Trainer imports DeepSpeed where it is installed, and this run does not use it
        logging.getLogger("DeepSpeed").addFilter(_is_not_about_its_choice)
    several = together and dist.num_processes() > 1
    if name == "fsdp" and several:
        from llm_trainer.config.options import Fsdp
        from llm_trainer.engine.fsdp import FsdpEngine

        return FsdpEngine(device, precision, settings.fsdp or Fsdp())
    if name == "deepspeed":
        from llm_trainer.config.deepspeed import DsConfig
        from llm_trainer.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(
            device, precision, DsConfig().to_json() if settings.deepspeed is None else settings.deepspeed
        )
    return TorchEngine(device, precision, ddp=several and name != "hf")  # transformers' Trainer wraps by itself
