"""Whatever the data of one rank asks for, and whatever goes wrong on it: equal, or an error on every rank that names the cause.

All engines x all cases are the slow test, whose table stands in docs/results.md.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "invariance"))
from table import ENGINES

Cell = dict[str, Any]
SCRIPT = Path(__file__).parent / "cause_ranks.py"
CASES = (
    "odd_rows",
    "no_terms",
    "unused",
    "unused_layer",
    "configured",
    "statistics",
    "raises",
    "raises_early",
    "runs_out",
    "runs_out_updating",
    "times_out",
)
FAST = {  # the most telling cells, and how they end
    "torch/unused": "equal",
    "torch/times_out": "named",
    "torch/raises_early": "named",
    "fsdp/odd_rows": "equal",
    "fsdp/unused": "equal",
    "fsdp/unused_layer": "named",
    "fsdp/configured": "equal",
    "fsdp/statistics": "equal",
    "fsdp/raises": "named",
    "torch/runs_out": "named",
    "fsdp/runs_out": "named",
}
FAST_DEEPSPEED = {"zero3/odd_rows": "equal", "zero1/unused": "named"}
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def play(python: str, folder: Path, *cells: str) -> dict[str, Cell]:
    command = [python, str(SCRIPT), str(folder), *cells]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, Cell]:
    """The most telling cells."""
    deepspeed = FAST_DEEPSPEED if HAS_DEEPSPEED else ()
    return play(warm_python, tmp_path_factory.mktemp("causes"), *FAST, *deepspeed)


def check(name: str, found: dict[str, Cell]) -> str:
    """How a cell ended, in a word for the table, having ended well within a minute."""
    case = name.split("/")[1]
    cell = found[name]
    said = "\n".join(cell["texts"])
    assert cell["seconds"] < 60, said[-3000:]
    if cell["codes"] == [0, 0]:
        return check_numbers(case, cell, found.get(f"alone/{case}"), said)
    assert all(cell["codes"]), f"{cell['codes']}: {said[-3000:]}"
    for rank, text in enumerate(cell["texts"]):  # every rank names the cause
        last = text.strip().splitlines()[-1]
        assert re.search(CAUSES[case], last), f"{name}, rank {rank}: {text[-3000:]}"
    return "named"


# What the last line of every rank must say where a case cannot end well.
CAUSES = {
    "unused": "scale is not used on rank 1.*add 0 . parameter.sum",
    "unused_layer": "the ranks part in step 1, micro-batch 1: rank 0 in .*layers.2, rank 1 in .*layers.1.*call them all"
    "|layers.1.weight is not used on rank 0.*add 0 . parameter.sum",
    "raises_early": "ValueError: row 17 of rows.jsonl is no good|rank 1 .* is gone: it failed",
    "raises": "ValueError: row 17 of rows.jsonl is no good",
    "runs_out": "OutOfMemoryError: step 2 ran out of memory: micro-batch 1 of rank 1 .*can't allocate.*gradient_checkpointing",
    "runs_out_updating": r"OutOfMemoryError: step 2, update: out of memory .*can't allocate.*lion.*newest checkpoint",
    "times_out": "all are alive: rank 0 is in step 2, .*; rank 1 is in step 1, hook mine",
}


def check_numbers(case: str, cell: Cell, alone: Cell | None, said: str) -> str:
    assert case not in ("raises", "raises_early", "runs_out", "runs_out_updating", "times_out"), said[-3000:]
    if case == "statistics":
        first, second = cell["results"]
        assert first == second and first["count"] == 2
        # Two steps of momentum 0.1 from 0, and the mean over both ranks of the means of their rows.
        assert first["mean"] == pytest.approx([0.1 * 0.9 * 1.25 + 0.1 * 2.25, 0.1 * 0.9 * 1.0 + 0.1 * 2.0])
        assert "the mean over the ranks after every step: norm.num_batches_tracked, norm.running_mean" in said
        return "equal"
    assert alone is not None
    curve, expected = cell["results"][0], alone["results"][0]
    assert len(curve) == len(expected) > 2
    for step, (one, other) in enumerate(zip(curve, expected, strict=True)):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6), f"step {step + 1}: {curve}, alone {expected}"
    return "equal"


@pytest.mark.parametrize("name", FAST)
def test_a_cell(played: dict[str, Cell], name: str) -> None:
    assert check(name, played) == FAST[name]


@pytest.mark.parametrize("name", FAST_DEEPSPEED)
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
def test_a_cell_of_deepspeed(played: dict[str, Cell], name: str) -> None:
    assert check(name, played) == FAST_DEEPSPEED[name]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
def test_all_cells(tmp_path: Path, warm_python: str) -> None:
    found = play(warm_python, tmp_path)
    rows = ["| engine | " + " | ".join(CASES) + " |", "|---" * (1 + len(CASES)) + "|"]
    for engine in ENGINES:
        ends = [f"{check(f'{engine}/{case}', found)}, {found[f'{engine}/{case}']['seconds']:.1f} s" for case in CASES]
        rows.append(f"| {engine} | " + " | ".join(ends) + " |")
    print("\n".join(rows))
