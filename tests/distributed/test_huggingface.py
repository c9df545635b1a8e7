"""`transformers.Trainer` in two real processes: one set of weights, one voice, nobody left hanging."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, warm_python: str) -> Reports:
    """What each rank saw of every scenario in hf_ranks.py."""
    script, folder = Path(__file__).parent / "hf_ranks.py", tmp_path_factory.mktemp("ranks")
    done = subprocess.run([warm_python, str(script), str(folder)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    played = json.loads(done.stdout.splitlines()[-1])
    assert played["codes"] == [0, 0], "".join(played["texts"])[-3000:]
    return played["results"]


def test_ranks_may_have_rows_or_batches_that_others_lack(reports: Reports) -> None:
    ours, theirs = reports[0]["uneven"]["hf"], reports[0]["uneven"]["torch"]
    assert ours["weights"] == reports[1]["uneven"]["hf"]["weights"]
    assert len(ours["lines"]) == len(theirs["lines"]) == 10 and "eval_loss" in ours["lines"][-1]
    for line, expected in zip(ours["lines"], theirs["lines"], strict=True):
        assert line == pytest.approx(expected, rel=1e-5)


def test_a_signal_to_one_rank_stops_all_and_the_rest_is_exact(reports: Reports) -> None:
    first, second = (report["signalled"] for report in reports)
    assert first == second and (first["code"], first["stopped_at"]) == (75, 4)
    assert first["rest"] == first["whole"]


def test_no_terms_and_infinities_on_one_rank(reports: Reports) -> None:
    for scenario, steps, skipped in (("no_terms", 2, 0), ("inf_on_one", 3, 1)):
        first, second = (report[scenario] for report in reports)
        assert first == second and (first["step"], first["skipped"]) == (steps, skipped)
        assert all(-10 < weight < 10 for weight in first["weights"])
