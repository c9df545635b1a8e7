"""What a driver is given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llm_trainer.algorithm import Algorithm
from llm_trainer.data.stream import StepSource
from llm_trainer.engine.base import Engine
from llm_trainer.state import Horizon
from llm_trainer.train.budget import Budget
from llm_trainer.train.compiling import Compiling
from llm_trainer.train.hooks import RunView
from llm_trainer.train.metrics import Metrics


@dataclass(frozen=True)
class Work:
    """What is trained, on what, from which data.

    Attributes:
        algorithm: says what the loss is.
        engine: executes forward, backward and update.
        source: where optimizer steps come from.
        val_sources: validation data by name.
        budget: how many tokens a micro-batch may have.
        compiling: whether the model is compiled.
        metrics: what the algorithm records, unless the micro-batch is a filler.
        horizon: how far the run goes.
        run: for drivers of other libraries, which may ask it to evaluate or save.
        stop_requested: whether this process has been asked to stop.
        seed: all noise follows from it.
        max_grad_norm: the gradient is scaled down to this norm; 0 does not clip.
    """

    algorithm: Algorithm
    engine: Engine
    source: StepSource
    val_sources: Mapping[str, StepSource]
    budget: Budget
    compiling: Compiling
    metrics: Metrics
    horizon: Horizon
    run: RunView
    stop_requested: Callable[[], bool]
    seed: int
    max_grad_norm: float
