"""The balance of experts is that of a whole step, however it is cut: for every trainer of a policy, and however it runs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from elastic_ranks import SCOPES
from table import PACKAGES, STEPS, Cell, differences, experts_model, run, tiny_model

TOLERANCE = 1e-5
BALANCED: dict[str, Any] = {"aux_loss_coef": 0.5, "router_z_loss_coef": 0.01}


@pytest.mark.parametrize("trainer", ["pretrain", "sft", "dpo", "kto", "grpo", "ppo"])
def test_every_trainer_of_a_policy_balances_whole_steps(trainer: str) -> None:
    """In the second step of 'sft' every other row has no supervised token; its tokens are balanced all the same."""
    whole = run(Cell(trainer, 8, 1), model=experts_model(), **BALANCED)
    cut = run(Cell(trainer, 2, 4, flat=True), model=experts_model(), **BALANCED)
    assert max(differences(cut, whole)) < TOLERANCE
    unbalanced = run(Cell(trainer, 8, 1), model=experts_model(), aux_loss_coef=0.0)
    assert whole[1].loss - unbalanced[1].loss > 0.5  # the balance loss is at least k; PPO's policy waits for a step


@pytest.mark.parametrize(
    "how", [{"gradient_checkpointing": True}, {"aux_loss_scope": "previous_step"}], ids=["recomputed", "previous_step"]
)
def test_however_a_step_is_cut(how: dict[str, Any], wholes: dict[str, Any]) -> None:
    """More ways are in the table of all trainers (`test_table.py`)."""
    whole = wholes[how.get("aux_loss_scope", "step")]
    for cell in (Cell("sft", 1, 8), Cell("sft", 2, 4, flat=True, micro_batch_tokens=40)):
        assert max(differences(run(cell, model=experts_model(), **BALANCED, **how), whole)) < TOLERANCE


@pytest.mark.parametrize("trainer", ["dpo", "grpo", "ppo"])
def test_biases_move_by_whole_steps(trainer: str) -> None:
    """One of the table is 'sft'. Where they stay, the steps after the first are others; PPO's policy waits for a step."""
    made: list[Any] = []
    how: dict[str, Any] = {}
    if trainer == "dpo":
        how["ref_model"] = experts_model(seed=1, architecture="glm4_moe")

    def biased_run(cell: Cell, speed: float) -> Any:
        if trainer == "ppo":
            how["value_model"] = tiny_model(seed=1)  # transformers has no classifier of this family
        model = experts_model(architecture="glm4_moe")
        return run(cell, model=model, ready=made.append, bias_update_speed=speed, **how)

    curves = []
    for cell in (Cell(trainer, 8, 1), Cell(trainer, 2, 4, flat=True, micro_batch_tokens=40)):
        curves.append(biased_run(cell, 0.1))
    assert max(differences(*curves)) < TOLERANCE
    biases = [[router.e_score_correction_bias for router in one.regulariser._routers] for one in made]
    stays = biased_run(Cell(trainer, 8, 1), 0.0)
    assert max(differences(stays, curves[0])) > 100 * TOLERANCE
    assert all(torch.equal(a, b) for a, b in zip(*biases, strict=True))
    moved = torch.stack(biases[0]) / 0.1
    steps = STEPS - (trainer == "ppo")
    torch.testing.assert_close(moved, moved.round())
    assert moved.abs().max() <= steps
    assert ((moved - steps) % 2 == 0).float().mean() > 0.5  # each step moves it, but where the load is even


@pytest.fixture(scope="module")
def wholes() -> dict[str, Any]:
    """The curves of steps that are not cut, by scope."""
    scopes = ("step", "previous_step", "micro_batch")
    found = {scope: run(Cell("sft", 8, 1), model=experts_model(), **BALANCED, aux_loss_scope=scope) for scope in scopes}
    assert found["step"] == found["micro_batch"] != found["previous_step"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("trainer", SCOPES)
def test_two_processes_one_and_two_again_are_one_run(trainer: str, tmp_path: Path) -> None:
    """No row and no image is lost or repeated (`differences` compares them), and what is remembered of experts comes along."""
    for package in PACKAGES.get(trainer, ()):
        pytest.importorskip(package, reason=f"needs {package}")
    curve: list[Any] = []
    for step, ranks in enumerate((2, 1, 2), start=1):
        out = tmp_path / f"{step}.json"
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [
            str(Path(__file__).parent / "elastic_ranks.py"),
            str(tmp_path / "run"),
            trainer,
            str(step),
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        curve += json.loads(out.read_text())
    assert max(differences(curve, run(Cell(trainer, 8, 1), **SCOPES[trainer]))) < TOLERANCE


def test_of_each_micro_batch_alone_it_depends_on_the_cut(wholes: dict[str, Any]) -> None:
    """As in transformers, and as it was for all."""
    cut = run(Cell("sft", 1, 8), model=experts_model(), **BALANCED, aux_loss_scope="micro_batch")
    assert max(differences(cut, wholes["micro_batch"])) > 1000 * TOLERANCE
