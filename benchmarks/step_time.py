"""Where the time of a training step goes, and what share of a timed matrix product it reaches.

`python benchmarks/step_time.py` trains the 27 M model on real alpaca rows with no option given, each precision in a
process of its own, and takes apart the steps after the warm-up with `torch.profiler`. It prints a table, keeps it in
`.bench/step_time.json` beside what other devices gave, and draws all of it: `--picture FILE` (needs matplotlib).

The share is that of model FLOPs: products of the layers for every token, of the head for every label, and attention
between tokens of one document that may see each other; each multiplication counts three times, twice for the backward.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peers.steady import LONG, Pace
from train_throughput import BENCH, RUNNERS, add_machine_options, environment_of, prepare_work

KEPT = BENCH / "step_time.json"
PARTS = ("matrix products", "attention", "head and loss", "optimizer", "rest")
# What the profiler calls them: the first of these around an operator says where its time belongs.
ATTENTION = ("llm_trainer::document_attention", "flash_attention", "_efficient_attention", "scaled_dot_product")
HEAD = ("_LossSum", "_Logprobs")
OPTIMIZER = ("Optimizer.step",)
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "mkldnn::_linear", "mkl::_mkl_linear", "cpp_CppMicroGemm")


def part_of(event: Any) -> str:
    """Which of `PARTS` the own time of a profiled operator belongs to."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for part, marks in (("attention", ATTENTION), ("head and loss", HEAD), ("optimizer", OPTIMIZER)):
        if any(mark in name for name in names for mark in marks):
            return part
    return "matrix products" if names[0].startswith(PRODUCTS) else "rest"


