"""Training throughput against peers: the same weights, rows, optimizer and precision, in alternating rounds.

`python benchmarks/train_throughput.py` makes an environment per peer under `.bench/`, then runs every peer once per
round, each in a process of its own, and prints medians and ratios. Ratios are taken within a round: what else the
machine does changes over minutes, and both halves of a ratio see about the same of it.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import venv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
BENCH, RUNNERS = REPO / ".bench", REPO / "benchmarks" / "peers"
SHARED = REPO.parent / "shared" / "data"  # optional: real alpaca rows lie beside the checkout, as for the tests
DENSE, RAGGED = ("dense6400", "dense32000"), ("sft", "alpaca")
TIMEOUT_S = 1800
# What a CPU without AMX, AVX-512 and products in bfloat16 would run, on one that has them.
POOR_CPU = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
Runs = dict[tuple[str, int], dict]  # (peer, round) -> what its runner printed

# torch goes in first and alone, and the constraints keep it: later requirements must not bring a CUDA build.
ENVIRONMENTS: dict[str, list[list[str]]] = {
    "transformers": [["transformers==5.23.0", "accelerate==1.15.0"]],
    "trl": [["transformers==5.23.0", "accelerate==1.15.0", "trl==1.16.0", "peft==0.21.2", "datasets>=5,<6"]],
    "trl-images": [
        ["transformers==5.23.0", "accelerate==1.15.0", "trl==1.16.0", "peft==0.21.2", "datasets>=5,<6", "pillow"]
    ],
    # This package as pip installs it: what transformers finds beside it (scipy, accelerate, ...) it imports too.
    "plain": [["-e", str(REPO)]],
    # Its requirement deepspeed is optional in its code, so dependencies are named here.
    "pypi": [
        ["numpy", "packaging", "safetensors"],
        ["--no-deps", "project_llm_trainer==0.24.10", "project_llm_model==0.11.7", "nano_tokenizer==0.1.2"],
    ],
}


@dataclass(frozen=True)
class Peer:
    """One line of the table: a runner script, the environment it runs in ("" is this one), and what it can do."""

    script: str
    environment: str = ""
    cases: tuple[str, ...] = DENSE + RAGGED
    precisions: tuple[str, ...] = ("fp32", "bf16")


PEERS = {
    "hand": Peer("hand_loop.py"),
    "transformers": Peer("transformers_trainer.py", "transformers"),
    "trl": Peer("transformers_trainer.py", "trl"),
    "trl-stored": Peer("transformers_trainer.py", "trl"),
    "trl-packed": Peer("transformers_trainer.py", "trl", RAGGED),
    "trl-packed-stored": Peer("transformers_trainer.py", "trl", RAGGED),
    "pypi": Peer("pypi_trainer.py", "pypi", DENSE, ("fp32",)),
    "ours-equal": Peer("ours.py"),
    "ours-best": Peer("ours.py"),
    "ours-default": Peer("ours.py", cases=("alpaca",)),
    "ours-default-objects": Peer("ours.py"),
}
DEFAULTS = ("ours-default", "ours-default-objects")
BASELINES = ("hand", "transformers", "trl", "trl-packed", "ours-best")
GOALS = [  # cases, precision, peer, baseline, ratio of real tokens per second
    (DENSE + RAGGED, ("fp32", "bf16"), "ours-equal", "hand", 0.98),
    (DENSE, ("bf16",), "ours-best", "transformers", 1.25),
    (("dense32000",), ("bf16",), "ours-best", "trl", 2.5),
    (RAGGED, ("bf16",), "ours-best", "trl", 2.5),
    (RAGGED, ("bf16",), "ours-best", "trl-packed", 1.1),
    *((("alpaca",), ("fp32", "bf16"), peer, "trl", 3.5) for peer in DEFAULTS),
    *((("alpaca",), ("fp32", "bf16"), peer, "trl-packed", 3.0) for peer in DEFAULTS),
    *((DENSE + RAGGED, ("fp32", "bf16"), peer, "ours-best", 0.95) for peer in DEFAULTS),
]
STARTUP_GOALS = {"import llm_trainer": 0.2, "llm-trainer --help": 0.3}


def python_of(environment: str) -> str:
    """The interpreter of an environment, made first if it does not exist or its requirements changed."""
    if not environment:
        return sys.executable
    folder, stamp = BENCH / environment, json.dumps(ENVIRONMENTS[environment])
    python, ready = folder / "bin" / "python", folder / "requirements.json"
    if not ready.is_file() or ready.read_text(encoding="utf-8") != stamp:
        print(f"making the environment {folder.relative_to(REPO)}", flush=True)
        venv.create(folder, with_pip=True, clear=True)
        for requirements in [["torch==2.13.0"], *ENVIRONMENTS[environment]]:
            pip = [str(python), "-m", "pip", "install", "-q", "-c", str(REPO / "constraints.txt")]
            subprocess.run([*pip, *requirements], check=True)
        ready.write_text(stamp, encoding="utf-8")
    return str(python)


def prepare_work() -> Path:
    """Weights and rows that all peers read, made anew where what makes them has changed."""
    work = BENCH / "work"
    ready, stamp = work / "ready", hashlib.sha256((RUNNERS / "workload.py").read_bytes()).hexdigest()
    if not ready.is_file() or ready.read_text(encoding="utf-8") != stamp:
        real = [SHARED / "tokenizer" / "minimind" / "tokenizer.json", SHARED / "sft" / "alpaca_en.json"]
        paths = [str(path) for path in real] if all(path.is_file() for path in real) else []
        subprocess.run([sys.executable, str(RUNNERS / "workload.py"), str(work), *paths], check=True)
        ready.write_text(stamp, encoding="utf-8")
    return work


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """How a benchmark of this CPU is run and timed; `environment_of` reads it."""
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--poor-cpu", action="store_true", help="with the instructions of AVX2 alone")
    parser.add_argument(
        "--clock",
        choices=["seconds", "cpu_seconds"],
        default="seconds",
        help="of speeds and ratios; processor time is the steadier one on a machine that others use too, with one thread",
    )


def environment_of(options: argparse.Namespace) -> dict[str, str]:
    """The environment variables of every run."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    poor = POOR_CPU if options.poor_cpu else {}
    return {**os.environ, **quiet, **poor, "OMP_NUM_THREADS": str(options.threads)}


