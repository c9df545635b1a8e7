"""What each engine costs: the same model, rows and optimizer, in alternating rounds, every process on one thread.

`python benchmarks/engines.py` starts every case once per round, in processes of its own, and prints tokens per second,
peak memory of a process, and ratios within a round: of one process to the plain engine, of two to DDP, and of DDP with
two processes to one process. One thread per process, so that one and two processes are compared on one and two cores.
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
SHAPE: dict[str, Any] = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
VOCABULARY, CONTEXT, ROWS_PER_PROCESS = 6400, 512, 4
TIMEOUT_S = 900


class Rows:
    """Random ids, every row as long as the context."""

    def __init__(self, number: int) -> None:
        import numpy as np

        self.lengths = np.full(number, CONTEXT)
        self.file_sizes = [number]

    def __getitem__(self, index: int) -> dict[str, Any]:
        import numpy as np

        ids = np.random.default_rng(index).integers(16, VOCABULARY, CONTEXT)
        return {"input_ids": ids, "trained": np.ones(CONTEXT, dtype=bool), "document_lengths": [CONTEXT]}


def run(case: str, precision: str, warmup: int, steps: int, out: Path) -> None:
    """Train, and write the median time of a step and the peak memory of this process: as much work per process in all cases."""
    import torch

    from llm_trainer import SFTTrainer, configure_optimizer
    from llm_trainer.config.schema import ModelConfig
    from llm_trainer.data.collate import collate_padded
    from llm_trainer.data.stream import SampleStream
    from llm_trainer.engine import dist
    from llm_trainer.hooks import Hook
    from llm_trainer.models.build import build_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    processes, options = CASES[case]
    if processes > 1:
        dist.start(torch.device("cpu"))
    model = build_model(ModelConfig(vocab_size=VOCABULARY, **SHAPE))
    rows = ROWS_PER_PROCESS * processes
    stream = SampleStream(
        Rows(rows * (warmup + steps + 1)),
        collate_padded,
        rows_per_step=rows,
        batch_size=ROWS_PER_PROCESS,
        rank=dist.rank(),
        world_size=processes,
    )
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model=model,
            optimizer=configure_optimizer(model=model, lr=3e-4),
            train_loader=stream,
            device="cpu",
            max_epochs=1,
            max_steps=warmup + steps + 1,
            precision=precision,
            save_interval=0,
            save_dir=folder,
            progress=False,
            hooks=[Hook("clock", lambda run: ends.append(time.perf_counter()), every_steps=1)],
            **options,
        ).train()
    if dist.is_main():
        took = [b - a for a, b in zip(ends[warmup - 1 :], ends[warmup : warmup + steps], strict=False)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        out.write_text(json.dumps({"tokens_per_second": rows * CONTEXT / statistics.median(took), "peak": peak}))
    dist.stop()


def start(case: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One run of a case, in processes of its own."""
    processes, _ = CASES[case]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        sizes = [arguments.precision, str(arguments.warmup), str(arguments.steps), str(out)]
        command = [sys.executable, *launch, __file__, "--one", case, *sizes]
        quiet = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
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
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {case: [] for case in arguments.cases}
    for number in range(arguments.rounds):
        for case in arguments.cases:
            runs[case].append(start(case, arguments))
            speed = runs[case][-1]["tokens_per_second"]
            print(f"round {number + 1}  {case:<10} {speed:7.0f} tokens/s", file=sys.stderr, flush=True)
    print("| engine | tokens/s, median | peak of a process, GiB | to | ratio, median (lowest - highest) |")
    print("|---|---|---|---|---|")
    for case, results in runs.items():
        base = BASE[CASES[case][0]] if case != "ddp x2" else "torch"
        ratios = [
            r["tokens_per_second"] / b["tokens_per_second"] for r, b in zip(results, runs.get(base, []), strict=False)
        ]
        speed, peak = (statistics.median(r[key] for r in results) for key in ("tokens_per_second", "peak"))
        ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else ""
        print(f"| {case} | {speed:.0f} | {peak / 2**30:.2f} | {base} | {ratio} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), Path(sys.argv[6]))
    else:
        main()
