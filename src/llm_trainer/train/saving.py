"""How a checkpoint gets onto the disk: collected by all ranks together, then written, while training goes on if it may.

Two phases. The first needs all ranks and stands in the way of training: weights and state are collected and, for a save
in the background, copied into host memory. The second needs nothing but these copies: a thread on every rank that has
something to write does so, and the main process makes a checkpoint of it, publishes it and rotates. Nothing differs in the
files. One save at a time: the next one waits, and so does the end of the run, however it comes.
"""

import os
import shutil
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_trainer import checkpoint
from llm_trainer.algorithm import Algorithm
from llm_trainer.checkpoint import CheckpointError, CheckpointManager
from llm_trainer.checkpoint.adapter_bases import Base
from llm_trainer.checkpoint.copies import HostMemory, fits
from llm_trainer.checkpoint.folders import group_files
from llm_trainer.checkpoint.state import StateFiles
from llm_trainer.checkpoint.tensor_files import Shard, own_shard, shard_files, write_files
from llm_trainer.checkpoint.valid import Written, link_files
from llm_trainer.checkpoint.weights import ModelFiles
from llm_trainer.disk import storage_failure
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.room import free_memory
from llm_trainer.model_group import weights_by_member
from llm_trainer.train.bases import Bases

BestWeights = dict[str, dict[str, Tensor]]  # name of a model -> its tensors by name


@dataclass(frozen=True)
class Wanted:
    """What is asked of one save.

    Attributes:
        step: of the checkpoint.
        is_best: this is the best one so far.
        best_loss: of it; None: nothing was measured, or it is not the best.
        best_file: write best_model.pt too.
        background: let it be written while training goes on, from copies; how that ends is said by `Saving.finish`.
        beside: further small files, by their path in the checkpoint.
    """

    step: int
    is_best: bool
    best_loss: float | None
    best_file: bool
    background: bool
    beside: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Collected:
    """All that this process writes of one checkpoint.

    Attributes:
        wanted: what was asked for.
        texts: the state without its tensors, by file.
        shards: what this process holds of the state's tensors.
        model: the folders of the models; None but on the main process.
        best_weights: of best_model.pt, by model; None: it is not written.
        bases: what the models with adapters stand on, whose base is not in `best_weights`.
        apart: the folder that the other ranks write their shards into; None: they have none.
    """

    wanted: Wanted
    texts: dict[str, str]
    shards: dict[str, Shard]
    model: ModelFiles | None
    best_weights: BestWeights | None
    bases: dict[str, Base]
    apart: Path | None