def printed(peer: str, command: list[str], environment: dict[str, str], cwd: Path | None = None) -> dict[str, Any]:
    """The line of numbers that a run printed, in a fresh process.

    Raises:
        RuntimeError: it failed; the message is the end of its errors.
    """
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"peer"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{peer} failed (exit code {done.returncode}):\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def printed_or_none(peer: str, command: list[str], environment: dict[str, str], cwd: Path) -> dict[str, Any] | None:
    """The same; None (and the end of its errors on the screen) when it fails, so that the others go on."""
    try:
        return printed(peer, command, environment, cwd)
    except RuntimeError as error:
        print(error, flush=True)
        return None


def run_job(peer: str, job: dict[str, object], environment: dict[str, str]) -> dict | None:
    """One timed run in a fresh process; None when it fails."""
    command = [python_of(PEERS[peer].environment), str(RUNNERS / PEERS[peer].script), json.dumps(job)]
    return printed_or_none(peer, command, environment, BENCH / "work")


def spread(values: list[float], digits: int) -> str:
    """Median, with lowest and highest."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def speed(run: dict, clock: str = "seconds") -> float:
    """Real tokens per second of the wall clock, or of processor time (`clock="cpu_seconds"`)."""
    return run["tokens"] / run[clock]


def ratios(runs: Runs, peer: str, baseline: str, clock: str) -> list[float]:
    """Speed of `peer` over `baseline`, round by round."""
    rounds = sorted(number for name, number in runs if name == peer and (baseline, number) in runs)
    return [speed(runs[peer, number], clock) / speed(runs[baseline, number], clock) for number in rounds]


def print_table(case: str, precision: str, runs: Runs, clock: str) -> None:
    """One case at one precision, and the goals that belong to it."""
    peers = [name for name in PEERS if any(peer == name for peer, _ in runs)]
    baselines = [name for name in BASELINES if name in peers]
    print(f"\n### {case}, {precision} (ratios of {clock})\n")
    heads = ["peer", "tokens/s", "tokens/CPU s", "peak GiB", *(f"/ {name}" for name in baselines), "first losses"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for peer in peers:
        mine = [run for (name, _), run in runs.items() if name == peer]
        cells = [peer, *(spread([speed(run, c) for run in mine], 0) for c in ("seconds", "cpu_seconds"))]
        cells.append(f"{max(run['peak_rss'] for run in mine) / 2**30:.2f}")
        for baseline in baselines:
            pairs = [] if baseline == peer else ratios(runs, peer, baseline, clock)
            cells.append(spread(pairs, 2) if pairs else "")
        cells.append(" ".join(f"{loss:.4f}" for loss in mine[0]["losses"]))
        print("| " + " | ".join(cells) + " |")
    print()
    for cases, precisions, peer, baseline, goal in GOALS:
        pairs = ratios(runs, peer, baseline, clock)
        if case in cases and precision in precisions and pairs:
            print_goal(f"{peer} / {baseline}", statistics.median(pairs), goal)
    print_memory_goals({peer: [run["peak_rss"] for (name, _), run in runs.items() if name == peer] for peer in peers})


def print_goal(name: str, reached: float, goal: float, at_most: bool = False) -> None:
    """One line: whether a number is as high as it should be, or as low."""
    is_reached = reached <= goal if at_most else reached >= goal
    print(f"- {'reached' if is_reached else 'NOT REACHED'}: {name} {reached:.2f}, goal {goal:.2f}")


def print_memory_goals(peaks: dict[str, list[float]]) -> None:
    """Whether the defaults take no more memory than the peer that takes least; `peaks` in bytes, of each peer's runs."""
    others = [max(found) for peer, found in peaks.items() if not peer.startswith("ours")]
    for peer, found in peaks.items():
        if peer.startswith("ours-default") and others:
            print_goal(f"{peer}, peak GiB", max(found) / 2**30, min(others) / 2**30, at_most=True)


