"""What only a GPU can show: the curves of the CPU there, in every precision and on every engine. Skipped without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "invariance"))
import table
from table import TRAINERS, Cell, differences, engine_cells, run

GPUS = torch.cuda.device_count()
pytestmark = pytest.mark.skipif(GPUS == 0, reason="this machine has no GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, this machine has {GPUS}")


@pytest.mark.parametrize("trainer", TRAINERS)
def test_fp32_is_the_curve_of_the_cpu(trainer: str) -> None:
    cell = Cell(trainer, 8, 1)
    assert max(differences(run(cell, "cuda"), run(cell))) < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_half_precision_stays_near_and_splits_do_not_matter(trainer: str, precision: str) -> None:
    whole, cut = (
        run(cell, "cuda", use_amp=True, precision=precision) for cell in (Cell(trainer, 8, 1), Cell(trainer, 2, 4))
    )
    assert max(differences(whole, run(Cell(trainer, 8, 1)))) < 0.1
    assert max(differences(cut, whole)) < 0.05


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_flat_rows_are_padded_rows(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build = table.tiny_model
    monkeypatch.setattr(table, "tiny_model", lambda attention=attention, seed=0: build(attention, seed))
    padded, flat = (run(Cell("sft", 4, 2, flat=flat), "cuda") for flat in (False, True))
    assert max(differences(flat, padded)) < 1e-3


@two_gpus
@pytest.mark.parametrize("engine", [name for name in table.ENGINES if name != "torch"])
def test_two_gpus_have_the_curve_of_one(engine: str, tmp_path: Path) -> None:
    out = tmp_path / "curves.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*torchrun, str(Path(table.__file__)), str(out), engine, "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    curves = json.loads(out.read_text())
    for trainer in TRAINERS:
        base = run(Cell(trainer, 8, 1), "cuda")
        for cell in engine_cells(trainer, engine, 2):
            assert max(differences(curves[str(cell)], base)) < 1e-3, cell
