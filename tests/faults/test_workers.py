"""Workers of a DataLoader live as long as there is something to save, and never longer than their process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CODES = {"ends": 0, "fails": 1, "term": 75, "int": 75, "usr1": 75, "kill": -9}


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """How every life of loader_lives.py ended."""
    command = [sys.executable, str(Path(__file__).parent / "loader_lives.py"), str(tmp_path_factory.mktemp("lives"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CODES)
def test_a_script_with_persistent_workers_ends_and_leaves_none(name: str, lives: dict[str, Any]) -> None:
    """By itself, by an error, by what schedulers and terminals send to all processes, and when it is killed."""
    life = lives[name]
    assert (life["code"], life["workers"], life["left"]) == (CODES[name], 2, 0), life["out"]
    assert ("interrupted at step" in life["out"]) is (CODES[name] == 75)
