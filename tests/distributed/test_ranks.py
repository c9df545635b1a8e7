"""Two real processes over gloo: one set of weights, one voice, one checkpoint, and no one left hanging."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "faults"))
from short_memory import compare

RANKS = Path(__file__).parent / "ranks.py"


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> dict[str, Any]:
    """What the ranks of every scenario in ranks.py saw."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run([warm_python, str(RANKS), str(folder)], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_two_ranks_train_what_one_does(played: dict[str, Any]) -> None:
    """Also in the last step, in which the second rank has no row."""
    alone, together = played["train-1"]["results"][0], played["train-2"]["results"]
    assert together[0]["weights"] == together[1]["weights"] and together[0]["changed"]
    assert len(played["metrics"]["1"]) == len(played["metrics"]["2"]) == 8
    for one, two in zip(played["metrics"]["1"], played["metrics"]["2"], strict=True):
        assert two == pytest.approx(one, rel=1e-5) and one["num_tokens"] == two["num_tokens"]
    assert alone["last"]["num_tokens"] == together[1]["last"]["num_tokens"] > 500


def test_a_folder_in_use_is_refused_on_all_ranks(played: dict[str, Any]) -> None:
    first, second = (result["refused"] for result in played["train-2"]["results"])
    assert first == second and "is in use by process" in first


def test_the_processes_of_a_machine_share_its_cores(played: dict[str, Any]) -> None:
    expected = {"threads": 4, "why": "8 cores for 2 processes on this machine"}
    assert played["threads_of_each"]["results"] == [expected] * 2


def test_ranks_agree_on_what_fits_and_a_trial_leaves_nothing_behind(played: dict[str, Any]) -> None:
    """Under DDP and where weights are sharded; the run without a trial is cut no otherwise."""
    for result in played["tried_out"]["results"]:
        for engine in ("torch", "fsdp"):
            (by_rule, without), (agreed, after) = result[f"{engine}-False"], result[f"{engine}-True"]
            assert (by_rule, agreed) == (2048, 768) and without == after


def test_all_ranks_are_compiled_or_none(played: dict[str, Any]) -> None:
    for never, decided, failed in played["compiled"]["results"]:
        assert never[0] == decided[0] == failed[0]
        assert [never[1], decided[1], failed[1]] == [False, True, False]
        assert "InvalidCxxCompiler" in failed[2]


def test_all_ranks_start_from_the_main_ones_weights(played: dict[str, Any]) -> None:
    first, second = played["other_seed"]["results"]
    assert first == second


def test_preparing_data_may_outlast_the_timeout(played: dict[str, Any]) -> None:
    assert played["slow_data"]["codes"] == [0, 0] and min(played["slow_data"]["results"]) >= 2.5


def test_only_the_main_process_speaks(played: dict[str, Any]) -> None:
    first, second = played["train-2"]["texts"]
    assert "step 8/8" in first and "2 processes" in first and second == ""


def test_a_rank_that_raises_does_not_leave_the_others_hanging(played: dict[str, Any]) -> None:
    assert played["one_raises"]["codes"] == [1, 1] and played["one_raises"]["seconds"] < 30
    assert "rank 1 has had enough" in played["one_raises"]["texts"][1]


def test_a_signal_to_one_rank_stops_all_at_the_same_step(played: dict[str, Any]) -> None:
    assert played["signalled"]["codes"] == [75, 75] and played["checkpoint"] == 4
    assert len(re.findall("interrupted at step 4: saved", "".join(played["signalled"]["texts"]))) == 1


def test_a_batch_without_terms_poisons_nothing(played: dict[str, Any]) -> None:
    alone, first, second = (r for name in ("no_terms-1", "no_terms-2") for r in played[name]["results"])
    assert alone == first == second and alone["step"] == 2 and alone["skipped"] == 0


def test_an_infinity_on_one_rank_skips_the_step_on_all(played: dict[str, Any]) -> None:
    first, second = played["inf_on_one"]["results"]
    assert first == second and first["skipped"] == 1
    assert first["kept"] == ["step-2-rank-0.pt", "step-2-rank-1.pt"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_curve_does_not_depend_on_where_memory_runs_out(played: dict[str, Any], ranks: int) -> None:
    plain = played[f"short of memory None {ranks}"]
    for seed in (0, 1):
        found = played[f"short of memory {seed} {ranks}"]
        assert compare(found, plain) == [] and sum(result["failures"] for result in found["results"]) > 0
        assert len({result["tokens"] for result in found["results"]}) == 1
        assert "It is taken again, and from now on" in found["texts"][0] and "".join(found["texts"][1:]) == ""


def test_changing_the_number_of_ranks_loses_and_repeats_no_sample(played: dict[str, Any]) -> None:
    """2 -> 1 -> 2 -> ... ranks, each stopped by SIGTERM: two epochs have every sample exactly twice."""
    lives = played["elastic"]
    assert [life["codes"][0] for life in lives] == [0] * len(lives)
    assert [life["results"][0]["code"] for life in lives] == [75] * 5 + [0, 0]
    seen = [[sample for result in life["results"] for sample in result["seen"]] for life in lives]
    assert sorted(sum(seen, [])) == sorted([*range(62)] * 2)
    assert len(set(sum(seen[:2], []))) == 48  # six steps of the first epoch, with two ranks and with one


def test_sigterm_to_torchrun_saves_once(tmp_path: Path, warm_python: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(RANKS), "--train", str(tmp_path / "run")]
    environment = os.environ | {"PYTHON_EXEC": warm_python}  # torchrun's, for its ranks
    log, began = tmp_path / "run" / "log" / "metrics.jsonl", time.monotonic()
    with (tmp_path / "out").open("w") as out:
        launcher = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        while not (log.exists() and log.stat().st_size):
            assert time.monotonic() - began < 60, (tmp_path / "out").read_text()
            time.sleep(0.05)
        launcher.send_signal(signal.SIGTERM)
        code = launcher.wait(timeout=30)
    text = (tmp_path / "out").read_text()
    step = re.findall(r"interrupted at step (\d+): saved", text)
    assert code != 0 and len(step) == 1, text
    assert (tmp_path / "run" / f"checkpoint-{int(step[0]):08d}" / "manifest.json").exists()
