"""How long training stands still for a checkpoint, and what saving and loading take: this checkout and any other revision.

`python benchmarks/checkpoints.py --against 9a4a477 --precisions fp32` trains a model of 0.5 B random parameters, whose
AdamW has the state of a long run, for a minute, saves, and loads that into a new process. Steps are
matrix products, without gradients of all those parameters, so that 13 GB of memory are enough. Revisions alternate, each
run in a process of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"hidden_size": 896, "num_hidden_layers": 24, "intermediate_size": 4864, "vocab_size": 151936}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "vocab_size": 1000}
STEP_S = 3.0  # of a step without a save, about
SAVED_AT = 20  # after a minute, as nobody saves earlier


def peak_memory(stop: threading.Event, into: dict[str, float]) -> None:
    """Note the most memory of this process's own, in GB, without what is mapped from files."""
    while not stop.wait(0.02):
        lines = Path("/proc/self/status").read_text().splitlines()
        own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        into["peak_gb"] = max(into.get("peak_gb", 0.0), own * 1024 / 1e9)


def make_trainer(folder: Path, precision: str, tiny: bool, with_state: bool, after_step: Callable[[int], None]) -> Any:
    """A run whose model and optimizer have the size in question, and whose steps are cheap."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from llm_trainer import BaseTrainer, Hook

    shape: dict[str, Any] = {**(TINY if tiny else SHAPE), "num_attention_heads": 14, "num_key_value_heads": 2}
    if tiny:
        shape |= {"num_attention_heads": 4}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
    model.to_empty(device="cpu")
    model.tie_weights()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model.to(dtype)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=noise)
        for buffer in model.buffers():
            buffer.fill_(1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    if with_state:
        for parameter in model.parameters():
            moments = {name: parameter.detach().abs() for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(100.0), **moments}

    class Products(BaseTrainer):
        """Its loss knows one small parameter; the rest of a step is matrix products."""

        def _prepare_batch(self, batch: Any) -> Any:
            return batch

        def _forward(self, batch: Any) -> Any:
            until, square = time.perf_counter() + (0.01 if tiny else STEP_S), torch.ones(256, 256)
            while time.perf_counter() < until:
                square @ square
            return model.model.norm.weight.float().sum()

        def _compute_loss(self, outputs: Any, batch: Any) -> Any:
            return outputs * 1e-9

    return Products(
        model=model,
        optimizer=optimizer,
        train_loader=[{"input_ids": torch.zeros(1, 1, dtype=torch.long)}],
        max_epochs=1000,
        max_steps=SAVED_AT + 2,
        save_interval=0,
        save_interval_steps=SAVED_AT,
        save_dir=str(folder),
        device="cpu",
        use_amp=False,
        progress=False,
        hooks=[Hook("watch", lambda run: after_step(run.progress.step), every_steps=1)],
    )


def save(folder: Path, precision: str, tiny: bool) -> dict[str, float]:
    """Train until the checkpoint is on the disk; seconds that the loop stood still for it, and until it was there."""
    found: dict[str, float] = {}
    done, began = folder / f"checkpoint-{SAVED_AT:08d}" / "manifest.json", 0.0

    def after_step(step: int) -> None:
        """At the step after the save: go on computing until it is on the disk, then leave."""
        if step != SAVED_AT + 1:
            return
        while not done.exists():
            trainer._forward(None)
        found["on_disk_s"] = time.perf_counter() - began
        raise SystemExit(0)

    trainer = make_trainer(folder, precision, tiny, True, after_step)
    run, save_hook = trainer.run, trainer.run._save

    def timed_save() -> None:
        nonlocal began
        began = time.perf_counter()
        save_hook()
        found["stands_still_s"] = time.perf_counter() - began

    run._save = timed_save
    with watched(found), suppress(SystemExit):
        trainer.train()
    return found


def load(folder: Path, precision: str, tiny: bool) -> dict[str, float]:
    """Seconds to go on from the checkpoint, in a process that has a model and an empty optimizer."""
    found: dict[str, float] = {}
    trainer = make_trainer(folder, precision, tiny, False, lambda step: None)
    with watched(found):
        began = time.perf_counter()
        trainer.load_checkpoint(str(folder / f"checkpoint-{SAVED_AT:08d}"))
        found["load_s"] = time.perf_counter() - began
    return found


@contextmanager
def watched(into: dict[str, float]) -> Iterator[None]:
    stop = threading.Event()
    watcher = threading.Thread(target=peak_memory, args=(stop, into))
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def run_child(source: Path, what: str, folder: Path, precision: str, tiny: bool) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(source / "src")}
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--precisions", precision]
    if tiny:
        command.append("--tiny")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{what} in {source} failed:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def report(sources: dict[str, Path], precision: str, tiny: bool, work: Path) -> None:
    """Run every revision once, one after the other, and print its row."""
    for name, source in sources.items():
        folder = work / f"{name}-{precision}"
        saved = run_child(source, "save", folder, precision, tiny)
        loaded = run_child(source, "load", folder, precision, tiny)
        size = sum(path.stat().st_size for path in folder.glob("checkpoint-*/**/*") if path.is_file()) / 1e9
        shutil.rmtree(folder)
        print(
            f"| {precision} | {name} | {size:.1f} | {saved['stands_still_s']:.1f} | {saved['on_disk_s']:.1f} | "
            f"{saved['peak_gb']:.1f} | {loaded['load_s']:.1f} | {loaded['peak_gb']:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", help="another revision, measured in the same run")
    parser.add_argument("--precisions", default="fp32,bf16", help="of weights and optimizer state")
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script")
    parser.add_argument("--work", help="folder for the checkpoints (by default a temporary one)")
    parser.add_argument("--child", choices=["save", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        done = {"save": save, "load": load}[options.child](options.folder, options.precisions, options.tiny)
        print(json.dumps(done))
        return
    print(
        "| weights and state | revision | GB | stands still, s | on the disk after, s | peak, GB | load, s | peak, GB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.work) as name:
        work, sources = Path(name), {"this": ROOT}
        if options.against:
            other = work / "other"
            other.mkdir()
            archive = subprocess.run(["git", "archive", options.against, "src"], cwd=ROOT, stdout=subprocess.PIPE)
            subprocess.run(["tar", "-x", "-C", str(other)], input=archive.stdout, check=True)
            sources = {options.against: other, "this": ROOT}
        for precision in options.precisions.split(","):
            report(sources, precision, options.tiny, work)


if __name__ == "__main__":
    main()
