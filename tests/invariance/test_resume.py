"""A run goes on where it stopped, whatever was chosen for it before and whatever is chosen now."""

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from table import STEPS, TRAINERS, Cell, Curve, differences, run

from llm_trainer import compiler
from llm_trainer.train import sizing

TOLERANCE = 1e-6
TOLERANCE_OF = {
    "ppo": 1e-5,  # a new critic, see test_table.py
    "grpo": 5e-6,  # gradients that are differences of close numbers
    "dpo": 5e-6,
    "lora": 1e-5,  # as the critic
    "qlora": 1e-5,
    "vlm-dpo": 1e-5,
    "bias": 5e-6,  # shared and chosen experts are added in another order where layers are compiled
}
IN_MANY_WAYS = ("sft", "dpo", "grpo")  # the last with further rows, which have a position of their own


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
@pytest.mark.parametrize("trainer", IN_MANY_WAYS)
def test_every_step_is_run_in_another_way(
    trainer: str, name: str, alone: dict[str, Curve], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    curve: Curve = []
    for step, cell in enumerate(lives_of(trainer)[name], start=1):
        curve += run(cell, into=str(tmp_path), last_step=step)
    assert max(differences(curve, alone[trainer])) < TOLERANCE_OF.get(trainer, TOLERANCE)
    assert capsys.readouterr().out.count("continuing from") == STEPS - 1


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_step_is_run_on_another_machine(
    trainer: str, alone: dict[str, Curve], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has layers compiled (in name: compiling takes too long here), the second little memory, the third neither."""
    monkeypatch.setattr(compiler, "compiled", lambda function, dynamic: function)
    curve: Curve = []
    found: list[tuple[int | None, bool]] = []

    for step, tokens in enumerate((64, 30, 100), start=1):
        machine = f"machine {step}"
        monkeypatch.setattr(sizing, "describe_machine", lambda engine, in_company, machine=machine: machine)
        monkeypatch.setattr(
            sizing, "largest_that_fits", lambda *rest, tokens=tokens, **more: (tokens, "what fits there")
        )
        trainers: list[Any] = []

        def ready(one: Any, step: int = step, trainers: list[Any] = trainers) -> None:
            trainers.append(one)
            if step == 1:
                one.run.compiling._layers.switch(True)

        how = {"compile": False} if step == STEPS else {}
        curve += run(
            Cell(trainer, 2, 4, flat=True, automatic=True), into=str(tmp_path), last_step=step, ready=ready, **how
        )
        found.append((trainers[0].run.budget.tokens, trainers[0].run.compiling.is_on))
    assert found == [(64, True), (30, True), (100, False)]
    assert max(differences(curve, alone[trainer])) < TOLERANCE_OF.get(trainer, TOLERANCE)
