"""Everything of a run that a checkpoint holds, and how it gets there from all ranks."""

import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm_trainer import checkpoint
from llm_trainer.checkpoint import CheckpointError
from llm_trainer.engine import dist
from llm_trainer.state import Progress

if TYPE_CHECKING:
    from llm_trainer.train.run import Run


def save(run: "Run", is_best: bool, path: str | None, may_fail: bool) -> str:
    """Save a run; every rank learns how it ended.

    Args:
        is_best: this is the best checkpoint so far.
        path: write only a single `.pt` file there.
        may_fail: a full disk is a warning, not an error.

    Returns:
        Path of what was written, on every rank.

    Raises:
        CheckpointError: it could not be written.
    """
    result: str = ""
    failure: str | None = None
    metrics = run.metrics.state_dict(dist.all_reduce)  # every rank's share of the window that is not logged yet
    state, weights = _state(run, metrics), run.engine.weights()
    files = [path] if path is not None else []
    if path is None and is_best and run.settings.best_file:  # first: a run that is killed in between writes it again
        files.append(str(run.save_dir / "best_model.pt"))
    gathered = _gathered(state) if files else {}
    try:
        shards = None if path is not None else _write_shards(run, state)
        if dist.is_main():
            for file in files:
                result = str(checkpoint.write_file(file, weights, gathered))
            if path is None:
                result = _write_folder(run, weights, state, is_best, shards)
    except CheckpointError as error:
        failure = str(error)
    failures = dist.gather_objects(failure)
    failure = next(filter(None, failures), None)
    if failure is not None and not may_fail:
        raise CheckpointError(failure)
    if failure is not None:
        run.warn(f"{failure}. Training goes on; the next save is tried as planned")
    elif path is None:
        run.new_best = False
        run.progress.hooks_done["save"] = run.progress.step
    return dist.broadcast_object(result)


def _state(run: "Run", metrics: dict[str, Any]) -> dict[str, Any]:
    trainer = run.trainer
    scheduler = {} if trainer.scheduler is None else {"scheduler": trainer.scheduler.state_dict()}
    return scheduler | {
        "progress": asdict(run.progress),
        "optimizer": run.engine.optimizer_state(),
        "engine": run.engine.state_dict(),
        "metrics": metrics,
        "random": checkpoint.random_state(),
        "trainer": trainer._get_extra_checkpoint_state() or {},
        "data": _data_facts(run),
        "versions": {"torch": torch.__version__, "world_size": dist.world_size(), "engine": type(run.engine).__name__},
        "ledger": [ledger.as_dict() for ledger in run.settings.ledgers],
        "config": run.settings.description,
    }


def _gathered(state: dict[str, Any]) -> dict[str, Any]:
    """`state` with every sharded tensor whole, on the main process; the other ranks only help."""
    tensors: dict[str, Tensor] = {}
    plain = {name: checkpoint.set_tensors_aside(part, name, tensors) for name, part in state.items()}
    for name, tensor in tensors.items():
        value = checkpoint.whole(tensor)
        tensors[name] = value.cpu() if value is not tensor and dist.is_main() else tensor
    return {name: checkpoint.restore(part, tensors) for name, part in plain.items()} if dist.is_main() else {}


def _write_shards(run: "Run", state: dict[str, Any]) -> Path | None:
    """Let all ranks write what only they together hold; the folder of it, which becomes part of the checkpoint."""
    folder = run.save_dir / ".shards"
    if run.engine.in_lockstep:
        if dist.is_main():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        dist.broadcast_object(None)  # nobody writes before it is empty
    return folder if run.engine.write_shards(folder, state) else None


def _write_folder(
    run: "Run", weights: dict[str, Tensor], state: dict[str, Any], is_best: bool, shards: Path | None
) -> str:
    write = partial(checkpoint.write_model, run.trainer.base_model, tokenizer=run.trainer.tokenizer, weights=weights)
    loss = run.progress.best_loss if is_best else None
    saved = run.manager.save(run.progress.step, write, state, metric=loss, is_best=is_best, shards=shards)
    if shards is not None:
        shutil.rmtree(shards, ignore_errors=True)
    return str(saved)


def load(run: "Run", path: str) -> None:
    """Restore everything from a checkpoint folder or `.pt` file, on every rank.

    Raises:
        CheckpointError: it is damaged, does not fit this run, or is of an engine whose state means nothing to this one.
    """
    state = run.engine.load(path, run.trainer.scheduler)
    if "progress" not in state:
        raise CheckpointError(
            f"{path} holds no progress of a run: it was not made by a trainer. For its weights alone call "
            f"checkpoint.load_checkpoint(path, model=...), or set init_weights_path"
        )
    facts = _data_facts(run)
    if state["data"] != facts:
        raise CheckpointError(
            f"{path} was made with other data ({state['data']}, now {facts}): its position in the data means "
            f"nothing here. Restore the data, or start a new run in another save_dir from these weights "
            f"(init_weights_path)"
        )
    run.progress = Progress(**state["progress"])
    run.engine.load_state_dict(state["engine"])
    run.metrics.load_state_dict(state["metrics"], share=1 / dist.world_size())
    checkpoint.set_random_state(state["random"])
    run.trainer._load_extra_checkpoint_state(state["trainer"])


def _data_facts(run: "Run") -> dict[str, Any]:
    return {"kind": type(run.source).__name__, "size": run.source.size(), "seed": run.settings.seed}
