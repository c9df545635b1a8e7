"""ZeRO 0 to 3 on two processes over gloo against the plain engine: curves, refused steps, precisions, resuming."""

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from machine import has_fp16

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
needs_fp16 = pytest.mark.skipif(
    not has_fp16(),
    reason="DeepSpeed's fp16 needs a CPU with AVX512-FP16 or AMX-FP16, which this one has not (or ONEDNN_MAX_CPU_ISA hides)",
)
Curve = list[list[float]]


@pytest.fixture(
    scope="module", params=["fast", pytest.param("slow", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
def played(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, warm_python: str
) -> dict[str, Any]:
    """What the main process of every scenario in zero_ranks.py saw."""
    script, folder = Path(__file__).parent / "zero_ranks.py", tmp_path_factory.mktemp("zero")
    command = [warm_python, str(script), str(folder), request.param]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = {}
    for ranks in json.loads(done.stdout.splitlines()[-1]):
        assert set(ranks["codes"]) == {0}, "".join(text[-3000:] for text in ranks["texts"])
        found |= ranks["results"][0]
    return found


def difference(a: Curve, b: Curve) -> float:
    """The largest of losses, and of gradient norms as a share."""
    return max(max(abs(x[0] - y[0]), abs(x[1] - y[1]) / y[1]) for x, y in zip(a, b, strict=True))


def test_every_stage_trains_as_the_plain_engine(played: dict[str, Any]) -> None:
    """Uneven token counts, a rank with one supervised token, and one that runs out of micro-batches before the other."""
    for cell, (plain, *stages) in played["curves"].items():
        assert len(stages) == 4 and plain[0][0] != plain[2][0]
        for stage, curve in enumerate(stages):
            assert difference(curve, plain) < 1e-5, f"{cell}, stage {stage}"


def test_an_infinity_on_one_rank_changes_nothing_on_any(played: dict[str, Any]) -> None:
    plain, *stages = played["not_finite"]
    for run in (plain, *stages):
        (first, second), skipped = run["seen"], run["skipped"]
        assert first == second and skipped == 1  # weights and optimizer state, bit for bit
        assert run["seen"] == plain["seen"]
        assert run["weights"] == pytest.approx(plain["weights"], abs=1e-7)  # a rank without terms poisons nothing


def test_a_student_whose_weights_are_sharded_writes_answers_with_a_copy(played: dict[str, Any]) -> None:
    plain, sharded = played["on_policy"]
    assert difference(sharded, plain) < 1e-5 and plain[0][0] != plain[2][0]


@pytest.mark.parametrize("kind", ["autocast", "bf16", pytest.param("fp16", marks=needs_fp16)])
def test_16_bits_train_as_the_plain_engine_does(played: dict[str, Any], kind: str) -> None:
    """Autocast as closely as its roundings allow; 16-bit weights round more."""
    plain = played["precisions"]["plain"]
    curves = {name: curve for name, curve in played["precisions"].items() if name.startswith(kind)}
    assert curves
    for name, curve in curves.items():
        tolerance = 2e-3 if kind == "autocast" else 3e-2
        assert difference(curve, plain) < tolerance, name
    losses_of_plain = [loss for loss, _ in plain]
    differ = [name for name, curve in curves.items() if [loss for loss, _ in curve] != losses_of_plain]
    assert differ or kind == "autocast"


def test_what_is_offloaded_trains_the_same(played: dict[str, Any]) -> None:
    for plain, offloaded in played["offload"]:
        assert difference(offloaded, plain) < 1e-5


def test_activations_are_recomputed(played: dict[str, Any]) -> None:
    without, with_it = played["recomputed"]
    assert with_it["runs"] == 2 * without["runs"] > 0
    assert difference(with_it["curve"], without["curve"]) < 1e-6


@pytest.mark.parametrize("with_scale", [False, pytest.param(True, marks=needs_fp16)], ids=["no-scale", "fp16"])
def test_a_resumed_run_continues(played: dict[str, Any], with_scale: bool) -> None:
    """Bit for bit on as many ranks; on others, in another stage or by another engine as one cut differently."""
    kinds = set()
    for ranks in (1, 2):
        for case in played[f"resumed-{ranks}"]:
            of, before, after = case["half"]
            if with_scale != ("fp16" in before):
                continue
            same = (of, before) == (ranks, after)
            uninterrupted = played[f"whole-{of}"][before]
            if same:
                assert (case["end"]["scale"] is not None and case["end"]["scale"] > 16) == ("fp16" in before)
                assert case["end"] == uninterrupted["end"] and case["curve"] == uninterrupted["curve"][3:], case
            else:
                tolerance = 2e-2 if "16" in before else 1e-5
                assert difference(case["curve"], uninterrupted["curve"][3:]) < tolerance, case
            kinds.add(same)
    assert True in kinds and (False in kinds or with_scale)
