"""Memory that runs out at random places, or under a limit on the address space: the same curve, and nobody hangs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "short_memory.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_lives_alone_and_in_two_processes(tmp_path: Path) -> None:
    """Rows of every step, losses, gradient norms and weights; in the table of docs/results.md."""
    command = [sys.executable, str(SCRIPT), str(tmp_path), "30"]
    variables = os.environ | {"MALLOC_ARENA_MAX": "1"}  # else each thread asks for 64 MiB of addresses
    done = subprocess.run(command, capture_output=True, text=True, timeout=1700, env=variables)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    room = report.pop("little_room")
    print(json.dumps(report))
    assert report["different"] == [] and report["hit"] > 0.8 * report["lives"] and report["slowest_s"] < 60
    plain, found = (room[name]["results"][0] for name in ("plain", "found"))
    assert plain["tokens"] is None and found["tokens"] is not None, room["found"]["texts"]
    for one, other in zip(found["lines"], plain["lines"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-6)
