"""A run goes on where it stopped, whatever was chosen for it before and whatever is chosen now."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from table import STEPS, Cell, Curve, differences, run

TOLERANCE = 1e-6
TRAINERS = ("sft", "dpo", "grpo")  # the last with further rows, which have a position of their own


def lives_of(trainer: str) -> dict[str, list[Cell]]:
    """Ways to run, one for each step, all of which get the samples in the same order."""
    padded, flat = Cell(trainer, 8, 1), Cell(trainer, 2, 4, flat=True)
    wide, narrow = (Cell(trainer, 4, 2, 1, True, budget) for budget in (200, 40))
    chosen = Cell(trainer, 2, 4, flat=True, automatic=True)
    return {
        "padded, then flat": [padded, flat, padded],
        "another budget": [wide, narrow, wide],
        "by hand, then by the machine": [narrow, chosen, chosen],
        "by the machine, then by hand": [chosen, padded, narrow],
        "a loader": [Cell(trainer, 2, 4, automatic=True)] * STEPS,
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Curve]:
    """The curves of runs that nobody stopped."""
    return {trainer: run(Cell(trainer, 8, 1)) for trainer in TRAINERS}


@pytest.mark.parametrize("name", lives_of(""))
@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_step_is_run_in_another_way(
    trainer: str, name: str, alone: dict[str, Curve], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    curve: Curve = []
    for step, cell in enumerate(lives_of(trainer)[name], start=1):
        curve += run(cell, into=str(tmp_path), last_step=step)
    assert max(differences(curve, alone[trainer])) < TOLERANCE
    assert capsys.readouterr().out.count("continuing from") == STEPS - 1
