"""Preparing data against `datasets.map`: the same rows, tokenizer and template, in alternating rounds.

`python benchmarks/prepare.py` makes an environment for `datasets` under `.bench/`, writes rows and a tokenizer, then runs each
case once per round, each in a process of its own, and prints medians and ratios within rounds. Memory is the peak of the
proportional set size of the whole process tree: what forks share counts once.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
BENCH, PEER = REPO / ".bench", REPO / "benchmarks" / "peers" / "datasets_map.py"
SHARED = REPO.parent / "shared" / "data"  # optional: real words lie beside the checkout, as for the tests
REQUIREMENTS = ["datasets>=5,<6", "transformers==5.23.0", "tokenizers", "jinja2", "numpy"]
WORKERS = (1, 2)
Runs = dict[tuple[str, int], list[dict[str, float]]]  # (who, workers) -> what each round measured
OURS = """
import json, sys
from pathlib import Path
from llm_trainer.data import load as loading
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
path, tokenizer, workers, out = sys.argv[1:]
loading.PARALLEL_FROM = 0
kind, chat = get_kind("conversations"), ChatFormat(load_tokenizer(tokenizer))
store = loading.store_of(Path(path), kind, chat, DataOptions(workers=int(workers)), Path(out))
print(json.dumps({"rows": len(store), "tokens": len(store["input_ids"].values), "trained": int(store["trained"].values.sum())}))
"""


def python_of_peer() -> str:
    """The interpreter of the environment of `datasets`, made if it does not exist."""
    folder = BENCH / "datasets"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        constraints = ["-c", str(REPO / "constraints.txt")]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *constraints, *REQUIREMENTS], check=True)
        (folder / "ready").touch()
    return str(python)


def write_work(folder: Path, rows: int) -> tuple[Path, Path]:
    """Distinct conversations of real words where there are some, and a tokenizer that was trained on a part of them."""
    from llm_trainer.data.encode.tokenizer import train_tokenizer

    path, tokenizer = folder / f"chat-{rows}.jsonl", folder / "tokenizer"
    if path.exists():
        return path, tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    source = SHARED / "sft" / "gpteacher_roleplay.json"
    text = (
        source.read_text(encoding="utf-8")
        if source.exists()
        else (REPO / "docs" / "log.md").read_text(encoding="utf-8")
    )
    words = text.replace('"', " ").split()

    def said(mean: float, most: int) -> str:
        """Runs of words from random places: no two are equal, and their words are as frequent as in the source."""
        length, pieces = min(most, int(chance.lognormvariate(mean, 0.8)) + 1), []
        while length > 0:
            run = min(length, chance.randint(5, 20))
            first = chance.randrange(len(words) - run)
            pieces += words[first : first + run]
            length -= run
        return " ".join(pieces)

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = []
            for _ in range(chance.choice([1, 1, 2, 3])):
                messages += [
                    {"role": "user", "content": said(3, 200)},
                    {"role": "assistant", "content": said(3.8, 400)},
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    with path.open(encoding="utf-8") as file:
        sample = [message["content"] for line in list(file)[:5000] for message in json.loads(line)["messages"]]
    train_tokenizer(sample, 16_000).save_pretrained(tokenizer)
    return path, tokenizer


def run(command: list[str]) -> dict[str, float]:
    """Seconds, processor seconds, and peak MB of a command with all its processes; and what it printed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    before, start = os.times(), time.perf_counter()
    peak = 0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(proportional_kb, tree(process.pid))))
            time.sleep(0.1)
        seconds = time.perf_counter() - start
        printed, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[-2000:])
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return json.loads(printed.splitlines()[-1]) | {"seconds": seconds, "cpu_seconds": used, "mb": peak / 1024}


def tree(pid: int) -> list[int]:
    """A process and all that it started."""
    found = [pid]
    try:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            for child in children.read_text().split():
                found += tree(int(child))
    except OSError:
        pass  # it has ended
    return found


def proportional_kb(pid: int) -> int:
    """What a process holds in memory; what n processes share counts 1/n in each."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def print_table(runs: Runs, rows: int) -> None:
    """Medians, and ratios within rounds."""
    heads = [
        "workers",
        "",
        "rows/s",
        "rows per processor second",
        "peak MB",
        "rows/s over datasets.map",
        "memory over its",
    ]
    print("\n| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for (name, workers), mine in runs.items():
        theirs = runs["datasets.map", workers]
        speed = statistics.median(rows / one["seconds"] for one in mine)
        per_cpu = statistics.median(rows / one["cpu_seconds"] for one in mine)
        memory = statistics.median(one["mb"] for one in mine)
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(mine, theirs, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        less = statistics.median(a["mb"] / b["mb"] for a, b in zip(mine, theirs, strict=True))
        print(f"| {workers} | {name} | {speed:,.0f} | {per_cpu:,.0f} | {memory:,.0f} | {spread} | {less:.2f} |")


def main() -> None:
    """Every case once per round; which of both comes first alternates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    work = BENCH / "prepare"
    path, tokenizer = write_work(work, arguments.rows)
    peer = python_of_peer()
    runs: Runs = {}
    for number in range(arguments.rounds):
        for workers in WORKERS:
            out = work / f"out-{os.getpid()}"
            common = [str(path), str(tokenizer), str(workers), str(out)]
            commands = {"datasets.map": [peer, str(PEER), *common], "ours": [sys.executable, "-c", OURS, *common]}
            for name in sorted(commands, reverse=number % 2 == 1):
                measured = run(commands[name])
                runs.setdefault((name, workers), []).append(measured)
                print(name, workers, json.dumps(measured), flush=True)
                shutil.rmtree(out)
    print_table(runs, arguments.rows)


if __name__ == "__main__":
    main()
