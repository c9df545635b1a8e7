"""Everything that a GPU can prove, in under ten minutes: correctness, then speed. `make gpu`, or

`PYTHONPATH=src python benchmarks/gpu.py --out DIR`, on a machine that has Python, torch and transformers, and no network.

Every section is a process of its own with a time limit. A section that fails, hangs or lacks a package becomes rows that
say so, and the others go on. `DIR/results.json`, `DIR/results.md` and `DIR/log.txt` are up to date at any moment.
`--tiny --device cpu` runs the same sections on small models, which proves everything but the device.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
ROW_MARK = "ROW "  # a line of a section's output that is a row; all others are its log
TOTAL_S = 570.0
SHORTEST_S = 15.0  # with less time left a section is not started

Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """A part of the results.

    Attributes:
        title: as the table is headed.
        budget_s: after which its process is ended; the rows it had printed stay.
        beside: it may run beside the section before it, because neither of them measures time.
    """

    title: str
    budget_s: float
    beside: bool = False


SECTIONS: dict[str, Section] = {  # in their order: what matters most comes first, the last may be left out for time
    "machine": Section("Machine", 60),
    "checks": Section("Checks against the CPU", 150),
    "invariance": Section("Invariance: every split of a step", 150, beside=True),
    "sft-0.6b": Section("Training, SFT, 0.6 B", 170),
    "head": Section("Head and loss alone", 45),
    "attention": Section("Attention backends: packed against unpacked documents", 110),
    "dpo-0.6b": Section("Training, DPO, 0.6 B", 120),
    "sft-1.7b": Section("Training, SFT, 1.7 B", 130),
    "bits": Section("Recomputed layers with inputs on the host, and products in 8 bits", 120),
    "decoding": Section("Decoding, 0.6 B", 45),
    "dpo-1.7b": Section("Training, DPO, 1.7 B", 90),
}


class Results:
    """All rows so far, written after each of them. Threads share it."""

    def __init__(self, folder: Path, header: Row) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.header = folder, header
        self.rows: list[Row] = []
        self._lock = threading.Lock()
        self._log = (folder / "log.txt").open("w", encoding="utf-8", buffering=1)
        self._started = time.perf_counter()

    def log(self, section: str, line: str) -> None:
        """Keep a line of a section's output, and show it."""
        with self._lock:
            text = f"[{time.perf_counter() - self._started:5.0f} s] {section}: {line}"
            self._log.write(text + "\n")
            print(text, flush=True)

    def add(self, section: str, row: Row) -> None:
        """Keep a row; both files are replaced at once, so that they are whole whenever this process ends."""
        with self._lock:
            self.rows.append({"section": section, **row})
            if section == "machine":
                self.header |= row.get("numbers", {})
            whole = json.dumps({**self.header, "rows": self.rows}, indent=1)
            for name, text in (("results.json", whole), ("results.md", markdown(self.header, self.rows))):
                partial = self.folder / f".{name}"
                partial.write_text(text + "\n", encoding="utf-8")
                partial.replace(self.folder / name)


def _number(value: Any) -> str:
    """A number as a table shows it."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _cells(row: Row) -> str:
    """What a row found: its numbers, or why there are none."""
    if row.get("error"):
        return f"FAILED: {row['error']}"
    if row.get("left_out"):
        return f"left out: {row['left_out']}"
    found = [f"{name} {_number(value)}" for name, value in row.get("numbers", {}).items()]
    rounds = row.get("rounds") or []
    if len(rounds) > 1:
        found.append(f"({len(rounds)} rounds, {_number(min(rounds))} to {_number(max(rounds))})")
    return ", ".join(found)


def markdown(header: Row, rows: list[Row]) -> str:
    """The results as tables, ready to be pasted into docs/results.md."""
    facts = ", ".join(f"{name} {_number(value)}" for name, value in header.items())
    lines = [f"`benchmarks/gpu.py`: {facts}"]
    for name, section in SECTIONS.items():
        own = [row for row in rows if row["section"] == name]
        if not own:
            continue
        lines += ["", f"### {section.title}", "", "| what | found |", "|---|---|"]
        for row in own:
            found = _cells(row).replace("|", "/").replace("\n", " ")
            lines.append(f"| {row['name']} | {found} |")
    failed = sum(1 for row in rows if row.get("error"))
    return "\n".join([*lines, "", f"{len(rows)} rows, {failed} failed."])


def run_section(name: str, results: Results, arguments: argparse.Namespace, limit_s: float) -> None:
    """Run a section in a process of its own and collect its rows; what remains of it after `limit_s` is ended."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_sections.py")), name, arguments.device]
    if arguments.tiny:
        command.append("--tiny")
    if arguments.no_compile:
        command.append("--no-compile")
    if arguments.blocked:
        command.append("--blocked")
    path = os.pathsep.join([str(REPO / "src"), os.environ.get("PYTHONPATH", "")])
    quiet = {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    results.log(name, f"starts, at most {limit_s:.0f} s")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | quiet | {"PYTHONPATH": path, "TORCHINDUCTOR_CACHE_DIR": arguments.cache},
        start_new_session=True,  # so that what it starts ends with it
    )
    ended: list[bool] = []

    def end() -> None:
        ended.append(True)
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit_s, end)
    timer.start()
    last = ""
    assert process.stdout is not None
    for line in process.stdout:
        line = line.rstrip()
        if line.startswith(ROW_MARK):
            row = json.loads(line.removeprefix(ROW_MARK))
            results.add(name, row)
            line = f"{row['name']}: {_cells(row)}"
        elif line:
            last = line
        results.log(name, line)
    status = process.wait()
    timer.cancel()
    if ended:
        results.add(name, {"name": "the rest", "left_out": f"its {limit_s:.0f} s were over"})
    elif status:
        results.add(name, {"name": "the rest", "error": f"exit status {status}: {last}"})


def groups(names: list[str]) -> list[list[str]]:
    """The sections that run side by side, in order."""
    found: list[list[str]] = []
    for name in names:
        if SECTIONS[name].beside and found:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def main() -> int:
    """Run the sections; the exit status is 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.json, results.md and log.txt")
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--tiny", action="store_true", help="small models and few rounds")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs torch.compile")
    parser.add_argument(
        "--blocked", action="store_true", help="train with our attention for GPUs, which `auto` does not choose yet"
    )
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="of all sections together")
    arguments = parser.parse_args()
    started = time.perf_counter()
    results = Results(arguments.out, {"device": arguments.device, "tiny": arguments.tiny})
    with tempfile.TemporaryDirectory() as cache:
        arguments.cache = cache
        for group in groups(arguments.sections):
            left_s = arguments.seconds - (time.perf_counter() - started)
            if left_s < SHORTEST_S:
                for name in group:
                    results.add(name, {"name": "all", "left_out": f"{arguments.seconds:.0f} s were over"})
                continue
            with ThreadPoolExecutor(len(group)) as pool:
                limits_s = {name: min(SECTIONS[name].budget_s, left_s) for name in group}
                running = [pool.submit(run_section, name, results, arguments, limits_s[name]) for name in group]
                for future in running:
                    future.result()
    errors = [row for row in results.rows if row.get("error")]
    took = time.perf_counter() - started
    results.log("all", f"{len(results.rows)} rows, {len(errors)} failed, {took:.0f} s; see {arguments.out}/results.md")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
