"""DeepSpeed in real processes over gloo: `python zero_ranks.py FOLDER fast|slow` plays scenarios and prints them as JSON."""

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parents[1] / "invariance"), str(Path(__file__).parents[1])]
from ranks import INF, NONE, ONE, fork_ranks, import_once, mean_trainer
from table import ROWS_PER_STEP, TRAINERS, Cell, data_of, tiny_model

from llm_trainer import configure_optimizer, get_trainer_class
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.train.hooks import Hook
from machine import has_fp16

STAGES = (0, 1, 2, 3)
ON_HOST = {"device": "cpu", "pin_memory": False}


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """Keywords of a trainer for ZeRO; even small parameters are sharded."""
    persists = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
    return {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage, **persists}, **more}}


def make(folder: Path, cell: Cell, **options: Any) -> tuple[Any, list[tuple[float, float]]]:
    """A trainer of the table's data and model, and the list that its losses and gradient norms will be in."""
    curve: list[tuple[float, float]] = []
    model, dataset = tiny_model(), data_of(cell)
    if cell.trainer == "dpo":
        options["ref_model"] = tiny_model(seed=1)
    cut = {"batch_size": cell.batch_size, "flat": cell.flat, "micro_batch_tokens": cell.micro_batch_tokens}
    ranks = {"rank": dist.rank(), "world_size": dist.world_size()}
    given = {
        "train_loader": SampleStream(*dataset, rows_per_step=ROWS_PER_STEP, **cut, **ranks),
        "optimizer": configure_optimizer(model=model, lr=1e-2),
        "grad_accum_steps": cell.accumulation,
        "max_epochs": 1,
        "use_amp": False,
        "hooks": [Hook("watch", lambda run: curve.append(last_of(run)), every_steps=1)],
    }
    quiet = {"device": "cpu", "log_interval": 1, "save_interval": 0, "progress": False, "best_file": False}
    options = given | quiet | TRAINERS[cell.trainer] | options
    return get_trainer_class(cell.trainer)(model=model, save_dir=str(folder), **options), curve


def last_of(run: Any) -> tuple[float, float]:
    return run.values["loss"], run.values["grad_norm"]


def curve_of(folder: Path, cell: Cell, **options: Any) -> list[tuple[float, float]]:
    trainer, curve = make(folder, cell, **options)
    trainer.train()
    return curve


