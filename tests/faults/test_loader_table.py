"""Whatever loader a user has: after a stop every sample comes as often as without it, or the loader is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from loader_table import Cell, cells, play_all

WITH_WORKERS = [
    Cell("shuffle_generator", "persistent", 3, (1, 1)),
    Cell("weighted_random", "persistent", 2, (2, 1)),
    Cell("iterable_python_random", "persistent", 2, (1, 1)),
]


def test_a_stop_in_the_second_epoch_of_every_loader() -> None:
    wanted = [cell for cell in cells() if (cell.workers, cell.epoch) == ("alone", 2)]
    assert len(wanted) >= 120 and play_all(wanted) == {}


def test_a_stop_of_loaders_whose_workers_are_kept() -> None:
    assert play_all(WITH_WORKERS) == {}


@pytest.mark.slow
def test_every_cell() -> None:
    """Each kind of loader in a process that must end by itself."""
    command = [sys.executable, str(Path(__file__).parent / "loader_table.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3500)
    print(done.stdout)
    report = json.loads(done.stdout)
    assert report["cells"] >= 120 and report["wrong"] == {}, done.stderr[-3000:]
