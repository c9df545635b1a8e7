"""Every method of peft where weights or gradients are sharded: `python method_ranks.py FOLDER ENGINE,... KIND,...`.

For each it prints a line of JSON: how far the curve of two ranks is from that of one process, whether a run that goes on from
its checkpoint is the same to the bit, or why there is no curve. Started by test_methods.py.
"""

import json
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "invariance"), str(Path(__file__).parents[1])]
import torch
from layouts import make_trainer
from ranks import fork_ranks, import_once
from table import tiny_model

from llm_trainer import AdapterConfig, adapt, configure_optimizer
from llm_trainer.engine import dist
from llm_trainer.train import preflight

STEPS = 4
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "ddp": (2, {}),
    "fsdp": (2, {"engine": "fsdp"}),
    "zero-2": (2, {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 2}}}),
    "zero-3": (2, {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 3}}}),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 8},
    "fourierft": {"n_frequency": 20},
    "ia3": {"feedforward_modules": ["down_proj"]},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 4, "r": 0},
    "psoft": {"r": 4},
    "road": {"group_size": 16},
    "waveft": {"n_frequency": 20},
}


def train(folder: Path, kind: str, steps: int, **options: Any) -> Any:
    torch.manual_seed(0)
    model = adapt(tiny_model(), AdapterConfig(kind=kind, options=OPTIONS.get(kind, {})))
    optimizer = configure_optimizer(model=model, lr=1e-2)
    how = {"model": model, "optimizer": optimizer, "val_loader": None, "save_interval": 0}
    trainer = make_trainer(folder, steps, **(how | options))
    trainer.train()
    return trainer


def curve(folder: Path) -> list[list[float]]:
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [[line["loss"], line["grad_norm"]] for line in lines if "loss" in line]


def scenario(folder: Path, kind: str, options: dict[str, Any]) -> Any:
    """The curve of a run, and that of one that has stopped in its middle."""
    warnings.simplefilter("ignore")
    preflight.check_adapters = lambda *args: None  # whatever it refuses is tried
    train(folder / "whole", kind, STEPS, **options)
    train(folder / "halves", kind, STEPS // 2, **options)
    train(folder / "halves", kind, STEPS, **options)
    if not dist.is_main():
        return None
    whole, halves = curve(folder / "whole"), curve(folder / "halves")
    return {"curve": whole, "resumes": halves == whole}


def main(folder: Path, engines: list[str], kinds: list[str]) -> None:
    import_once()
    make_trainer(folder / "unused", 1)  # imports the rest
    expected: dict[str, list[list[float]]] = {}
    for kind in kinds:
        for engine in ["one", *engines]:
            ranks, options = ENGINES[engine]
            played = fork_ranks(partial(scenario, kind=kind, options=options), folder / f"{kind}-{engine}", ranks, 30)
            line: dict[str, Any] = {"kind": kind, "engine": engine}
            if set(played["codes"]) != {0}:
                said = [text.strip().splitlines() for text in played["texts"] if "Error" in text]
                line["error"] = said[0][-1][:300] if said else f"exit codes {played['codes']}"
            else:
                found = played["results"][0]
                expected.setdefault(kind, found["curve"])
                pairs = zip(sum(found["curve"], []), sum(expected[kind], []), strict=True)
                line["apart"] = max(abs(one - other) / abs(other) for one, other in pairs)
                line["resumes"] = found["resumes"]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
