"""Which engine of the table (`config.engines`) executes a run, and what drives it."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from llm_trainer.config.engines import ENGINES
from llm_trainer.config.env import environment
from llm_trainer.config.errors import is_installed, require
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine, EngineOptions
from llm_trainer.engine.device import choose_precision
from llm_trainer.engine.recompute import check_offload
from llm_trainer.engine.zero import complete, describe

if TYPE_CHECKING:
    from llm_trainer.config.options import Fsdp, Settings

OF_PARALLEL_TYPE = {"ds": "deepspeed", "ddp": "torch", "fsdp": "fsdp"}


def engine_name(name: str, *, fsdp: bool, deepspeed: bool, without_deepspeed: str = "stop") -> str:
    """Resolve 'auto': what PARALLEL_TYPE says, else the engine that options are given for, else 'torch'.

    PARALLEL_TYPE 'none', which launchers set for one process, names no engine: DeepSpeed runs in one process too.

    Args:
        name: 'auto' or a name in `ENGINES`.
        fsdp: whether options of FSDP are given.
        deepspeed: whether a configuration of DeepSpeed is given.
        without_deepspeed: what is done with that where DeepSpeed is not installed, see `Execution`.

    Raises:
        ConfigError: the engine, or what is configured, needs a package that is not installed.
    """
    if name == "auto":
        configured = "fsdp" if fsdp else "torch"
        if (
            deepspeed and without_deepspeed == "stop"
        ):  # also where a launcher has chosen an engine because it is missing
            require("deepspeed", "ds_config", "set run_config.without_deepspeed=leave_out to train without the section")
        if deepspeed and is_installed("deepspeed"):
            configured = "deepspeed"
        name = OF_PARALLEL_TYPE.get(environment().parallel_type or "", configured)
    package = ENGINES[name].package
    if package is not None:
        require(package, f"engine: {name}", "choose engine: torch")
    return name


def engine_of(settings: "Settings") -> str:
    """The engine that `settings` ask for, by name and never 'auto'."""
    return engine_name(
        settings.engine,
        fsdp=settings.fsdp is not None,
        deepspeed=settings.deepspeed is not None,
        without_deepspeed=settings.without_deepspeed,
    )


def left_out(settings: "Settings") -> str:
    """What is configured of DeepSpeed where another engine trains, and why; empty if nothing is."""
    engine = engine_of(settings)
    if settings.deepspeed is None or engine == "deepspeed":
        return ""
    reason, wanted = f"the engine is {engine}", environment().parallel_type
    if not is_installed("deepspeed"):
        reason = "DeepSpeed is not installed"
    elif OF_PARALLEL_TYPE.get(wanted or "") == engine:
        reason = f"PARALLEL_TYPE is {wanted}"
    return f"ds_config ({describe(settings.deepspeed)}), because {reason}"


def join_processes(device: torch.device, engine: str, fsdp: "Fsdp | None", timeout_s: float) -> None:
    """Join the processes that were started together, as the engine called `engine` needs them."""
    dist.start(device, timeout_s)
    if fsdp is not None and engine == "fsdp":
        dist.share_data(fsdp.tensor_parallel_size)


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

        config, _ = complete(deepspeed, chosen)
        check_arithmetic(config, device)


def choose_engine(settings: "Settings", device: torch.device, use_amp: bool, together: bool) -> Engine:
    """The engine that `settings` ask for.

    Args:
        use_amp: whether mixed precision may be used.
        together: whether this process trains with others.
    """
    name = engine_of(settings)
    check_offload(settings, device, name, settings.deepspeed)
    precision = choose_precision(settings.precision, device) if use_amp else "fp32"
    several = together and dist.num_processes() > 1
    options = EngineOptions(device, precision, several, settings.fsdp, settings.deepspeed)
    return _load(ENGINES[name].make)(options)


def choose_driver(settings: "Settings") -> Callable[..., None]:
    """What calls the steps of the engine that `settings` ask for."""
    return _load(ENGINES[engine_of(settings)].driver)


def _load(where: str) -> Any:
    """What `"module:name"` means."""
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