def print_startup(rounds: int) -> None:
    """Seconds of an import in a running interpreter, and of a command from start to end; the best of all rounds."""
    help_command = [str(Path(sys.executable).parent / "llm-trainer"), "--help"]
    programs = {
        "import llm_trainer": "import llm_trainer",
        "llm-trainer --help": f"subprocess.run({help_command!r}, stdout=subprocess.DEVNULL, check=True)",
    }
    print("\n### start-up\n")
    for name, statement in programs.items():
        timed = f"import subprocess, time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        done = [subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True) for _ in range(rounds)]
        if any(run.returncode for run in done):
            print(f"{name}: failed\n{done[0].stderr[-500:]}")
            continue
        best, goal = min(float(run.stdout) for run in done), STARTUP_GOALS[name]
        print(f"{'reached' if best < goal else 'NOT REACHED'}: {name} {best:.3f} s, goal {goal} s")


IMPORTS = "import torch, transformers"
MODEL_CLASS = "from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM"
FIRST_STEP_GOAL = 3.0  # seconds more than the imports
MARKS = {"screen": "trainer ", "first step": "step 1/"}  # how the line begins by which each is there


def print_first_step(rounds: int) -> None:
    """From the command to the first step, when the rows have been encoded before, against what any program must import.

    Seconds of the wall clock and of the processor, medians of alternating rounds.
    """
    tokenizer, rows = SHARED / "tokenizer" / "minimind", SHARED / "sft" / "alpaca_en.json"
    if not (tokenizer.is_dir() and rows.is_file()):
        print("from the command to the first step: its rows are not beside this checkout, skipped")
        return
    folder = BENCH / "first_step"
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_config": {"vocab_size": 6400, "hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8},
        "tokenizer": str(tokenizer),
        "file_dataset": [str(rows)],
        "dataset_block_size": 512,
        "sft_config": {},
        "data_loader_config": {"cache_dir": str(folder / "stores")},
        "run_config": {"save_dir": str(folder / "run"), "resume": "never", "max_steps": 1, "progress": False}
        | {"log_interval": 1, "device": "cpu"},
    }
    (folder / "run.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    python = python_of("plain")
    train = [python, "-m", "llm_trainer.cli.main", "train", str(folder / "run.yaml")]
    programs = {
        "imports": [python, "-c", f"{IMPORTS}; print('done')"],
        "imports and a model's class": [python, "-c", f"{IMPORTS}; {MODEL_CLASS}; print('done')"],
        "llm-trainer train": train,
    }
    seconds_until(train, MARKS)  # encodes the rows
    found = defaultdict(list)
    for _ in range(rounds):
        for name, command in programs.items():
            marks = MARKS if command is train else {"": "done"}
            for mark, both in seconds_until(command, marks).items():
                found[f"{name} {mark}".strip()].append(both)
    print("\n### from the command to the first step\n\n| | wall s | processor s |\n|---|---|---|")
    for name, pairs in found.items():
        wall, processor = zip(*pairs, strict=True)
        print(f"| {name} | {spread(list(wall), 1)} | {spread(list(processor), 1)} |")
    more = [
        step[1] - imports[1]
        for step, imports in zip(found["llm-trainer train first step"], found["imports"], strict=True)
    ]
    reached = "reached" if statistics.median(more) < FIRST_STEP_GOAL else "NOT REACHED"
    print(f"\n{reached}: {spread(more, 1)} processor s more than the imports, goal {FIRST_STEP_GOAL}")


def seconds_until(command: list[str], marks: dict[str, str]) -> dict[str, tuple[float, float]]:
    """Seconds of the wall clock and of the processor from the start of a command until it prints a line that begins so."""
    found = {}
    began = time.perf_counter()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    # With it our modules, unlike those that pip installs, would be compiled at each start.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for mark, beginning in marks.items():
                if line.strip().startswith(beginning) and mark not in found:
                    # Fields 14 and 15 of https://man7.org/linux/man-pages/man5/proc_pid_stat.5.html, behind the name.
                    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
                    ticks = int(fields[11]) + int(fields[12])
                    found[mark] = time.perf_counter() - began, ticks / os.sysconf("SC_CLK_TCK")
    return found


def _names(text: str) -> list[str]:
    return text.split(",")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default=[*DENSE, "sft", "alpaca", "startup"], type=_names)
    parser.add_argument("--peers", default=list(PEERS), help=f"of {', '.join(PEERS)}", type=_names)
    parser.add_argument("--precisions", default=["fp32", "bf16"], type=_names)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps of about 4,000 tokens per run")
    parser.add_argument("--warmup", type=int, default=3)
    add_machine_options(parser)
    parser.add_argument("--results", type=Path, default=BENCH / "results.jsonl", help="every run is appended here")
    options = parser.parse_args()
    for name, known in (("cases", {*DENSE, *RAGGED, "startup"}), ("peers", set(PEERS))):
        if unknown := set(getattr(options, name)) - known:
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is unknown; known: {', '.join(sorted(known))}")
    return options


def main() -> None:
    """Run what the command line asks for."""
    options = arguments()
    if "startup" in options.cases:
        print_startup(options.rounds)
        print_first_step(options.rounds)
    work = prepare_work()
    tables: dict[tuple[str, str], Runs] = defaultdict(dict)
    plan = [(case, precision) for case in options.cases if case != "startup" for precision in options.precisions]
    for case, precision in plan:
        if not (work / f"{case}.npz").is_file():
            print(f"{case}: its rows are not beside this checkout, skipped")
            continue
        able = [p for p in options.peers if case in PEERS[p].cases and precision in PEERS[p].precisions]
        for number in range(options.rounds):
            for peer in able if number % 2 == 0 else reversed(able):  # nobody is always first
                job = {"peer": peer, "case": case, "precision": precision, "folder": str(work)}
                run = run_job(peer, {**job, "warmup": options.warmup, "steps": options.steps}, environment_of(options))
                if run is not None:
                    tables[case, precision][peer, number] = run
                    print(f"round {number + 1} {case} {precision} {peer}: {speed(run):.0f} tokens/s", flush=True)
                    with options.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps({**run, "round": number}) + "\n")
        print_table(case, precision, tables[case, precision], options.clock)


if __name__ == "__main__":
    main()