class Saving:
    """The saves of one run, one at a time.

    Args:
        engine: collects weights and state.
        bases: of models with adapters, which checkpoints may leave out.
        save_dir: of the run; best_model.pt lies there, and what other ranks have written of a save in progress.
        manager: of its checkpoints; asked for on the main process only.
        say: called with one line when there is no memory for a save in the background.
    """

    def __init__(
        self,
        engine: Engine,
        bases: Bases,
        save_dir: Path,
        manager: Callable[[], CheckpointManager],
        say: Callable[[str], None],
    ) -> None:
        self.engine, self.bases, self.save_dir = engine, bases, save_dir
        self._manager, self._say = manager, say
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[str] | None = None
        self._memory = HostMemory(engine.device)
        self._has_memory = True

    def save(self, algorithm: Algorithm, state: dict[str, Any], wanted: Wanted) -> str:
        """Save a checkpoint, all ranks together; its path.

        Args:
            algorithm: its models, the first with the tokenizer, become folders.
            state: see `snapshot.state_of`.

        Raises:
            CheckpointError: it could not be written.
        """
        self.finish()
        write = partial(self._write, self._collect(algorithm, state, wanted))
        if wanted.background:
            self._pending = self._thread.submit(write)
            return str(self.save_dir / f"checkpoint-{wanted.step:08d}")
        return _same_on_all_ranks(write)

    def finish(self) -> None:
        """Wait until the save in the background is done, all ranks together.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            _same_on_all_ranks(pending.result)

    def close(self) -> None:
        """Wait for this process's part of the save in the background, which needs no other rank, and give memory back.

        Raises:
            CheckpointError: it could not be written.
        """
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        finally:
            self._memory = HostMemory(self.engine.device)

    def has_memory(self, needed: int) -> bool:
        """Whether all ranks have memory for the copies of a save in the background; one line says that they have not.

        They take it now, in a thread, so that the first save finds it ready.

        Args:
            needed: bytes that this process copies.
        """
        here = (socket.gethostname(), max(0, needed - self._memory.size), free_memory())
        everywhere = dist.gather_patiently(here)
        before, self._has_memory = self._has_memory, fits(everywhere)
        if before and not self._has_memory:
            host, size, free = max(everywhere, key=lambda one: one[1])
            self._say(
                f"checkpoints are saved in the foreground: a copy takes {size / 1e9:.1f} GB of host memory, and "
                f"{(free or 0) / 1e9:.1f} GB are free on {host}"
            )
        if self._has_memory:
            self._thread.submit(self._memory.reserve, needed)
        return self._has_memory

    # 1. All ranks together.

    def _collect(self, algorithm: Algorithm, state: dict[str, Any], wanted: Wanted) -> Collected:
        copy = None
        if wanted.background:
            copy = self._memory.copy
            self._thread.submit(self._memory.start_over).result()  # after it has been reserved
        names, saved = self.bases.wanted(algorithm.saved_model, state)
        weights = self.engine.weights(names)
        files = StateFiles.of(state)
        shards = {}
        for name, tensor in files.tensors.items():
            shard = own_shard(tensor, dist.is_main())
            if shard is None:
                continue
            is_copy = self.engine.gathers_state and name.startswith("optimizer/state/")
            if copy is not None and not is_copy:
                shard = replace(shard, tensor=copy(shard.tensor))
            shards[name] = shard
        model, failure = None, None
        if dist.is_main():
            try:
                self._manager()  # a folder that cannot be written shows here
                beside = algorithm.processor or algorithm.tokenizer
                model = group_files(algorithm.saved_model, beside, weights, saved)
                model = model.joined(ModelFiles(wanted.beside))
            except (CheckpointError, OSError) as error:
                failure = str(error)
        best_weights = None
        if wanted.best_file:
            best_weights = weights_by_member(algorithm.saved_model, weights)
            for name, with_adapters in saved.items():
                best_weights[name] = with_adapters.trained(best_weights[name])
        if copy is not None and model is not None and not self.engine.gathers_weights:
            model, best_weights = _copied(model, best_weights, copy)
        self._memory.finish()
        apart = self._folder_apart(bool(shards), failure)
        bases = {name: with_adapters.base for name, with_adapters in saved.items()}
        return Collected(wanted, files.texts, shards, model, best_weights, bases, apart)

    def _folder_apart(self, has_shards: bool, failure: str | None) -> Path | None:
        """An empty folder for what other ranks than the main one have to write; None where they have nothing.

        Args:
            failure: why the main process cannot save at all, which the others do not know yet.

        Raises:
            CheckpointError: on all ranks, what `failure` says, or that the folder cannot be made.
        """
        folder = self.save_dir / ".shards"
        if dist.is_main() and failure is None:
            try:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                failure = f"'{folder}' could not be made: {error.strerror}"
        everywhere = dist.gather_patiently((has_shards, failure))  # nobody writes before it is empty
        for _, problem in everywhere:
            if problem is not None:
                raise CheckpointError(problem)
        if any(has for has, _ in everywhere[1:]):
            return folder
        if dist.is_main():
            folder.rmdir()
        return None

    # 2. Every rank for itself, from what was collected.

    def _write(self, collected: Collected) -> str:
        """Write what this process has; on the main one make a checkpoint of it. Its path, empty elsewhere.

        Raises:
            CheckpointError: it could not be written, here or on another rank.
        """
        written_apart: dict[str, Written] = {}
        if collected.apart is not None:
            written_apart = self._write_apart(collected.apart, collected.shards)
        if collected.model is None:
            return ""

        def write(folder: Path) -> dict[str, Written]:
            return self._write_folder(folder, collected, written_apart)

        wanted = collected.wanted
        return str(self._manager().write(wanted.step, write, metric=wanted.best_loss, is_best=wanted.is_best))

    def _write_apart(self, folder: Path, shards: dict[str, Shard]) -> dict[str, Written]:
        """Let all ranks but the main one write their shards; the files of all of them, with hashes."""
        written: dict[str, Written] = {}
        failure = None
        try:
            if not dist.is_main():
                written = write_files(folder, shard_files(shards, dist.process_number()))
        except Exception as error:  # whatever it is, the other ranks wait to hear of it
            reason = storage_failure(error) or f"{type(error).__name__}: {error}"
            failure = f"the shards of rank {dist.process_number()} could not be saved in '{folder}': {reason}"
        everything: dict[str, Written] = {}
        for of_rank, problem in dist.gather_behind((written, failure)):
            if problem is not None:
                raise CheckpointError(problem)
            everything |= of_rank
        return everything

    def _write_folder(
        self, folder: Path, collected: Collected, written_apart: dict[str, Written]
    ) -> dict[str, Written]:
        """Fill a checkpoint's folder; its files whose hashes are known."""
        model = collected.model
        assert model is not None
        model.write_small(folder)
        for file, text in collected.texts.items():
            (folder / file).write_text(text, encoding="utf-8")
        files = {**model.tensors, **shard_files(collected.shards, dist.process_number())}
        written = write_files(folder, files) | link_files(folder, model.links)
        (folder / "tensors").mkdir(exist_ok=True)
        for name in written_apart:
            assert collected.apart is not None
            os.rename(collected.apart / name, folder / name)
        if collected.apart is not None:
            shutil.rmtree(collected.apart, ignore_errors=True)
        if collected.best_weights is not None:  # a run that is killed before the folder has its name writes it again
            hashes = {name: written[name].sha256 for name in written if name.startswith("model/")}
            wanted = collected.wanted
            of = {"checkpoint": f"checkpoint-{wanted.step:08d}", "files": hashes}
            facts: dict[str, Any] = {"step": wanted.step, "best_loss": wanted.best_loss, checkpoint.WEIGHTS_OF: of}
            if collected.bases:
                facts[checkpoint.BASES] = {name: asdict(base) for name, base in collected.bases.items()}
            checkpoint.write_file(self.save_dir / "best_model.pt", collected.best_weights, facts)
        return written | written_apart


