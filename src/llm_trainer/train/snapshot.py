"""Everything of a run that a checkpoint holds, and how it gets there from all ranks.

What changes while a run goes on is a *part*: an object with `state_dict` and `load_state_dict`, in one mapping that is
saved and loaded alike, so that no part can be forgotten in one direction. Weights and optimizer belong to the engine.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llm_trainer import checkpoint
from llm_trainer.algorithm import Algorithm
from llm_trainer.checkpoint import CheckpointError, CheckpointManager
from llm_trainer.checkpoint.valid import step_folders
from llm_trainer.data.stream import StepSource, innermost
from llm_trainer.disk import DiskError, whole_file
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.lock import lock_of_run
from llm_trainer.model_group import weights_by_member
from llm_trainer.state import Progress
from llm_trainer.train.bases import Bases
from llm_trainer.train.configured import ConfiguredOptimizer
from llm_trainer.train.log_files import copy_logs
from llm_trainer.train.metrics import Metrics
from llm_trainer.train.model_facts import ModelFacts
from llm_trainer.train.saving import Saving, Wanted
from llm_trainer.train.work import Work

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings


class Part(Protocol):
    """What a checkpoint holds under one name."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> None: ...


@dataclass(frozen=True)
class SharedMetrics:
    """The metrics since the last log line: the sums over all ranks are saved, and each takes an equal share of them."""

    metrics: Metrics

    def state_dict(self) -> dict[str, list[float]]:
        return self.metrics.state_dict(dist.all_reduce)

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        self.metrics.load_state_dict(state, share=1 / dist.world_size())


class RandomState:
    """The random generators of this process."""

    def state_dict(self) -> dict[str, Any]:
        return checkpoint.random_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        checkpoint.set_random_state(state)


@dataclass(frozen=True)
class AlgorithmState:
    """What an algorithm itself must remember."""

    algorithm: Algorithm

    def state_dict(self) -> dict[str, Any]:
        return self.algorithm._get_extra_checkpoint_state() or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.algorithm._load_extra_checkpoint_state(state)


