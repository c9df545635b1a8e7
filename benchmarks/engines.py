"""What each engine costs: the same model, rows and optimizer, in alternating rounds, every process on one thread.

`python benchmarks/engines.py` starts every case once per round, in processes of its own, and prints tokens per second,
peak memory of a process, and ratios within a round: of one process to the plain engine, of two to DDP, and of DDP with
two processes to one process. One thread per process, so that one and two processes are compared on one and two cores.

On a GPU: `python benchmarks/engines.py --device cuda --model 0.6b --context 4096 --precision bf16 --compile`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CASES: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, options of the trainer
    "torch": (1, {}),
    "hf": (1, {"engine": "hf"}),
    "zero-0": (1, {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 0}}}),
    "ddp x2": (2, {}),
    "hf x2": (2, {"engine": "hf"}),
    "fsdp x2": (2, {"engine": "fsdp"}),
    **{
        f"zero-{stage} x2": (2, {"engine": "deepspeed", "deepspeed": {"zero_optimization": {"stage": stage}}})
        for stage in range(4)
    },
}
BASE = {1: "torch", 2: "ddp x2"}
SHAPES: dict[str, dict[str, Any]] = {  # Qwen3-shaped; 0.6b is Qwen3-0.6B, 1.7b is Qwen3-1.7B
    "tiny": {"vocab_size": 6400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2},
    "27m": {"vocab_size": 6400, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 4},
    "0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096},
    "1.7b": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 4096},
}
SMALLEST_VOCABULARY = 6400
TIMEOUT_S = 900


class Rows:
    """Random ids, every row as long as the context."""

    def __init__(self, number: int, context: int) -> None:
        import numpy as np

        self.lengths = np.full(number, context)
        self.file_sizes, self.context = [number], context

    def __getitem__(self, index: int) -> dict[str, Any]:
        import numpy as np

        ids = np.random.default_rng(index).integers(16, SMALLEST_VOCABULARY, self.context)
        return {"input_ids": ids, "trained": np.ones(self.context, dtype=bool), "document_lengths": [self.context]}


def run(case: str, how: dict[str, Any], out: Path) -> None:
    """Train, and write the median speed and the peak memory of this process: as much work per process in all cases."""
    import torch

    from llm_trainer import SFTTrainer, configure_optimizer
    from llm_trainer.config.model import ModelConfig
    from llm_trainer.data.collate import collate_padded
    from llm_trainer.data.stream import SampleStream
    from llm_trainer.engine import dist
    from llm_trainer.engine.device import detect_device
    from llm_trainer.models.attention import resolve_attention
    from llm_trainer.models.build import build_model
    from llm_trainer.train.hooks import Hook
    from llm_trainer.train.size import peak_flops

    torch.set_num_threads(1)
    torch.manual_seed(0)
    (processes, options), warmup, steps = CASES[case], how["warmup"], how["steps"]
    device = detect_device(how["device"])
    if processes > 1:
        dist.start(device)
    model = build_model(ModelConfig(**SHAPES[how["model"]]), attention=resolve_attention("auto", device))
    if options.get("engine") in (None, "hf"):
        torch.nn.Module.to(model, device)  # so that the optimizer has the kernels of the device
    rows = how["rows"] * processes
    stream = SampleStream(
        Rows(rows * (warmup + steps + 1), how["context"]),
        collate_padded,
        rows_per_step=rows,
        batch_size=how["rows"],
        rank=dist.rank(),
        world_size=processes,
    )
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            optimizer=configure_optimizer(model=model, lr=3e-4),
            train_loader=stream,
            device=how["device"],
            max_epochs=1,
            max_steps=warmup + steps + 1,
            precision=how["precision"],
            compile=how["compile"],
            save_interval=0,
            save_dir=folder,
            progress=False,
            hooks=[Hook("clock", lambda run: ends.append(time.perf_counter()), every_steps=1)],
            **options,
        )
        trainer.train()
    if dist.is_main():
        took = [b - a for a, b in zip(ends[warmup - 1 :], ends[warmup : warmup + steps], strict=False)]
        on_gpu = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        speed = rows * how["context"] / statistics.median(took)
        flops = (trainer.run.size.flops_per_token or 0.0) * speed
        found = {"tokens_per_second": speed, "mfu": flops / (peak_flops(trainer.run.engine) * processes)}
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        out.write_text(json.dumps(found | {"peak": on_gpu or resident}))
    dist.stop()


def start(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One run of a case, in processes of its own."""
    processes, _ = CASES[case]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [sys.executable, *launch, __file__, "--one", case, json.dumps(vars(arguments)), str(out)]
        quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": arguments.device}
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ | quiet)
        if done.returncode:
            raise RuntimeError(f"{case} failed:\n{done.stderr[-3000:]}")
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--model", default="27m", choices=list(SHAPES))
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4, help="of a step, per process")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in arguments.cases}
    for number in range(arguments.rounds):
        for case in arguments.cases:
            runs[case].append(start(case, arguments))
            speed = runs[case][-1]["tokens_per_second"]
            print(f"round {number + 1}  {case:<10} {speed:7.0f} tokens/s", file=sys.stderr, flush=True)
    print("| engine | tokens/s, median | MFU | peak of a process, GiB | to | ratio, median (lowest - highest) |")
    print("|---|---|---|---|---|---|")
    for case, results in runs.items():
        base = BASE[CASES[case][0]] if case != "ddp x2" else "torch"
        ratios = [
            r["tokens_per_second"] / b["tokens_per_second"] for r, b in zip(results, runs.get(base, []), strict=False)
        ]
        names = ("tokens_per_second", "mfu", "peak")
        speed, mfu, peak = (statistics.median(r[name] for r in results) for name in names)
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else ""
        print(f"| {case} | {speed:.0f} | {mfu:.0%} | {peak / 2**30:.2f} | {base} | {ratio} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run(sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
