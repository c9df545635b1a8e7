"""Losses and gradient norms do not depend on how a step is cut: rows, tokens, accumulation, packing, ranks."""

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from table import ENGINES, TRAINERS, Cell, cells, differences, engine_cells, run

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def base() -> dict[str, list]:
    """The curves that all others are compared with: one process, eight rows at once, padded."""
    return {trainer: run(Cell(trainer, 8, 1)) for trainer in TRAINERS}


@pytest.mark.parametrize("cell", [cell for t in TRAINERS for cell in cells(t, 1)], ids=str)
def test_one_process(cell: Cell, base: dict[str, list]) -> None:
    assert max(differences(run(cell), base[cell.trainer])) < TOLERANCE


@cache
def two_processes(engine: str) -> dict[str, list]:
    """The curves of all cells of an engine with two processes over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "curves.json"
        done = subprocess.run(
            [*command, str(Path(__file__).parent / "table.py"), str(out), engine],
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text())


@pytest.mark.parametrize("cell", [cell for t in TRAINERS for cell in cells(t, 2)], ids=str)
def test_two_processes(cell: Cell, base: dict[str, list]) -> None:
    assert max(differences(two_processes("torch")[str(cell)], base[cell.trainer])) < TOLERANCE


@pytest.mark.parametrize(
    "cell", [c for e in ENGINES if e != "torch" for t in TRAINERS for c in engine_cells(t, e, 2)], ids=str
)
def test_two_processes_on_other_engines(cell: Cell, base: dict[str, list]) -> None:
    assert max(differences(two_processes(cell.engine)[str(cell)], base[cell.trainer])) < TOLERANCE


def test_the_table_would_notice_a_mean_of_means(base: dict[str, list], monkeypatch: pytest.MonkeyPatch) -> None:
    """The classical bug, seeded on purpose: weighting micro-batches alike must leave the tolerance far behind."""
    from llm_trainer.trainers.language import Trainer

    monkeypatch.setattr(Trainer, "_loss_weight", lambda self, batch: 1.0)
    assert max(differences(run(Cell("sft", 2, 4)), base["sft"])) > 100 * TOLERANCE
