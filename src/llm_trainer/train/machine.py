"""What an algorithm may ask of the machinery: see `machine.Machine`."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.checkpoint.valid import step_folders, step_of
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.device import DTYPES
from llm_trainer.engine.score import Columns, Scoring
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import GenerationService
from llm_trainer.generation.verify import Hashes, Verified, joint_hash
from llm_trainer.layout import Layout, Packing
from llm_trainer.state import Progress
from llm_trainer.train.budget import Budget
from llm_trainer.train.compiling import Compiling
from llm_trainer.train.metrics import Metrics
from llm_trainer.train.rows import LaidOut

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings


class RunMachine:
    """The machinery of one run, as its algorithm sees it: `machine.Machine` says what each member means.

    Attributes:
        trainer: the algorithm.
        budget: of its micro-batches; there as soon as the data is.
        rows: how they are laid out; there as soon as the data is.
    """

    trainer: Algorithm
    budget: Budget
    rows: LaidOut

    def __init__(
        self,
        engine: Engine,
        settings: "Settings",
        compiling: Compiling,
        progress: Progress,
        metrics: Metrics,
        save_dir: Path,
        stop_requested: Callable[[], bool],
        say: Callable[[str], None],
    ) -> None:
        self._engine, self._settings, self._compiling = engine, settings, compiling
        self._progress, self._metrics = progress, metrics
        self.save_dir, self.stop_requested, self.say = save_dir, stop_requested, say

    @property
    def device(self) -> torch.device:
        return self._engine.device

    @property
    def precision_name(self) -> str:
        return self._engine.precision_name

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self._engine.precision_name]

    @property
    def seed(self) -> int:
        return self._settings.seed

    @property
    def begins_anew(self) -> bool:
        return self._settings.resume == "never" and self._progress.step == 0

    @property
    def step(self) -> int:
        return self._progress.step

    @property
    def max_steps(self) -> int | None:
        return self._settings.max_steps

    @property
    def is_distributed(self) -> bool:
        return dist.num_processes() > 1

    @property
    def rank(self) -> int:
        return dist.rank()

    @property
    def world_size(self) -> int:
        return dist.world_size()

    @property
    def process_number(self) -> int:
        return dist.process_number()

    @property
    def num_processes(self) -> int:
        return dist.num_processes()

    @property
    def is_main(self) -> bool:
        return dist.is_main()

    @property
    def layout(self) -> Layout:
        return self.rows.layout

    @property
    def shows_images(self) -> bool:
        return self.rows.shows_images

    def reads_rows(self, try_out: Callable[[], Packing]) -> None:
        with dist.on_duty(str):  # the main process says it to the others
            self.rows.reads_rows(try_out)

    def place(self, frozen: nn.Module) -> None:
        self._compiling.add(frozen)
        if not self._engine.in_lockstep:
            return self._engine.place(frozen)
        with dist.on_duty(str):  # it is sharded, for which all ranks are needed
            self._engine.place(frozen)

    def follow(self, frozen: nn.Module, weight: float) -> None:
        if frozen is self.trainer.base_model and self._engine.held is not None:
            self._engine.held.follow(weight)
        else:
            self._engine.follow(frozen, weight)

    def hold(
        self, parameters: Mapping[str, nn.Parameter], caller: nn.Module
    ) -> Callable[[], AbstractContextManager[None]]:
        return self._engine.hold(parameters, caller).in_place

    @contextmanager
    def generating(self) -> Iterator[GenerationService]:
        engine, model = self._engine, self.trainer.base_model
        weights_share, _, _ = engine.shard_fractions()
        if weights_share == 1:
            with engine.precision():
                yield InProcess(model)
            return
        service = Verified(InProcess(model, self.dtype))
        service.load(self.stream_weights(service.dtype), self.step)
        yield service

    def stream_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        return self._engine.stream_weights(dtype)

    @torch.no_grad()
    def score(
        self, dataset: Any, collate: Callable[[list[Any]], Any], function: Callable[[Any], Mapping[str, Tensor]]
    ) -> Columns:
        scoring = Scoring(self._engine, self.trainer.model, self.budget.tokens, self.say, self.stop_requested)
        with self._metrics.set_aside():
            return scoring(dataset, collate, function)

    def weights_hash(self) -> str:
        hashes = Hashes()
        for name, tensor in self._engine.stream_weights(every_model=True):
            hashes.note(name, tensor)
        return joint_hash(hashes.read())

    def gather(self, value: object) -> list[Any]:
        return dist.gather_patiently(value)

    def checkpoint_steps(self) -> tuple[list[int], list[int]]:
        steps = [step_of(path) for path in step_folders(self.save_dir)]
        recent = self._settings.checkpoints_to_keep
        return steps[:recent], steps[recent:]

    @property
    def is_recording(self) -> bool:
        return self._metrics.is_recording

    def record(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        self._metrics.add(name, total, count)