@dataclass(frozen=True)
class DataFacts:
    """What a position in the data means something for; a run with other data is refused.

    Attributes:
        source: of the steps.
        seed: of the order.
    """

    source: StepSource
    seed: int

    def state_dict(self) -> dict[str, Any]:
        return self._facts() | self.source.state_dict()

    def _facts(self) -> dict[str, Any]:
        return {"kind": type(innermost(self.source)).__name__, "size": self.source.size(), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        try:
            self.source.load_state_dict(state)  # first: it may know why the size is another
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        facts = self._facts()
        then = {name: state[name] for name in facts}
        if then != facts:
            raise CheckpointError(
                f"was made with other data ({then}, now {facts}), so its position in the data means "
                f"nothing here. Restore the data, or start a new run in another save_dir from these weights "
                f"(init_weights_path)"
            )


def parts_of(work: Work, progress: Progress, configured: ConfiguredOptimizer) -> dict[str, Part]:
    """Everything that changes while a run goes on, but weights and optimizer."""
    algorithm, source = work.algorithm, work.source
    parts: dict[str, Part] = {
        "data": DataFacts(source, work.seed),  # first: other data is refused
        "model_facts": ModelFacts(algorithm.base_model, algorithm.tokenizer),  # so is another meaning of the weights
        "progress": progress,
        "engine": work.engine,
        "budget": work.budget,
        "compiling": work.compiling,
        "metrics": SharedMetrics(work.metrics),
        "random": RandomState(),
        "trainer": AlgorithmState(algorithm),
        "regulariser": algorithm.regulariser,
    }
    if work.engine.held is not None:
        parts["reference"] = work.engine.held
    if algorithm.scheduler is not None:
        parts["scheduler"] = algorithm.scheduler
    return parts | {"configured": configured}  # last: it decides between what is loaded and what is configured


def state_of(work: Work, progress: Progress, configured: ConfiguredOptimizer, settings: "Settings") -> dict[str, Any]:
    """All that a checkpoint holds but the weights; all ranks collect it together."""
    engine = work.engine
    state = {name: part.state_dict() for name, part in parts_of(work, progress, configured).items()}
    return state | {
        "optimizer": engine.optimizer_state(),
        "versions": {"torch": torch.__version__, "world_size": dist.world_size(), "engine": type(engine).__name__},
        "ledger": [ledger.as_dict() for ledger in settings.ledgers],
        "config": settings.description,
    }


def ways_on(resume: str) -> str:
    """How a run goes on from its newest checkpoint, in words; `resume`: the option."""
    return "the same command goes on from it" if resume == "auto" else "load_checkpoint goes on from it"


class Checkpoints:
    """The checkpoints of one run; all ranks call it together, unless said otherwise.

    Args:
        engine: gathers and restores weights and optimizer state.
        save_dir: their folder; also of best_model.pt, and of the shards of a save in progress.
        keep: newest checkpoints that rotation leaves.
        warn: called with a message about damaged checkpoints that are skipped.
    """

    def __init__(self, engine: Engine, save_dir: Path, keep: int, warn: Callable[[str], None]) -> None:
        self.engine, self.save_dir = engine, save_dir
        self._keep, self._warn = keep, warn
        self._manager: CheckpointManager | None = None
        self._lock, self._is_alone = lock_of_run(save_dir), False
        self._just_verified: str | None = None
        self.bases = Bases(engine, save_dir, warn)
        self.saving = Saving(engine, self.bases, save_dir, lambda: self.manager, warn)

    @property
    def manager(self) -> CheckpointManager:
        """The folder's manager (made at first use, on the main process only)."""
        if self._manager is None:
            self._manager = CheckpointManager(self.save_dir, self._keep, self._warn)
        return self._manager

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The context in which no other run writes into the folder; all ranks of this one share it.

        Raises:
            LockedError: another run is at work there.
            CheckpointError: the folder cannot be written.
        """
        if self._is_alone:
            yield
            return
        with dist.main_process_first():
            if dist.is_main():
                try:
                    self._lock.acquire(say=self._warn)
                except DiskError as error:
                    raise CheckpointError(str(error)) from error
        self._is_alone = True
        try:
            yield
        finally:
            self._is_alone = False
            self._lock.release()

    # Finding.

    def newest(self) -> str | None:
        """Path of the newest valid checkpoint."""
        found = None
        if dist.is_main() and self.save_dir.is_dir():
            newest = self.manager.latest()
            self._just_verified = found = None if newest is None else str(newest)
        return dist.gather_patiently(found)[0]

    def newest_for_messages(self) -> str:
        """The newest valid checkpoint, as the main process sees it; any rank may ask alone."""
        found = self.manager.latest("sizes") if dist.is_main() else None
        return "none" if found is None else str(found)

    def how_to_go_on(self, resume: str) -> str:
        """For the message of a run that a lost rank stops; any rank may ask alone."""
        newest = next(iter(step_folders(self.save_dir)), None) if self.save_dir.is_dir() else None
        if newest is None:
            return "Of this run, no checkpoint yet"
        return f"Of this run, the newest checkpoint is {newest}; {ways_on(resume)}"

    def describe(self, configuration: str) -> None:
        """Put the configuration, if there is one, beside the checkpoints, which hold it as well."""
        if not configuration or not dist.is_main():
            return
        try:
            with whole_file(self.save_dir / "config.yaml") as partial:
                partial.write_text(configuration, encoding="utf-8")
        except DiskError as error:
            self._warn(f"{error}. Training goes on without it")

    def set_later_aside(self, step: int, log_dir: Path) -> None:
        """Move checkpoints of later steps out of the way: they are of another run, or damaged. Copies of its logs go along."""
        moved = self.manager.set_aside(after=step) if dist.is_main() else None
        if moved is not None:
            count, folder = moved
            checkpoints = "1 later checkpoint was" if count == 1 else f"{count} later checkpoints were"
            self._warn(f"this run starts at step {step}; {checkpoints} moved to {folder}")
            try:
                copy_logs(log_dir, self.save_dir, folder / "log")
            except OSError as error:
                self._warn(f"the logs of later steps could not be copied there, and are cut off: {error}")

    def publish(self) -> None:
        """Let `save_dir`/model be the best model."""
        if not dist.is_main():
            return
        try:
            self.manager.publish()
        except DiskError as error:
            self._warn(f"{error}. The checkpoints are complete: use the model of one of them")

    # Loading.

    def load(self, path: str, model: nn.Module, parts: Mapping[str, Part]) -> None:
        """Restore weights, optimizer and all parts from a checkpoint folder or `.pt` file.

        Args:
            path: of it.
            model: whose weights the engine has.
            parts: everything else.

        Raises:
            CheckpointError: It is damaged, does not fit this run, or was not made by a trainer.
        """
        path = self._verified(path)
        self.bases.check(path)
        state = self.engine.load(path)
        self.bases.loaded(path, model)
        if "progress" not in state:
            raise CheckpointError(
                f"{path} holds no progress of a run: it was not made by a trainer. For its weights alone call "
                f"checkpoint.load_checkpoint(path, model=...), or set init_weights_path"
            )
        for name in ("configured", "budget", "compiling", "model_facts", "regulariser"):
            state.setdefault(name, None)  # checkpoints of earlier versions do not say
        missing = next((name for name in parts if name not in state), None)
        if missing is not None:
            raise CheckpointError(
                f"'{path}' holds no {missing} state, which this run has; for its weights alone set init_weights_path"
            )
        for name, part in parts.items():
            try:
                part.load_state_dict(state[name])
            except CheckpointError as error:
                raise CheckpointError(f"{path} {error}") from error

    def _verified(self, path: str) -> str:
        """The checkpoint folder or file that `path` means; the main process has compared all of it with its hashes."""
        failure = None
        if dist.is_main():
            try:
                if path != self._just_verified:
                    path = str(checkpoint.verified(path, with_state=True))
            except CheckpointError as error:
                failure = str(error)
        path, failure = dist.gather_patiently((path, failure))[0]
        if failure is not None:
            raise CheckpointError(failure)
        return path

    # Saving; folders by `saving`.

    @contextmanager
    def saved_at_the_end(self) -> Iterator[None]:
        """However the block ends, what is being saved is then on the disk. An error of that is told, not raised."""
        try:
            yield
        finally:
            try:
                self.saving.close()
            except Exception as error:  # what ended the block matters more
                self._warn(str(error))

    def finish_last(self) -> None:
        """Wait for the save before; that it could not be written is a warning, for another one follows."""
        try:
            self.saving.finish()
        except CheckpointError as error:
            self._warn_of_save(error)

    def save(self, algorithm: Algorithm, state: dict[str, Any], wanted: Wanted, may_fail: bool) -> str:
        """Write a folder; its path, on every rank, or where a failed save is only a warning, an empty one.

        Raises:
            CheckpointError: It could not be written, and must be.
        """
        try:
            with self.alone():
                return self.saving.save(algorithm, state, wanted)
        except CheckpointError as error:
            if not may_fail:
                raise
            self._warn_of_save(error)
            return ""

    def _warn_of_save(self, error: CheckpointError) -> None:
        self._warn(f"{error}. Training goes on; the next save is tried as planned")

    def save_file(self, path: str, model: nn.Module, state: dict[str, Any]) -> str:
        """Write everything into a single `.pt` file.

        Args:
            path: of it.
            model: whose weights the engine has.
            state: see `state_of`.

        Raises:
            CheckpointError: It could not be written.
        """
        self.saving.finish()
        weights, gathered = self.engine.weights(), _gathered(state)
        failure = None
        if dist.is_main():
            try:
                path = str(checkpoint.write_file(path, weights_by_member(model, weights), gathered))
            except CheckpointError as error:
                failure = str(error)
        for found in dist.gather_patiently(failure):
            if found is not None:
                raise CheckpointError(found)
        return path


def _gathered(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with every sharded tensor whole, on the main process; the other ranks only help."""
    tensors: dict[str, Tensor] = {}
    plain = {name: checkpoint.set_tensors_aside(part, name, tensors) for name, part in state.items()}
    for name, tensor in tensors.items():
        full = checkpoint.full_tensor(tensor)
        if full is not tensor and dist.is_main():
            full = full.cpu()
        tensors[name] = full
    if not dist.is_main():
        return {}
    return {name: checkpoint.restore(part, tensors) for name, part in plain.items()}
