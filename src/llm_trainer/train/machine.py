"""What an algorithm may ask of the machinery: see `algorithm.Machine`."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llm_trainer.engine.base import Engine
from llm_trainer.state import Progress
from llm_trainer.train.metrics import Metrics

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings


class RunMachine:
    """The machinery of one run, as its algorithm sees it."""

    def __init__(self, engine: Engine, settings: "Settings", progress: Progress, metrics: Metrics) -> None:
        self._engine, self._settings = engine, settings
        self._progress, self._metrics = progress, metrics

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self._engine.device

    @property
    def precision_name(self) -> str:
        """'fp32', 'bf16' or 'fp16'."""
        return self._engine.precision_name

    @property
    def seed(self) -> int:
        """Of the run; all noise follows from it."""
        return self._settings.seed

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._progress.step

    def place(self, frozen: nn.Module) -> None:
        """Place a frozen module as the trained one is: both must round alike, so it is compiled where that is."""
        if self._settings.compile:
            frozen.compile()
        self._engine.place(frozen)

    def generating(self) -> AbstractContextManager[None]:
        """The context in which the trained model itself may be called, with other lengths on every rank."""
        return self._engine.inference(alone=True)

    def record(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to a metric: its logged value is sum of totals / sum of counts, over steps and ranks."""
        self._metrics.add(name, total, count)
