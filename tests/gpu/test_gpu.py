"""The checks of a GPU under pytest: each skips, saying why, where there is none. See `checks.py`.

What needs no GPU to be wrong runs on the CPU as well, so that a check that cannot fail shows before a GPU is there.
"""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import checks
from checks import TRAINERS, Cell, differences, run, table

GPUS = torch.cuda.device_count()
one_gpu = pytest.mark.skipif(GPUS == 0, reason="this machine has no GPU")
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, this machine has {GPUS}")


@one_gpu
@pytest.mark.parametrize("name", [name for name, _ in checks.all_checks("cuda")])
def test_on_the_gpu(name: str) -> None:
    dict(checks.all_checks("cuda"))[name]("cuda")


@one_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_splits_do_not_matter(trainer: str, precision: str) -> None:
    checks.splits_do_not_matter("cuda", trainer, precision)


@one_gpu
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention", "auto"])
def test_flat_rows_are_padded_rows(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_trainer.models.attention import resolve_attention

    build = partial(table.tiny_model, resolve_attention(attention, "cuda"))
    monkeypatch.setattr(table, "tiny_model", lambda attention="sdpa", seed=0: build(seed=seed))
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
        for cell in table.engine_cells(trainer, engine, 2):
            assert max(differences(curves[str(cell)], base)) < 1e-3, cell


def test_a_check_notices_another_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of other weights on the device: the check that compares with the CPU must fail."""
    build, runs = table.tiny_model, []

    def other_weights_first(attention: str = "sdpa", seed: int = 0):
        runs.append(seed)
        return build(attention, seed + (len(runs) == 1))

    monkeypatch.setattr(table, "tiny_model", other_weights_first)
    with pytest.raises(AssertionError, match="from the curve of the CPU"):
        checks.curve_of_the_cpu("cpu", "sft", "fp32")


@pytest.mark.parametrize(("family", "attention", "precision"), checks.packed_images("cpu"))
def test_images_stay_apart_without_a_gpu_too(family: str, attention: str, precision: str) -> None:
    checks.images_stay_apart("cpu", family, attention, precision)


def test_a_check_notices_images_of_another_document() -> None:
    with pytest.raises(AssertionError, match="packed differs from padded"):
        checks.images_stay_apart("cpu", "gemma3", "sdpa", "fp32")