def seconds_of_parts(events: Iterable[Any], on_device: bool) -> dict[str, float]:
    """Own time of all operators by part; of a GPU that of its kernels, on a CPU that of the thread that computes."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        own = event.self_device_time_total if on_device else event.self_cpu_time_total
        seconds[part_of(event)] += own / 1e6
    return seconds


class Watch:
    """A hook that times `steps` steps as they are, then as many under the profiler, and ends the run.

    Attributes:
        first: steps before the timed ones; None: the run does not yet go as it will go on.
        seconds: of the timed steps, of the clock that was asked for.
        tokens: of the timed steps.
        profiled_seconds: of the steps under the profiler.
        parts: seconds of these by part.
    """

    def __init__(self, steps: int, clock: Callable[[], float]) -> None:
        self.steps, self._clock, self._pace = steps, clock, Pace()
        self.first: int | None = None
        self.seconds = self.profiled_seconds = self._start = 0.0
        self.tokens = 0
        self.parts: dict[str, float] = {}
        self._profile: Any = None

    def __call__(self, run: Any) -> None:
        """A step is done."""
        from torch.profiler import ProfilerActivity, profile

        step, now, on_device = run.progress.step, time.perf_counter(), run.trainer.device.type == "cuda"
        spent = self._clock()
        is_steady = self._pace.is_steady(run)
        if self.first is None:
            if is_steady:
                self.first, self._start, self.tokens = step, spent, -run.progress.tokens
        elif step == self.first + self.steps:
            self.seconds = spent - self._start
            self.tokens += run.progress.tokens
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
            self._start = time.perf_counter()
        elif step == self.first + 2 * self.steps:
            self.profiled_seconds = now - self._start
            self._profile.stop()
            self.parts = seconds_of_parts(self._profile.events(), on_device)
            run.stop("measured")


def model_flops(job: Any, steps: range) -> float:
    """Of the rows of some steps of a `workload.Job`, as the first lines of this file say."""
    from workload import IGNORE, SHAPE

    width, layers = SHAPE["hidden_size"], SHAPE["num_hidden_layers"]
    queries = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    keys = SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    of_layer = width * (2 * queries + 2 * keys + 3 * SHAPE["intermediate_size"])  # multiplications per token
    rows, total = job.rows(), 0.0
    for step in steps:
        first = step * job.rows_per_step % len(rows)  # the rows begin anew after their last whole step
        for row in rows[first : first + job.rows_per_step]:
            length, labels = len(row["input_ids"]), int((row["labels"][1:] != IGNORE).sum())
            pairs = length * (length + 1) / 2  # of a token and one that it sees
            total += layers * (length * of_layer + 2 * pairs * queries) + labels * width * job.vocabulary
    return 6 * total


def measure(precision: str, steps: int, clock: str) -> dict[str, Any]:
    """Train, in this process; what the steps took."""
    import torch
    from ours import described
    from workload import Job

    from llm_trainer.train.size import peak_flops

    job = Job("ours-default", "alpaca", precision, 0, LONG, str(BENCH / "work"))
    clocks = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}
    watch = Watch(steps, clocks[clock])
    with tempfile.TemporaryDirectory() as folder:
        trainer = described(job, folder, watch)
        trainer.train()
        peak = peak_flops(trainer.run.engine)
        choices = {name: choice.value for name, choice in trainer.run.choices.items()}
    assert watch.first is not None
    device = trainer.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    # What no operator says (Python between them, waiting) is the rest.
    shares = {part: found / watch.profiled_seconds for part, found in watch.parts.items()}
    shares["rest"] = 1 - sum(found for part, found in shares.items() if part != "rest")
    return {
        "device": name,
        "precision": precision,
        "choices": choices,
        "tokens_per_second": watch.tokens / watch.seconds,
        "shares": shares,
        "peak_flops": peak,
        "of_peak": model_flops(job, range(watch.first, watch.first + steps)) / (watch.seconds * peak),
    }


def print_table(found: list[dict[str, Any]]) -> None:
    """One line per device and precision."""
    heads = ["device", "precision", "tokens/s", *PARTS, "TFLOP/s of a matrix product", "share of it"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for one in found:
        cells = [one["device"], one["precision"], f"{one['tokens_per_second']:,.0f}"]
        cells += [f"{one['shares'][part]:.0%}" for part in PARTS]
        cells += [f"{one['peak_flops'] / 1e12:.2f}", f"{one['of_peak']:.0%}"]
        print("| " + " | ".join(cells) + " |")


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """A bar for each device and precision: the parts of a step, and a mark where it would end at the speed of a product."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "step_time"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.6 * len(found)))
    names = [f"{one['device']}\n{one['precision']}" for one in found]
    left = [0.0] * len(found)
    for part in PARTS:
        widths = [100 * one["shares"][part] for one in found]
        bars = axes.barh(names, widths, left=left, label=part, height=0.6)
        axes.bar_label(bars, [f"{width:.0f}" if width >= 4 else "" for width in widths], label_type="center")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for number, one in enumerate(found):
        reached = 100 * one["of_peak"]
        axes.plot([reached, reached], [number - 0.36, number + 0.36], color="black", linewidth=2)
    axes.plot([], [], color="black", linewidth=2, label="all of it at the speed of a product")
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of a step's time")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.28), ncols=3, frameon=False)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--precisions", default=["fp32", "bf16"], type=lambda text: text.split(","))
    parser.add_argument("--steps", type=int, default=5, help="of 16 rows, timed and then profiled")
    add_machine_options(parser)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--picture", type=Path, help="an .svg of all that was measured so far")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what the driver gives to the processes it starts
    options = parser.parse_args()
    if options.job:
        sys.path.insert(0, str(RUNNERS))
        print(json.dumps(measure(options.job, options.steps, options.clock)))
        return
    prepare_work()
    kept: dict[str, dict[str, Any]] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    environment = environment_of(options)
    if options.device == "cuda":
        del environment["CUDA_VISIBLE_DEVICES"]
    for precision in options.precisions:
        command = [sys.executable, __file__, *sys.argv[1:], "--job", precision]
        lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        one = json.loads(lines.splitlines()[-1])
        if options.poor_cpu:
            one["device"] += ", AVX2"
        kept[f"{one['device']}, {precision}"] = one
        KEPT.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    print_table(list(kept.values()))
    if options.picture:
        draw(list(kept.values()), options.picture)


if __name__ == "__main__":
    main()
