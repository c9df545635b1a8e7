"""Kills of a run that learns from its own completions, in every phase: it ends as the one that was left alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

LIVES = Path(__file__).parent / "rollout_lives.py"
AIMS = ("generating", "rewarding", "scoring", "updating", "syncing", "rollouts", "saving")


def lives(
    folder: Path, *options: str, script: str = "rollout_lives.py", python: str = sys.executable
) -> dict[str, Any]:
    """The report of rollout_lives.py, or of another one."""
    command = [python, str(LIVES.with_name(script)), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def check_two_ranks(report: dict[str, Any]) -> None:
    """Rollouts token for token; a signal to one rank while it samples stops both, and what was finished is kept."""
    assert report["codes"] == [0, 0] and report["same"] and report["difference"] < 1e-5
    assert report["stopped"] == [75, 75] and report["seconds"] < 5 and 2 <= report["parts"] < 4


def check_episodes(report: dict[str, Any]) -> None:
    """Killed while it played the episodes of a second prompt, a run goes on bit for bit; two ranks play those of one."""
    assert report["codes"] == [-signal.SIGKILL, 0, 0, 0]
    assert report["parts"] == ["part-000000.npz"] and report["turns"] == 3
    assert report["different"] == [] and report["on_two"] == []


def test_a_kill_in_every_phase(tmp_path: Path, warm_python: str) -> None:
    report = lives(tmp_path, "1", "--episodes", python=warm_python)
    assert report["kills"] == dict.fromkeys(AIMS, 1) and report["different"] == []
    check_two_ranks(report["two_ranks"])
    check_episodes(report["episodes"])


@pytest.mark.slow
def test_eighty_kills_of_which_some_change_the_number_of_ranks(tmp_path: Path) -> None:
    """And a reward that is not the same twice: a run that is given the rollouts samples nothing, and ends in the same bits."""
    report = lives(tmp_path, "7", "--ranks")
    assert report["kills"] == dict.fromkeys(AIMS, 7) and report["different"] == []
    check_two_ranks(report["two_ranks"])
    ranks, noisy = report["ranks"], report["noisy"]
    assert ranks["kills"] == 21 and ranks["lives"] > 21 and ranks["wrong"] == []
    assert noisy == {"different": [], "sampled": 0, "rollouts": 6}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "ppo", "episodes", "images", "ppo-images"])
def test_thirty_five_kills_of_a_real_policy(name: str, tmp_path: Path) -> None:
    """Sampler, reward processes or environments, scoring, critic, reference and statistics: all go on bit for bit."""
    command = [sys.executable, str(LIVES.with_name("policy_lives.py")), str(tmp_path), "5", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert report["kills"] == dict.fromkeys(AIMS, 5) and report["different"] == [] and report["steps"] >= 12


def check_two_ranks_ahead(report: dict[str, Any]) -> None:
    """Rollouts token for token; a signal to one rank while its thread samples stops both; an error is named by both."""
    assert report["codes"] == [0, 0] and report["same"]
    assert report["stopped"] == [75, 75] and report["seconds"] < 5
    assert report["failed"] == [1, 1] and report["named"] == [True, True]


def test_two_ranks_make_rollouts_ahead(tmp_path: Path, warm_python: str) -> None:
    report = lives(tmp_path, "0", script="ahead_lives.py", python=warm_python)
    check_two_ranks_ahead(report["two_ranks"])


@pytest.mark.slow
def test_fifty_kills_of_a_run_whose_rollouts_are_made_ahead(tmp_path: Path) -> None:
    """Of which some change the number of ranks. Runs that have not said otherwise end in the same bits."""
    report = lives(tmp_path, "5", script="ahead_lives.py")
    check_two_ranks_ahead(report["two_ranks"])
    assert report["kills"] == dict.fromkeys(AIMS, 5) and report["different"] == [] and report["exact"] >= 1
    assert report["ranks"]["kills"] == 15 and report["ranks"]["wrong"] == []
