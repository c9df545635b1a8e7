"""Losses and gradient norms do not depend on how a step is cut: rows, tokens, accumulation, packing, ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from sees import PROMPTS, asked
from served import made_ahead, moved, seen, served
from table import (
    ENGINES,
    GATHER,
    OF_SEEING_REWARDS,
    OF_SEEN,
    PACKAGES,
    ROWS_PER_STEP,
    STEPS,
    TRAINERS,
    Cell,
    automatic_cells,
    cells,
    differences,
    engine_cells,
    is_fast,
    left_out,
    run,
    seeing_reward_cell,
    weighed_cell,
)

TOLERANCE = 1e-5
AUTOMATIC = 2e-6  # where the machine chooses: losses are about 6, where the last digit of fp32 is 5e-7
# The gradients of a new critic and of A are small at first, and Adam divides them by themselves: rounding is amplified.
AUTOMATIC_OF = {"ppo": TOLERANCE, "lora": TOLERANCE, "qlora": TOLERANCE, "vlm-dpo": TOLERANCE}
IN_BF16: dict[str, Any] = {"use_amp": True, "precision": "bf16"}
# Columns of a rollout that a forward made.
ROUNDED = (
    *("sampled_logprobs", "old_logprobs", "ref_logprobs", "advantages"),
    *("model_reward", "values", "returns"),
)
pytestmark = pytest.mark.timeout(900)  # the first test that asks for them waits for the processes of all engines


@pytest.fixture(scope="module")
def base() -> dict[str, list]:
    """The curves that all others are compared with: one process, eight rows at once, padded."""
    return {trainer: run(Cell(trainer, 8, 1)) for trainer in TRAINERS}


@pytest.mark.parametrize("cell", [cell for t in TRAINERS for cell in cells(t, 1) if is_fast(cell)], ids=str)
def test_one_process(cell: Cell, base: dict[str, list]) -> None:
    assert max(differences(run(cell), base[cell.trainer])) < TOLERANCE


@pytest.mark.parametrize("cell", [Cell("vlm", 2, 4), Cell("vlm", 2, 4, 1, True, 40)], ids=str)
def test_images_in_bf16(cell: Cell, in_bf16: list) -> None:
    """Autocast: bf16 has three digits. In fp32 the curve is as far away as these are from each other."""
    losses, norms = differences(run(cell, **IN_BF16), in_bf16)
    assert losses < 3e-3 and norms < 3e-2


@pytest.fixture(scope="module")
def in_bf16() -> list:
    """The curve of 'vlm' in bf16, eight rows at once, padded."""
    return run(Cell("vlm", 8, 1), **IN_BF16)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_row_that_needs_packages_is_there(name: str) -> None:
    if name not in TRAINERS:
        pytest.skip(f"needs {', '.join(PACKAGES[name])}")
    assert cells(name, 1) and cells(name, 2)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, Any]:
    """What two processes over gloo made of all cells of every engine, but those that are slow tests."""
    return play(warm_python, tmp_path_factory.mktemp("curves") / "curves.json")


def play(python: str, out: Path, *which: str) -> dict[str, Any]:
    """What `engine_ranks.py` writes."""
    command = [python, str(Path(__file__).parent / "engine_ranks.py"), str(out), *which]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text()) | {"folder": str(out.parent)}


def ended_well(engine: str, played: dict[str, Any]) -> dict[str, Any]:
    """What an engine has made, once it has ended well on both ranks."""
    found = played[engine]
    assert found["codes"] == [0, 0], "".join(found["texts"])[-3000:]
    return found["curves"]


def curve_of(cell: Cell, played: dict[str, Any]) -> list:
    """Losses and gradient norms of a cell."""
    return ended_well(cell.engine, played)[str(cell)]


@pytest.mark.parametrize("cell", [cell for t in TRAINERS for cell in cells(t, 2)], ids=str)
def test_two_processes(cell: Cell, base: dict[str, list], played: dict[str, Any]) -> None:
    assert max(differences(curve_of(cell, played), base[cell.trainer])) < TOLERANCE


ON_OTHERS = [c for e in ENGINES if e != "torch" for t in TRAINERS for c in engine_cells(t, e, 2)]


@pytest.mark.parametrize("cell", [cell for cell in ON_OTHERS if is_fast(cell)], ids=str)
def test_two_processes_on_other_engines(cell: Cell, base: dict[str, list], played: dict[str, Any]) -> None:
    assert max(differences(curve_of(cell, played), base[cell.trainer])) < TOLERANCE


@pytest.mark.slow
def test_cells_that_are_left_out(base: dict[str, list], tmp_path: Path, warm_python: str) -> None:
    """All other ways: padded rows of every trainer on every engine, both layouts of all cuts on DDP and in one process."""
    played = play(warm_python, tmp_path / "curves.json", "left-out")
    wanted = [cell for engine in ENGINES for cell in left_out(engine, 2)]
    assert len(wanted) > 90
    for cell in wanted:
        limit = AUTOMATIC_OF.get(cell.trainer, AUTOMATIC) if cell.automatic else TOLERANCE
        assert max(differences(curve_of(cell, played), base[cell.trainer])) < limit, cell
    for cell in left_out("torch", 1):
        assert max(differences(run(cell), base[cell.trainer])) < TOLERANCE, cell


@pytest.mark.parametrize("cell", [cell for t in TRAINERS for cell in automatic_cells(t, "torch", 1)], ids=str)
def test_what_the_machine_chooses_in_one_process(cell: Cell, base: dict[str, list]) -> None:
    assert max(differences(run(cell), base[cell.trainer])) < AUTOMATIC_OF.get(cell.trainer, AUTOMATIC)


LEFT_TO_THE_MACHINE = [c for e in ENGINES for t in TRAINERS for c in automatic_cells(t, e, 2)]


@pytest.mark.parametrize("cell", [cell for cell in LEFT_TO_THE_MACHINE if is_fast(cell)], ids=str)
def test_what_the_machine_chooses_in_two(cell: Cell, base: dict[str, list], played: dict[str, Any]) -> None:
    limit = AUTOMATIC_OF.get(cell.trainer, AUTOMATIC)
    assert max(differences(curve_of(cell, played), base[cell.trainer])) < limit


@pytest.mark.parametrize(
    "cell", [Cell("sft", 4, 2, 1, True, 40), Cell("sft", 8, 1), automatic_cells("sft", "torch", 1)[1]], ids=str
)
@pytest.mark.parametrize("engine", ["torch", "fsdp"])
def test_one_process_goes_on_where_two_had_chosen(
    engine: str, cell: Cell, base: dict[str, list], played: dict[str, Any], tmp_path: Path
) -> None:
    curve_of(weighed_cell(engine, 2), played)  # it has ended well
    shutil.copytree(f"{played['folder']}/{engine}", tmp_path / "run")
    curve = run(cell, into=str(tmp_path / "run"))
    assert max(differences(curve, base["sft"][-1:])) < AUTOMATIC


@pytest.fixture(scope="module")
def unclipped() -> list:
    """The curve of 'sft' when nothing is clipped."""
    return run(Cell("sft", 8, 1), max_grad_norm=0)


@pytest.mark.parametrize("engine", ["torch", "hf"])
def test_loss_weights_of_hundredths_in_one_process(engine: str, unclipped: list, base: dict[str, list]) -> None:
    assert max(differences(run(weighed_cell(engine, 1)), unclipped)) < TOLERANCE
    assert max(differences(unclipped, base["sft"])) > 10 * TOLERANCE  # where gradients are clipped, it shows


@pytest.mark.parametrize("engine", ENGINES)
def test_loss_weights_of_hundredths_in_two(engine: str, unclipped: list, played: dict[str, Any]) -> None:
    assert max(differences(curve_of(weighed_cell(engine, 2), played), unclipped)) < TOLERANCE


def test_a_reward_model_that_sees(played: dict[str, Any]) -> None:
    """Padded all at once, and cut into flat micro-batches, in one process and two, of which one may see nothing."""
    base = run(Cell("vlm-reward", 8, 1))
    found = {"alone": run(seeing_reward_cell("torch", 1))}
    for engine in OF_SEEING_REWARDS:
        found[engine] = curve_of(seeing_reward_cell(engine, 2), played)
    for curve in found.values():
        assert max(differences(curve, base)) < TOLERANCE


def test_prompts_show_their_images_on_engines_that_shard(played: dict[str, Any], tmp_path: Path) -> None:
    """A LLaVA-Next, of which a parameter is read before the forward of the module that has it (sees.py)."""
    alone = asked("torch", 1, Path(played["folder"]) / "files", tmp_path / "run")
    assert len(alone["answers"]) == len(PROMPTS) and max(map(abs, alone["moved"])) > 1e-3
    for engine in OF_SEEING_REWARDS:
        report = ended_well(engine, played)["asked"]
        assert report["answers"] == alone["answers"]
        for found, expected in zip(report["curve"], alone["curve"], strict=True):
            assert found == pytest.approx(expected, rel=TOLERANCE)
        assert report["moved"] == pytest.approx(alone["moved"], abs=TOLERANCE)


# What a run serves to those who make rollouts (served.py).


@pytest.fixture(scope="module")
def served_alone() -> dict[str, Any]:
    """By one process."""
    return served("torch", 1)


@pytest.fixture(scope="module")
def moved_alone() -> dict[str, Any]:
    """By one process."""
    return moved("torch", 1)


@pytest.fixture(scope="module")
def made_alone() -> dict[str, Any]:
    """By one process."""
    return made_ahead("torch", 1)


@pytest.fixture(scope="module")
def seen_alone() -> dict[str, Any]:
    """By one process, for each trainer."""
    return {name: seen("torch", 1, name) for name in OF_SEEN}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_is_served_the_weights_that_are_saved(
    engine: str, served_alone: dict[str, Any], played: dict[str, Any]
) -> None:
    """Whole, tied ones once, frozen parameters and persistent buffers with them; training goes on as if nothing was."""
    report = ended_well(engine, played)["served"]
    weights, alone = report["weights"], served_alone["weights"]
    assert weights["names"] == alone["names"] and weights["names"][:3] == ["scale", "seen", "model.embed_tokens.weight"]
    assert "model.norm.weight" in weights["names"] and weights["tied"] == ["lm_head.weight"] and weights["is_tied"]
    assert weights["everywhere"] == [weights["saved"]] * 2
    assert weights["half"] == [weights["cast"]] * 2
    assert max(differences(report["curve"], served_alone["curve"])) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_is_served_the_scores_of_all_rows(
    engine: str, served_alone: dict[str, Any], played: dict[str, Any]
) -> None:
    scores, alone = ended_well(engine, played)["served"]["scores"], served_alone["scores"]
    assert scores["modes"] == [True, True]
    for layout in ("padded", "flat"):
        assert len(set(scores[f"{layout} everywhere"])) == 1
        for name in ("each", "sum"):
            assert len(scores[layout][name]) == STEPS * ROWS_PER_STEP
            for ours, theirs in zip(scores[layout][name], alone["padded"][name], strict=True):
                assert ours == pytest.approx(theirs, abs=TOLERANCE * max(1, -min(np.atleast_1d(theirs))))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_is_served_the_same_completions_token_for_token(
    engine: str, served_alone: dict[str, Any], played: dict[str, Any]
) -> None:
    """With the same weights in fp32; ranks ask for them in another order. No row is batched as in one process."""
    ours, alone = ended_well(engine, played)["served"]["written"], served_alone["written"]
    for name in ("greedy", "drawn"):
        assert ours[name] == alone[name] and ours[f"{name} everywhere"] == [alone[name]] * 2
        for found, expected in zip(ours[f"{name} logprobs"], alone[f"{name} logprobs"], strict=True):
            assert found == pytest.approx(expected, abs=TOLERANCE)
    assert alone["greedy"] != alone["drawn"] and len({len(ids) for group in alone["drawn"] for ids in group}) > 3


@pytest.mark.parametrize("engine", ENGINES)
def test_a_reference_moves_on_every_engine(engine: str, moved_alone: dict[str, Any], played: dict[str, Any]) -> None:
    """Between rollouts, as the formula says, to the same bits on every rank; its forward has the new weights."""
    report, plain = ended_well(engine, played)["moved"], moved_alone
    assert report["right"] and report["step"] == 1
    assert report["moved"] == plain["moved"] > 20  # not the frozen parameter, and none of the policy's
    assert len(report["everywhere"]) == 2 and len(set(report["everywhere"])) == 1
    assert len(report["steps"]) == 2 and report["steps"][1][2] > 0
    for found, expected in zip(report["steps"], plain["steps"], strict=True):
        assert found == pytest.approx(expected, abs=TOLERANCE)


def check_rollouts(ours: list[dict[str, Any]], alone: list[dict[str, Any]]) -> None:
    """They are the same, token for token; what a forward made to rounding."""
    for found, expected in zip(ours, alone, strict=True):
        assert found["facts"] == expected["facts"]
        assert found["columns"].keys() == expected["columns"].keys()
        for name, rows in expected["columns"].items():
            limit = TOLERANCE if name in ROUNDED else 0.0
            for a, b in zip(found["columns"][name], rows, strict=True):
                assert a == pytest.approx(b, rel=0, abs=limit, nan_ok=True), name  # NaN: no function has judged


@pytest.mark.parametrize("engine", GATHER)
def test_rollouts_that_are_made_ahead_are_the_same_on_every_engine(
    engine: str, made_alone: dict[str, Any], played: dict[str, Any]
) -> None:
    """The thread that samples meets no other process, whatever the engine gathers meanwhile for its forwards."""
    report = ended_well(engine, played)["made ahead"]
    check_rollouts(report["rollouts"], made_alone["rollouts"])
    assert [staleness for *_, staleness in made_alone["steps"]] == [0, 1, 1]
    for found, expected in zip(report["steps"], made_alone["steps"], strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


@pytest.mark.parametrize("engine", ENGINES)
def test_rollouts_are_the_same_on_every_engine(
    engine: str, moved_alone: dict[str, Any], played: dict[str, Any]
) -> None:
    """In fp32, token for token, one process or two: ids, groups, order, rewards, versions; log-probs to rounding."""
    ours, alone = ended_well(engine, played)["moved"]["rollouts"], moved_alone["rollouts"]
    check_rollouts(ours, alone)
    assert len(alone) == 2
    finishes = {row[0] for rollout in alone for row in rollout["columns"]["finish"]}
    lengths = {len(row) for row in alone[0]["columns"]["input_ids"]}
    assert finishes == {0, 1} and len(lengths) > 2


@pytest.mark.parametrize("name", OF_SEEN)
@pytest.mark.parametrize("engine", GATHER)
def test_prompts_that_show_images_are_answered_and_learned_from_alike_on_every_engine(
    engine: str, name: str, seen_alone: dict[str, Any], played: dict[str, Any]
) -> None:
    """Token for token, judge and critic too; in micro-batches of text and of images, of which ranks have different numbers."""
    report, alone = ended_well(engine, played)["seen"][name], seen_alone[name]
    check_rollouts(report["rollouts"], alone["rollouts"])
    shown = [{len(row) for row in rollout["columns"]["image_places"]} for rollout in alone["rollouts"]]
    assert shown == [{0, 6, 12}, {0, 6, 12}]
    for found, expected in zip(report["steps"], alone["steps"], strict=True):
        assert found == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def test_the_table_would_notice_a_mean_of_means(base: dict[str, list], monkeypatch: pytest.MonkeyPatch) -> None:
    """The classical bug, seeded on purpose: weighting micro-batches alike must leave the tolerance far behind."""
    from llm_trainer.trainers.language import Trainer

    monkeypatch.setattr(Trainer, "_loss_weight", lambda self, batch: 1.0)
    assert max(differences(run(Cell("sft", 2, 4)), base["sft"])) > 100 * TOLERANCE
