"""Loaders of users on real processes: a stop, then as many ranks as before, more, or fewer."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

RANKS = Path(__file__).parent / "loader_ranks.py"
FEW = ["distributed_or_shuffle", "deals_itself"]


def play(python: str, folder: Path, *loaders: str) -> dict[str, Any]:
    """The report of loader_ranks.py."""
    command = [python, str(RANKS), str(folder), *loaders]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1000)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_every_sample_comes_as_often_as_without_the_stop(tmp_path: Path, warm_python: str) -> None:
    assert play(warm_python, tmp_path, *FEW) == {"cells": 20, "wrong": {}}


@pytest.mark.slow
def test_all_loaders(tmp_path: Path, warm_python: str) -> None:
    report = play(warm_python, tmp_path)
    print(report["cells"])
    assert report["cells"] > 200 and report["wrong"] == {}
