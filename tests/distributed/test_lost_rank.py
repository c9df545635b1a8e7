"""A rank that dies stops the others with an error that names it, soon, and the run goes on from its last checkpoint."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

SIGKILLED = -9


def play(python: str, number: int) -> dict[str, Any]:
    command = [python, str(Path(__file__).parent / "lost_rank.py"), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def played(warm_python: str) -> dict[str, Any]:
    return play(warm_python, 2)


def check(trial: dict[str, Any]) -> None:
    lost = trial["rank"]
    assert trial["codes"][lost] == SIGKILLED and trial["codes"][1 - lost] == 1
    assert trial["seconds"] < 60
    said = trial["texts"][1 - lost]
    assert f"RankLostError: rank {1 - lost}" in said and f": rank {lost} (pid " in said and "is gone" in said
    assert "the same command goes on from it" in said or trial["step"] < 2
    assert trial["same"]


@pytest.mark.parametrize("trial", [0, 1], ids=["ddp", "fsdp"])
def test_a_killed_rank_is_named_and_the_run_goes_on(played: dict[str, Any], trial: int) -> None:
    check(played["kills"][trial])


def test_a_rank_that_waits_for_ever_is_ended(played: dict[str, Any]) -> None:
    stuck = played["stuck"]
    assert stuck["codes"] == [1, SIGKILLED] and stuck["seconds"] < 30
    assert "rank 1 (pid " in stuck["texts"][0] and "is gone" in stuck["texts"][0]


def test_a_rank_that_fails_is_named(played: dict[str, Any]) -> None:
    fails = played["fails"]
    assert fails["codes"] == [1, 1] and fails["seconds"] < 30
    assert "rank 1 has had enough" in fails["texts"][1] and "rank 1 (pid " in fails["texts"][0]
    assert fails["saved"] == []  # rank 0 never came to save


@pytest.mark.parametrize("layout", [0, 1], ids=["ddp", "fsdp"])
def test_an_evaluation_that_fails_on_all_ranks_loses_no_step(played: dict[str, Any], layout: int) -> None:
    alike = played["alike"][layout]
    assert alike["codes"] == [1, 1] and "ValueError: the forward is lost" in alike["texts"][1]
    assert "step 3, hook evaluate, failed with ValueError; all before it is saved in" in alike["texts"][0]
    assert alike["saved"] == ["checkpoint-00000003"] and alike["same"]


def test_a_judge_that_fails_on_one_rank_alone_loses_no_step(played: dict[str, Any]) -> None:
    """Ranks meet between their parts of a rollout and its end, so the others fail there, and save together."""
    fails = played["judge_fails"]
    assert fails["codes"] == [1, 1] and fails["saved"][-1] == "checkpoint-00000003"
    assert "process 1 could not make its part of a rollout: RewardError: Connection refused" in fails["texts"][0]


def test_torchrun_starts_everybody_again_and_the_run_goes_on(tmp_path: Path, warm_python: str) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    script = str(Path(__file__).parent / "lost_rank.py")
    command = [warm_python, *torchrun, script, "--restarted", str(tmp_path / "run")]
    environment = os.environ | {"PYTHON_EXEC": warm_python}  # torchrun's, for its ranks
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed = re.search(r"continuing from .*: step (\d+),", done.stdout)  # killed soon after step 11
    assert resumed is not None and 10 <= int(resumed[1]) < 20
    lines = [json.loads(line) for line in (tmp_path / "run" / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 21)]


@pytest.mark.slow
def test_ten_kills(warm_python: str) -> None:
    for trial in play(warm_python, 10)["kills"]:
        check(trial)
        print(f"rank {trial['rank']} killed after step {trial['step']}: the other ended in {trial['seconds']:.1f} s")
