"""Checkpoints that change hands: written by one layout of processes, gone on with by another. Started by test_layouts.py."""

import errno
import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "invariance"), str(Path(__file__).parents[1])]
from ranks import fork_ranks, import_once
from table import Rows, tiny_model

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.checkpoint import valid
from llm_trainer.config.options import Fsdp
from llm_trainer.data.collate import collate_flat
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.train import saving
from two_models import TwoModels, two_models

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, options
    "one": (1, {}),
    "ddp-2": (2, {}),
    "fsdp-2": (2, {"engine": "fsdp"}),
    "fsdp-3": (3, {"engine": "fsdp"}),  # nothing divides by three: every part is uneven
    "tensor-2": (2, {"engine": "fsdp", "fsdp": Fsdp(tensor_parallel_size=2)}),
    "zero3-2": (2, {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}}),
}
PAIRS = [(first, second) for first in list(LAYOUTS)[:4] for second in list(LAYOUTS)[:4]]
PAIRS += [("tensor-2", "one"), ("fsdp-3", "tensor-2"), ("zero3-2", "fsdp-2"), ("fsdp-3", "zero3-2")]  # slow on CPUs
RELAY = ["one", "fsdp-2", "zero3-2", "ddp-2"]  # of a run of two models; each takes two steps
FIRST, LAST = 3, 5  # steps; an epoch has two


def make_trainer(folder: Path, max_steps: int, shares_body: bool | None = None, **options: Any) -> SFTTrainer:
    """Two layers on 24 ragged rows, two steps per epoch, a best model in every epoch.

    With `shares_body` (None: the model is alone) a critic learns too, on the model's body or with its own.
    """
    if "fsdp" in options:
        dist.share_data(
            options["fsdp"].tensor_parallel_size
        )  # before the streams ask which part of the data is this rank's
    model, rows = tiny_model(), Rows("sft", 512)
    how: dict[str, Any] = {"rank": dist.rank(), "world_size": dist.world_size(), "flat": True}
    stream = SampleStream(rows, collate_flat, rows_per_step=12, batch_size=2, **how)
    values: dict[str, Any] = {
        "model": model,
        "optimizer": configure_optimizer(model=model, lr=1e-2),
        "train_loader": stream,
        "val_loader": SampleStream(rows, collate_flat, rows_per_step=12, batch_size=4, shuffle=False, **how),
        "device": "cpu",
        "max_epochs": 100,
        "use_amp": False,
        "log_interval": 1,
        "save_dir": str(folder),
        "max_steps": max_steps,
        "resume": "auto",
        "progress": False,
    }
    if shares_body is not None:
        return TwoModels(**(values | two_models(model, shares_body) | options))
    return SFTTrainer(**(values | options))


def leg(folder: Path, max_steps: int, **options: Any) -> int:
    """Train; how many files this process has read to compare their hashes, before its first step."""
    hashed, hash_file = [], valid._sha256

    def counted(path: Path) -> str:
        hashed.append(path)
        return hash_file(path)

    valid._sha256 = counted
    trainer = make_trainer(folder, max_steps, **options)
    trainer.run._resume()
    read = len(hashed)
    trainer.train()
    return read


def leg_on_a_full_disk(folder: Path) -> list[str]:
    """The warnings of a sharded run whose second rank cannot write its first checkpoint."""
    write = saving.write_files
    failures = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))] if dist.rank() == 1 else []

    def write_or_fail(folder: Path, files: Any) -> Any:
        if failures:
            raise failures.pop()
        return write(folder, files)

    saving.write_files = write_or_fail
    trainer = make_trainer(folder, LAST, val_loader=None, save_interval=1, **LAYOUTS["fsdp-2"][1])
    warnings: list[str] = []
    trainer.run.checkpoints._warn = warnings.append
    trainer.train()
    return warnings


ONE_SAVE = {"val_loader": None, "save_interval": 0}  # only the one at the end: the other saves take half of a short run


def run(layout: str, folder: Path, max_steps: int, **options: Any) -> dict[str, Any]:
    """One leg; the curve so far and a hash of the newest weights."""
    processes, of_layout = LAYOUTS[layout]
    options |= of_layout
    done = fork_ranks(partial(leg, max_steps=max_steps, **options), folder, processes)
    assert done["codes"] == [0] * processes, "".join(done["texts"])[-3000:]
    lines = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    newest = json.loads((sorted(folder.glob("checkpoint-*"))[-1] / "manifest.json").read_text())
    return {
        "hashed": done["results"],
        "curve": [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line],
        "weights": newest["files"]["model/model.safetensors"]["sha256"],
        "models": sorted({name.partition("/")[0] for name in newest["files"] if name.endswith("model.safetensors")}),
        "evaluations": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
    }


def main(folder: Path) -> None:
    """Layouts by themselves, and going on from one another."""
    import_once()
    make_trainer(folder / "unused", 1)  # imports the rest

    report: dict[str, Any] = {}
    for first in LAYOUTS:
        if (first, first) in PAIRS:
            report[first] = run(first, folder / first, LAST)
        run(first, folder / f"{first}-half", FIRST, **ONE_SAVE)
    for first, second in PAIRS:
        both = folder / f"{first}-{second}"
        shutil.copytree(folder / f"{first}-half", both, symlinks=True)
        report[f"{first} {second}"] = run(second, both, LAST, **ONE_SAVE)
    for name, shares_body in (("body of its own", False), ("body shared", True)):
        folders = folder / f"{name} whole", folder / f"{name} relay"
        steps = 2 * len(RELAY)
        whole = run("one", folders[0], steps, shares_body=shares_body, **ONE_SAVE)
        for number, layout in enumerate(RELAY, start=1):
            relay = run(layout, folders[1], 2 * number, shares_body=shares_body, **ONE_SAVE)
        report[name] = [whole, relay]
    full = fork_ranks(leg_on_a_full_disk, folder / "full", 2)
    report["full disk"] = [full, [path.name for path in sorted((folder / "full").glob("*"))]]
    report["files"] = {
        name: run_file(second, folder / f"{name}-file", folder / name / "best_model.pt")
        for name, second in (("fsdp-2", "one"), ("one", "fsdp-2"))
    }
    print(json.dumps(report))


def load_file(folder: Path, path: Path, **options: Any) -> float:
    """The step and the evaluation of a single file that another layout wrote."""
    trainer = make_trainer(folder, LAST, **options)
    trainer.load_checkpoint(str(path))
    return trainer.evaluate()["eval_loss"]


def run_file(layout: str, folder: Path, path: Path) -> list[float]:
    processes, options = LAYOUTS[layout]
    done = fork_ranks(partial(load_file, path=path, **options), folder, processes)
    assert done["codes"] == [0] * processes, "".join(done["texts"])[-3000:]
    return done["results"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
