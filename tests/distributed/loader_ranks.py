"""Cells of tests/faults/loader_table.py by real processes over gloo: `python loader_ranks.py FOLDER LOADER...`.

Each life trains a model of every loader in turn, until its stop or its end; prints what was wrong, by cell, as JSON.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path += [str(Path(__file__).parents[1] / "faults"), str(Path(__file__).parent)]
import loader_table
from loader_table import EPOCHS, PER_STEP, RANKS, Cell, is_refused, verdict
from ranks import fork_ranks, import_once

from llm_trainer import BaseTrainer, Hook
from llm_trainer.engine import dist


class Seeing(BaseTrainer):
    """Learns nothing much from batches of numbers, and notes which it has learned from in which epoch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.seen: list[Counter] = [Counter() for _ in range(EPOCHS)]

    def _loss_weight(self, batch: torch.Tensor) -> float:
        self.seen[self.run.progress.epoch].update(batch.flatten().tolist())
        return float(batch.numel())

    def _count_tokens(self, batch: torch.Tensor) -> int:
        return batch.numel()

    def _prepare_batch(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.flatten()[:, None].float()

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.model(batch)

    def _compute_loss(self, outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        return outputs.mean()


Key = tuple[str, int]  # a loader, and the epoch in which it is stopped; 0: never
CANNOT_START = {1: ["generator"], 2: ["generator", "hidden", "hidden_batches", "deals_itself_unsaid"]}  # by ranks


def live(folder: Path, keys: list[Key]) -> dict[str, Any]:
    """Train until the stop, or to the end where there is a checkpoint already; a refusal is the end of the process.

    Returns:
        What this rank has seen in every epoch, or why it was refused.
    """
    ranks, found = dist.world_size(), dict[str, Any]()
    for loader, epoch in keys:
        name = f"{loader}-{epoch}"
        try:
            seen = train(Cell(loader, "alone", epoch, (ranks, ranks)), folder / name, ranks)
        except ValueError as error:
            return found | {name: {"seen": [], "refused": str(error)}}
        found[name] = {"seen": seen, "refused": ""}
    return found


def train(cell: Cell, save_dir: Path, ranks: int) -> list[dict[str, int]]:
    """Train one loader until its stop, or to the end where there is a checkpoint of it already."""
    is_resumed = (save_dir / "trained").exists()
    dist.gather_objects(None)  # nobody leaves the sign before all have looked

    def stop(run: Any) -> None:
        steps[run.progress.epoch] += 1
        if dist.is_main() and run.progress.epoch == cell.epoch - 1 and steps[cell.epoch - 1] == 2 and not is_resumed:
            os.kill(os.getpid(), signal.SIGTERM)

    steps: Counter = Counter()
    model = torch.nn.Linear(1, 1)
    trainer = Seeing(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-6),
        train_loader=loader_table.make_loader(cell, dist.rank(), ranks),
        max_epochs=EPOCHS,
        grad_accum_steps=PER_STEP // ranks,
        loader_is_sharded=cell.loader == "deals_itself",
        device="cpu",
        use_amp=False,
        progress=False,
        resume="auto",
        save_interval=0,
        save_dir=str(save_dir),
        hooks=[Hook("stop", stop, every_steps=1)],
    )
    try:
        trainer.train()
    except SystemExit:
        (save_dir / "trained").touch()
    return [dict(counter) for counter in trainer.seen]


def together(life: dict[str, Any], key: Key) -> tuple[list[Counter], str]:
    """What all ranks have seen, and why they were refused: all of them, or none."""
    assert set(life["codes"]) == {0}, "".join(life["texts"])[-3000:]
    results = [result[f"{key[0]}-{key[1]}"] for result in life["results"]]
    refusals = [result["refused"] for result in results]
    assert len({bool(refusal) for refusal in refusals}) == 1, refusals
    seen: list[Counter] = [Counter() for _ in range(EPOCHS)]
    for result in results:
        for total, counts in zip(seen, result["seen"], strict=False):
            total.update(counts)
    return seen, refusals[0]


def main(folder: Path, loaders: list[str]) -> None:
    """Play all cells of the loaders that are named; of those that are refused, the second epoch alone."""
    import_once()

    def fork(name: str, ranks: int, keys: list[Key]) -> dict[str, Any]:
        return fork_ranks(partial(live, keys=keys), folder / name, ranks)

    wrong, number, epochs = dict[str, str](), 0, range(1, EPOCHS + 1)
    wholes, stopped = {}, {}
    for ranks in (1, 2):
        able = [loader for loader in loaders if loader not in CANNOT_START[ranks]]
        wholes[ranks] = fork(f"whole-{ranks}", ranks, [(loader, 0) for loader in able])
        stopped[ranks] = fork(f"stop-{ranks}", ranks, [(loader, epoch) for loader in able for epoch in epochs])
    for before, after in RANKS:
        place = f"{before}to{after}"
        shutil.copytree(folder / f"stop-{before}", folder / place)
        cells = [Cell(loader, "alone", epoch, (before, after)) for loader in loaders for epoch in epochs]
        fine = [cell for cell in cells if not is_refused(cell)]
        resumed = fork(place, after, [(cell.loader, cell.epoch) for cell in fine])
        for cell in [cell for cell in cells if cell in fine or cell.epoch == 2]:
            number, key = number + 1, (cell.loader, cell.epoch)
            if cell.loader in CANNOT_START[before]:
                _, refusal = together(fork(f"{place}-{cell}", before, [key]), key)
                found = verdict(cell, [], refusal, [])
            elif cell not in fine:
                _, refusal = together(fork(place, after, [key]), key)
                found = verdict(cell, [], refusal, [])
            else:
                first, rest = together(stopped[before], key), together(resumed, key)
                seen = [one + other for one, other in zip(first[0], rest[0], strict=True)]
                found = verdict(cell, seen, first[1] or rest[1], together(wholes[before], (cell.loader, 0))[0])
            if found:
                wrong[str(cell)] = found
    print(json.dumps({"cells": number, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or [*loader_table.SAMPLERS, *loader_table.OTHERS])
