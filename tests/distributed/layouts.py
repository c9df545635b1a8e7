"""Checkpoints that change hands: written by one layout of processes, gone on with by another. Started by test_layouts.py."""

import errno
import json
import os
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "invariance"), str(Path(__file__).parents[1])]
import torch
from ranks import fork_ranks, import_once
from table import Rows, tiny_model

from llm_trainer import SFTTrainer, checkpoint, configure_optimizer
from llm_trainer.checkpoint import valid
from llm_trainer.config.options import Fsdp
from llm_trainer.data.collate import collate_flat
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.train import saving
from two_models import TwoModels, two_models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what peft imports
    try:
        import peft
    except ImportError:
        peft = None

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, options
    "one": (1, {}),
    "ddp-2": (2, {}),
    "fsdp-2": (2, {"engine": "fsdp"}),
    "fsdp-3": (3, {"engine": "fsdp"}),  # nothing divides by three: every part is uneven
    "tensor-2": (2, {"engine": "fsdp", "fsdp": Fsdp(tensor_parallel_size=2)}),
    "zero3-2": (2, {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}}),
}
ALL = [(first, second) for first in list(LAYOUTS)[:4] for second in list(LAYOUTS)[:4]]
# Each goes on from itself, from one other and before one other.
PAIRS = [(layout, layout) for layout in list(LAYOUTS)[:4]]
PAIRS += [("one", "ddp-2"), ("ddp-2", "fsdp-2"), ("fsdp-2", "fsdp-3"), ("fsdp-3", "one")]
OF_MATRICES = [
    ("tensor-2", "one"),
    ("fsdp-3", "tensor-2"),
    ("zero3-2", "fsdp-2"),
    ("fsdp-3", "zero3-2"),
]  # slow on CPUs
RELAY = ["one", "fsdp-2", "zero3-2", "ddp-2"]  # of a run of two models, or with adapters; each takes two steps
FIRST, LAST = 3, 5  # steps; an epoch has two


def with_adapters(base: str) -> Any:
    """The model with LoRA and some rows of its tied tables; `base` is its folder, or empty: checkpoints hold it."""
    model = tiny_model()
    model.name_or_path = base
    torch.manual_seed(0)
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], trainable_token_indices=[5, 17, 300])
    )


def make_trainer(
    folder: Path, max_steps: int, shares_body: bool | None = None, adapters_on: str | None = None, **options: Any
) -> SFTTrainer:
    """Two layers on 24 ragged rows, two steps per epoch, a best model in every epoch.

    With `shares_body` (None: the model is alone) a critic learns too, on the model's body or with its own. With
    `adapters_on` adapters alone learn: see `with_adapters`.
    """
    if "fsdp" in options:
        dist.share_data(
            options["fsdp"].tensor_parallel_size
        )  # before the streams ask which part of the data is this rank's
    model, rows = tiny_model(), Rows("sft", 512)
    if adapters_on is not None:
        model = with_adapters(adapters_on)
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
    check_names(trainer)
    return read


def check_names(trainer: Any) -> None:
    """Of the weights only those that are asked for are gathered, tied ones under any of their names."""
    engine = trainer.run.engine
    every, gather, gathered = engine.weights(), engine._full_tensor, []

    def counted(tensor: Any, dtype: Any) -> Any:
        gathered.append(dtype)
        return gather(tensor, dtype)

    names = [name for name, _ in trainer.saved_model.named_parameters()]
    names = [checkpoint.plain_name(name) for name in names[:2]]
    if "lm_head.weight" in trainer.saved_model.state_dict():
        names += ["lm_head.weight"]  # it is that of the embeddings
    engine._full_tensor = counted
    found = engine.weights(names)
    del engine._full_tensor
    assert len(gathered) == 2
    assert sorted(found) == sorted(names if dist.is_main() else [])
    assert all(torch.equal(tensor, every[name]) for name, tensor in found.items())


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
    weights = "model/adapter_model.safetensors" if "adapters_on" in options else "model/model.safetensors"
    return {
        "hashed": done["results"],
        "curve": [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line],
        "weights": newest["files"][weights]["sha256"],
        "files": sorted(newest["files"]),
        "models": sorted({name.partition("/")[0] for name in newest["files"] if name.endswith("model.safetensors")}),
        "evaluations": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
    }


def in_turn(folder: Path, pairs: list[tuple[str, str]]) -> dict[str, Any]:
    """Layouts by themselves, and going on from one another."""
    report: dict[str, Any] = {}
    for first in dict.fromkeys(first for first, _ in pairs):
        if (first, first) in pairs:
            report[first] = run(first, folder / first, LAST)
        run(first, folder / f"{first}-half", FIRST, **ONE_SAVE)
    for first, second in pairs:
        both = folder / f"{first}-{second}"
        shutil.copytree(folder / f"{first}-half", both, symlinks=True)
        report[f"{first} {second}"] = run(second, both, LAST, **ONE_SAVE)
    return report


def main(folder: Path, every_pair: bool = False) -> None:
    """Everything, or every pair of layouts."""
    import_once()
    make_trainer(folder / "unused", 1)  # imports the rest

    if every_pair:
        print(json.dumps(in_turn(folder, ALL)))
        return
    report = in_turn(folder, PAIRS + OF_MATRICES)
    for name, shares_body in (("body of its own", False), ("body shared", True)):
        folders = folder / f"{name} whole", folder / f"{name} relay"
        steps = 2 * len(RELAY)
        whole = run("one", folders[0], steps, shares_body=shares_body, **ONE_SAVE)
        for number, layout in enumerate(RELAY, start=1):
            relay = run(layout, folders[1], 2 * number, shares_body=shares_body, **ONE_SAVE)
        report[name] = [whole, relay]
    if peft is not None:
        base, steps = str(folder / "base"), 2 * len(RELAY)
        checkpoint.write_model(tiny_model(), base)
        whole = run("one", folder / "adapters whole", steps, adapters_on=base, **ONE_SAVE)
        for number, layout in enumerate(RELAY, start=1):
            on = base if number > 2 else ""  # ZeRO-3 reads the base too, and then finds it in its folder
            relay = run(layout, folder / "adapters relay", 2 * number, adapters_on=on, **ONE_SAVE)
        report["adapters"] = [whole, relay]
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
    main(Path(sys.argv[1]), every_pair="every-pair" in sys.argv[2:])