def _copied(
    model: ModelFiles, best_weights: BestWeights | None, copy: Callable[[Tensor], Tensor]
) -> tuple[ModelFiles, BestWeights | None]:
    """The same with copies of the tensors, one of each.

    NOTE: transformers takes tensors that lie in one piece of memory, as copies do, for tied ones: it sees the originals.
    """
    made: dict[Any, Tensor] = {}

    def once(tensor: Tensor) -> Tensor:
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if key not in made:
            made[key] = copy(tensor)
        return made[key]

    files = {}
    for file, content in model.tensors.items():
        shards = {name: replace(shard, tensor=once(shard.tensor)) for name, shard in content.shards.items()}
        files[file] = replace(content, shards=shards)
    if best_weights is not None:
        copied: BestWeights = {}
        for member, weights in best_weights.items():
            copied[member] = {name: once(tensor) for name, tensor in weights.items()}
        best_weights = copied
    return replace(model, tensors=files), best_weights


def _same_on_all_ranks(write: Callable[[], str]) -> str:
    """The path that the main process has written, on every rank.

    Raises:
        CheckpointError: any rank failed.
    """
    path, failure = "", None
    try:
        path = write()
    except CheckpointError as error:
        failure = str(error)
    found = dist.gather_patiently((path, failure))
    for _, problem in found:
        if problem is not None:
            raise CheckpointError(problem)
    return found[0][0]
