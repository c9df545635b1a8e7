"""Trains a small model again and again and kills it: `python victim.py FOLDER KILLS MODEL PRECISION [behind]`.

Imports once and forks its victims, so that a life costs a fraction of a second. Prints what happened as JSON.
`python victim.py --signalled WHERE FOLDER` trains, and says by a file when it is in a step or in an evaluation.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SPEED = {"time", "tokens_per_second", "mfu"}
EXPERTS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> architecture, and what balances its experts
    "previous_step": ("qwen3_moe", {"aux_loss_scope": "previous_step", "aux_loss_coef": 0.5}),
    "bias": ("glm4_moe", {"bias_update_speed": None}),
}


class Rows:
    """Ragged rows of random ids, all trained on."""

    def __init__(self, count: int, seed: int = 0) -> None:
        noise = np.random.default_rng(seed)
        self.lengths = noise.integers(4, 20, count)
        self.file_sizes = [count // 2, count - count // 2]
        self._ids = [noise.integers(3, 512, n) for n in self.lengths]

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = self._ids[index]
        return {"input_ids": ids, "trained": np.ones(len(ids), dtype=bool), "document_lengths": [len(ids)]}


class Plain(nn.Module):
    """A causal model of torch parts, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(512, 16), nn.GRU(16, 16, batch_first=True)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(16, 512)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` of ids `[B, T]`."""
        return self.head(self.drop(self.mix(self.drop(self.embed(input_ids)))[0]))


def stream_of(rows: Rows, model_name: str, **options: Any) -> Any:
    """Steps over rows; of a model that sees, laid flat, with images that workers decode."""
    from llm_trainer.data.collate import collate_flat, collate_padded, lay_with_images
    from llm_trainer.data.stream import SampleStream

    if model_name != "vision":
        return SampleStream(rows, collate_padded, **options)
    sys.path[:0] = [str(Path(__file__).parents[1] / "invariance"), str(Path(__file__).parents[1])]
    from pictures import Decoded, Pictured

    shown = Decoded()
    pictured = Pictured(rows, options["rows_per_step"], shown.refs)
    collate = partial(lay_with_images, lay=collate_flat, images=shown)
    return SampleStream(pictured, collate, flat=True, num_workers=2, **options)


def in_four_bits(base: Path) -> nn.Module:
    """A model whose weights are in 4 bits, with adapters that are large enough for moments in 8 bits.

    Args:
        base: where the model lies, or will.
    """
    from llm_trainer import AdapterConfig, adapt
    from llm_trainer.models.build import build_model
    from llm_trainer.models.quantized_loading import loading_options
    from llm_trainer.train_configs import ModelConfig, QuantizationConfig

    if not base.exists():
        shape = ModelConfig(
            vocab_size=512, hidden_size=64, intermediate_size=512, num_hidden_layers=1, num_attention_heads=2
        )
        build_model(shape).save_pretrained(base)
    how = loading_options(QuantizationConfig(), base, torch.device("cpu"), torch.float32)
    return adapt(build_model(str(base), options=how), AdapterConfig(rank=8, dropout=0.1))


def make_model(name: str, base: Path = Path()) -> nn.Module:
    """The same weights at every call; `base`: where the model lies that 'qlora' reads."""
    torch.manual_seed(0)
    if name == "qlora":
        return in_four_bits(base)
    if name == "plain":
        return Plain()
    if name == "vision":
        sys.path.insert(0, str(Path(__file__).parents[1] / "invariance"))
        from pictures import vision_model

        return vision_model(attention_dropout=0.2)
    from llm_trainer.config.model import ModelConfig, MoeConfig
    from llm_trainer.models.build import build_model

    shape: dict[str, Any] = {"vocab_size": 512, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name in EXPERTS:
        moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
        shape |= {"architecture": EXPERTS[name][0], "moe": moe, "initializer_range": 0.2}
    model = build_model(ModelConfig(**shape, attention_dropout=0.2), attention="sdpa")
    if name != "lora":
        return model
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        import peft
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    return peft.get_peft_model(model, lora)  # the base is in the checkpoints, which share its files


def make_trainer(folder: Path, model_name: str = "plain", precision: str = "fp32", **options: Any) -> Any:
    """A run with dropout, shuffled rows, evaluations, a plateau schedule, and checkpoints that hit every phase."""
    from llm_trainer import SFTTrainer
    from llm_trainer.engine import dist
    from llm_trainer.optim.optimizers import configure_optimizer
    from llm_trainer.optim.schedules import create_scheduler

    model = make_model(model_name, folder.parent / "base")
    kind = "adamw8bit" if model_name == "qlora" else "adamw"
    optimizer = configure_optimizer(model, kind, lr=0.02)
    ranks, accumulation = {"rank": dist.rank(), "world_size": dist.world_size()}, 4 // dist.world_size()
    given: dict[str, Any] = {
        "train_loader": stream_of(Rows(62), model_name, rows_per_step=8, batch_size=2, **ranks),
        "val_loader": stream_of(Rows(8, 1), model_name, rows_per_step=8, batch_size=8, shuffle=False, **ranks),
        "scheduler": create_scheduler(optimizer, "reduce_on_plateau", factor=0.5, patience=0, threshold=0.01),
        "max_epochs": 3,
        "grad_accum_steps": accumulation,
        "log_interval": 2,
        "save_interval_steps": 3,
        "eval_interval": 4,
        "device": "cpu",
        "precision": precision,
        "resume": "auto",
        "best_file": False,
        "compile": False,
        "progress": False,
        "save_dir": str(folder),
    }
    if model_name in EXPERTS:
        given |= EXPERTS[model_name][1]
    return SFTTrainer(model=model, optimizer=optimizer, **(given | options))


def metric_lines(folder: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what depends on the clock, and without what each life of a run chose."""
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    measured = [line for line in lines if "choices" not in line]
    return [{name: value for name, value in line.items() if name not in SPEED} for line in measured]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on kills: weights, optimizer, schedule, progress, best checkpoint, metrics."""
    from llm_trainer.checkpoint import CheckpointManager

    manager = CheckpointManager(folder)
    loaded, best = manager.load(), manager.best()
    weights = [path.read_bytes() for path in sorted(loaded.model_folder.rglob("*")) if path.is_file()]
    progress = {k: v for k, v in loaded.state["progress"].items() if k not in ("train_seconds", "lines")}
    kept = {name: loaded.state[name] for name in ("optimizer", "scheduler", "regulariser")}
    return {
        "weights": weights,
        "state": flat({**kept, "progress": progress}),
        "best": best.name if best else None,
        "metrics": metric_lines(folder),
    }


def flat(value: Any) -> Any:
    """Nested state with tensors as lists, so that `==` compares it."""
    if isinstance(value, Tensor):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: flat(item) for key, item in value.items()}
    return [flat(item) for item in value] if isinstance(value, list | tuple) else value


def start(folder: Path, options: list[str]) -> int:
    """Fork a life that trains in `folder` until its end."""
    return fork_life(folder, lambda: make_trainer(folder, *options).train())


def fork_life(folder: Path, live: Callable[[], object]) -> int:
    """Fork a process that does `live()`, whose output goes beside `folder`; its number."""
    child = os.fork()
    if child:
        return child
    code = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sys.stdout = sys.stderr = (folder.parent / f"{folder.name}.out").open("a")
        live()
    except BaseException as error:
        traceback.print_exc()
        code = error.code if isinstance(error, SystemExit) else 1
    sys.stdout.flush()
    os._exit(code)


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when its process died."""
    return any(".partial-" in path.name for path in folder.glob("checkpoint-*"))


def wait(child: int, seconds: float, until: Any = lambda: False) -> bool:
    """Whether `child` ended by itself, without an error, before `seconds` or `until()`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not until():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, f"a life ended with status {status}"
            return True
        time.sleep(0.0005)
    return False


class Telling(Rows):
    """Rows that leave a file behind when one of them is fetched, and take their time."""

    def __init__(self, count: int, sign: Path) -> None:
        super().__init__(count)
        self.sign = sign

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.sign.touch()
        time.sleep(0.01)
        return super().__getitem__(index)


def train_until_signalled(where: str, folder: Path) -> None:
    """A run of many epochs, with worker processes; rows of training or of evaluation give a sign."""
    from llm_trainer.data.collate import collate_padded
    from llm_trainer.data.stream import SampleStream

    folder.mkdir()
    rows = Telling(40, folder / f"in-{where}")
    stream = SampleStream(rows, collate_padded, rows_per_step=8, batch_size=2, num_workers=1)
    options = {"train_loader": stream} if where == "step" else {"val_loader": stream}
    make_trainer(folder, max_epochs=1000, **options).train()


def write_slowly() -> None:
    """Let a checkpoint take several steps to be written, which training does not wait for."""
    from llm_trainer.train import saving as saves

    write = saves.write_files

    def slowly(folder: Path, files: Any) -> Any:
        time.sleep(0.03)
        written = write(folder, files)
        time.sleep(0.03)
        return written

    saves.write_files = slowly


def main(folder: Path, kills: int, options: list[str]) -> None:
    """Kill until there were `kills`, and compare every run that got to its end with one that was left alone."""
    torch.set_num_threads(1)
    import torch.distributed.checkpoint as _  # noqa: F401
    from transformers import PreTrainedModel  # noqa: F401

    if "behind" in options:
        options.remove("behind")
        write_slowly()
    make_trainer(folder / "unused", *options)  # what is imported now is not imported in every life
    began, chance = time.monotonic(), random.Random(7)
    assert wait(start(folder / "whole", options), 120)
    duration, whole = time.monotonic() - began, outcome(folder / "whole")
    done, during_save, runs, different = 0, 0, 0, list[str]()
    while done < kills:
        run, finished = folder / f"run-{runs}", False
        while not finished:
            child = start(run, options)
            if done == kills:
                finished = wait(child, 120)
                break
            if done % 2:  # every other kill waits for a save
                finished = wait(child, chance.uniform(0.1, 0.6) * duration)
                finished = finished or wait(child, 60, until=lambda run=run: saving(run))
                finished = finished or wait(child, chance.uniform(0, 0.02))
            else:
                finished = wait(child, chance.uniform(0.05, 0.9) * duration)
            if not finished:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                done, during_save = done + 1, during_save + saving(run)
        runs += 1
        result = outcome(run)
        different += [f"run {runs - 1}: {name}" for name in whole if result[name] != whole[name]]
    seconds = round(time.monotonic() - began, 1)
    report = {"kills": done, "during_save": during_save, "runs": runs, "different": different, "seconds": seconds}
    print(json.dumps(report | {"lines": len(whole["metrics"]), "one_run_s": round(duration, 2)}))


if __name__ == "__main__":
    if sys.argv[1] == "--signalled":
        train_until_signalled(sys.argv[2], Path(sys.argv[3]))
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
