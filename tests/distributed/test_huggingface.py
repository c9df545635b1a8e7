"""`transformers.Trainer` in two real processes: one set of weights, one voice, nobody left hanging."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Reports = list[dict[str, Any]]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """What each rank saw of every scenario in hf_ranks.py."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(Path(__file__).parent / "hf_ranks.py")
    done = subprocess.run([*command, script, str(folder)], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


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