def fingerprint(trainer: Any) -> str:
    """A hash of the main process's weights and optimizer state, bit for bit. All ranks call it together."""
    state = {"weights": trainer.run.engine.weights(), **trainer.run.engine.optimizer_state()["state"]}
    tensors = [state[name][key] for name in sorted(state) for key in sorted(state[name])]
    return hashlib.sha256(b"".join(t.float().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


# Scenarios. Each is called in every rank, and what it returns is reported.


def curves(folder: Path, cells: list[Cell]) -> dict[str, Any]:
    """The plain engine, and all stages."""
    ways: list[dict[str, Any]] = [{}, *map(zero, STAGES)]
    return {str(cell): [curve_of(folder, cell, **how) for how in ways] for cell in cells}


def not_finite(folder: Path) -> list[dict[str, Any]]:
    """The second step has an infinity on one rank; then, steps without terms. Parameters of one element on two ranks."""
    found = []
    for how in ({}, *map(zero, STAGES)):
        seen: list[str] = []
        look = Hook("look", lambda run, seen=seen: seen.append(fingerprint(run.trainer)), every_steps=1)
        trainer = mean_trainer(folder, [ONE, ONE, ONE, INF], hooks=[look], **how)
        trainer.train()
        without = mean_trainer(folder, [ONE, NONE, ONE, NONE], **how)
        without.train()
        weights = [tensor.item() for tensor in without.run.engine.weights().values()]
        found.append({"seen": seen, "skipped": trainer.run.progress.skipped_steps, "weights": weights})
    return found


def on_policy(folder: Path) -> list[Any]:
    """The student writes answers of its own, which are longer on one rank than on the other."""
    from llm_trainer.trainers.distill import Distillation

    found = []
    for how in ({}, zero(3)):
        stops = tuple(range(0, 512, 3))
        kd = Distillation(tiny_model(seed=1), on_policy_fraction=1.0, max_new_tokens=6, stop_token_ids=stops)
        found.append(curve_of(folder, Cell("sft", 4, 1, 2), kd=kd, **how))
    return found


PRECISIONS: dict[str, dict[str, Any]] = {
    **{f"autocast-{stage}": zero(stage) | {"precision": "bf16", "use_amp": True} for stage in STAGES},
    **{f"bf16-{stage}": zero(stage, bf16={"enabled": True}) for stage in STAGES},
    **{f"fp16-{stage}": zero(stage, fp16={"enabled": True, "initial_scale_power": 8}) for stage in STAGES[1:]},
}


def precisions(folder: Path, names: list[str]) -> dict[str, Any]:
    """16 bits around fp32 weights, and in the weights."""
    cell, plain = Cell("sft", 4, 1, 2), {"precision": "bf16", "use_amp": True}
    return {
        name: curve_of(folder, cell, **how) for name, how in {"plain": plain, **PRECISIONS}.items() if name in names
    }


def offload(folder: Path, cells: list[tuple[int, int]]) -> list[Any]:
    """Optimizer state, and the parameters of stage 3, in host memory (where everything is here): stage, accumulation."""
    found = []
    for stage, accumulation in cells:
        how, cell = zero(stage), Cell("sft", 4 // accumulation, accumulation, 2)
        parts = {"offload_optimizer": ON_HOST} | ({"offload_param": ON_HOST} if stage == 3 else {})
        how["deepspeed"]["zero_optimization"] |= parts
        found.append([curve_of(folder, cell), curve_of(folder, cell, **how)])
    return found


def recomputed(folder: Path) -> list[Any]:
    """How often a layer runs, and the curve, without and with activation checkpointing."""
    found = []
    for sections in ({}, {"activation_checkpointing": {}}):
        runs: list[int] = []
        trainer, curve = make(folder, Cell("sft", 4, 1, 2), **zero(3, **sections))
        trainer.base_model.model.layers[0].mlp.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        trainer.train()
        found.append({"runs": len(runs), "curve": curve})
    return found


WAYS: dict[str, dict[str, Any]] = {
    "torch": {},
    **{f"{stage}": zero(stage) for stage in STAGES},
    **{f"{stage}-bf16": zero(stage, bf16={"enabled": True}) for stage in STAGES},
    "1-fp16": zero(1, fp16={"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}),  # it grows
}


def cell_of_ranks() -> Cell:
    return Cell("sft", 2, 4 // dist.world_size())


def end_of(trainer: Any) -> dict[str, Any]:
    return {"state": fingerprint(trainer), "scale": trainer.run.engine.state_dict()["scaler"].get("cur_scale")}


def whole(folder: Path, names: list[str]) -> dict[str, Any]:
    """Runs of six steps that nobody interrupts, and the first halves of others."""
    found: dict[str, Any] = {}
    for name in names:
        trainer, curve = make(folder / "whole", cell_of_ranks(), max_epochs=2, **WAYS[name])
        trainer.train()
        found[name] = {"curve": curve, "end": end_of(trainer)}
        half = folder / f"half-{dist.world_size()}-{name}"
        make(half, cell_of_ranks(), max_epochs=2, max_steps=3, **WAYS[name])[0].train()
    return found


def resumed(folder: Path, halves: list[tuple[int, str, str]]) -> list[dict[str, Any]]:
    """The second halves of runs: ranks and way of the first half, way of the second."""
    found = []
    for ranks, before, after in halves:
        trainer, curve = make(folder / "rest", cell_of_ranks(), max_epochs=2, **WAYS[after])
        trainer.load_checkpoint(str(folder / f"half-{ranks}-{before}" / "checkpoint-00000003"))
        trainer.train()
        found.append({"half": (ranks, before, after), "curve": curve[-3:], "end": end_of(trainer)})
    return found


def possible(what: Any) -> Any:
    """What of a list or a mapping, at any depth, this CPU can compute: DeepSpeed's fp16 needs instructions for it."""
    if has_fp16():
        return what
    if isinstance(what, dict):
        return {key: possible(value) for key, value in what.items()}
    if isinstance(what, list):
        return [possible(value) for value in what if "fp16" not in str(value)]
    return what


FAST: dict[str, Any] = {
    "cells": [Cell("sft", 1, 4, 2), Cell("dpo", 2, 2, 2, True, 40)],
    "precisions": ["plain", "autocast-2", "bf16-0", "bf16-3", "fp16-1"],
    "offload": [(2, 4)],
    "ways": ["2", "3-bf16", "1-fp16"],
    "halves": {2: [(2, way, way) for way in ("2", "3-bf16", "1-fp16")], 1: [(2, "2", "2"), (2, "2", "torch")]},
}
SLOW: dict[str, Any] = {
    "cells": [Cell("sft", 4, 1, 2), Cell("sft", 2, 2, 2, True, 40), Cell("dpo", 4, 1, 2), Cell("dpo", 1, 4, 2)],
    "precisions": ["plain", *PRECISIONS],
    "offload": [(stage, accumulation) for stage in (1, 2, 3) for accumulation in (1, 4)],
    "ways": [*WAYS],
    "halves": {
        ranks: [(n, way, way) for n in (1, 2) for way in WAYS] + [(ranks, "torch", "3"), (ranks, "3", "1")]
        for ranks in (1, 2)
    },
}


def several(folder: Path, plays: dict[str, Callable[[Path], Any]]) -> dict[str, Any]:
    """One after the other in the same processes, with as many engines."""
    return {name: play(folder) for name, play in plays.items()}


def main(folder: Path, what: dict[str, Any]) -> None:
    """Play everything."""
    import_once()

    begin, go_on = partial(whole, names=what["ways"]), what["halves"]
    with_two: dict[str, Callable[[Path], Any]] = {
        "curves": partial(curves, cells=what["cells"]),
        "not_finite": not_finite,
        "offload": partial(offload, cells=what["offload"]),
        "recomputed": recomputed,
        "on_policy": on_policy,
        "whole-2": begin,
        "resumed-2": partial(resumed, halves=go_on[2]),
        "precisions": partial(precisions, names=what["precisions"]),
    }
    from_one = any(ranks == 1 for cases in go_on.values() for ranks, _, _ in cases)
    plays = [(1, {"whole-1": begin})] if from_one else []
    plays += [(2, with_two), (1, {"resumed-1": partial(resumed, halves=go_on[1])})]
    print(json.dumps([fork_ranks(partial(several, plays=play), folder / "run", ranks) for ranks, play in plays]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), possible({"fast": FAST, "slow": SLOW}[sys.argv[2]]))
