"""The curves of every trainer in one process are those that were written down, up to how processors round."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import curves

GOLDEN = json.loads((Path(__file__).parent / "curves.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a teacher for all runs."""
    made = tmp_path_factory.mktemp("golden")
    curves.write_data(made)
    curves.make_teacher(made)
    return made


@pytest.mark.parametrize("name", GOLDEN)
def test_a_curve_is_the_one_written_down(name: str, folder: Path) -> None:
    found = curves.run(name, "torch", folder)["metrics"]
    steps = [[line["step"], line["loss"], line["grad_norm"]] for line in found if "loss" in line]
    assert len(steps) == len(GOLDEN[name]) >= 6
    for ours, golden in zip(steps, GOLDEN[name], strict=True):
        assert ours == pytest.approx(golden, rel=2e-4, abs=1e-5)  # on policy the loss is 0 up to rounding


def test_every_trainer_has_a_curve(tmp_path: Path) -> None:
    from llm_trainer.trainers import TRAINERS

    assert {trainer for trainer, _ in curves.trainers(tmp_path).values()} == set(TRAINERS)
    assert set(GOLDEN) == set(curves.trainers(tmp_path))
