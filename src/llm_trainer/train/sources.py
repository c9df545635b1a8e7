"""The data of a run: this rank's share of the training data, and of every validation set."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from llm_trainer.data.loaders import as_step_source
from llm_trainer.data.stream import StepSource
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings


def open_sources(
    train_loader: Any,
    val_loader: Any,
    settings: "Settings",
    engine: Engine,
    together: bool,
    sides: int,
    training: Mapping[str, Any],
) -> tuple[StepSource, dict[str, StepSource]]:
    """Step sources of what a trainer was given; of validation data by name.

    Args:
        train_loader: a step source, or a loader of the user's.
        val_loader: one, several by name, or None.
        settings: of the run.
        engine: executes the steps.
        together: whether several processes share the data.
        sides: see `Algorithm.sides`.
        training: further arguments of `as_step_source` for the training data.
    """
    ranks: dict[str, Any] = {"is_sharded": settings.loader_is_sharded, "sides": sides}
    if together:
        ranks |= {"rank": dist.rank(), "world_size": dist.world_size()}
        ranks["largest"] = partial(dist.largest, device=engine.device)
    budget = settings.micro_batch_tokens
    source = as_step_source(train_loader, micro_batch_tokens=budget, seed=settings.seed, **training, **ranks)

    loaders: Mapping[str, Any] = {} if val_loader is None else {"": val_loader}
    if isinstance(val_loader, Mapping):
        loaders = val_loader
    ranks["in_step"] = engine.in_lockstep
    if budget != "auto":
        ranks["micro_batch_tokens"] = None  # a number of the user's is for training
    val_sources = {}
    for name, loader in loaders.items():
        val_sources[name] = as_step_source(loader, name=f"val_loader {name}".strip(), **ranks)
    return source, val_sources
