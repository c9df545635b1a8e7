"""`benchmarks/gpu.py` on small models and the CPU: everything but the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "gpu"))
sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
import gpu_sections
from gpu_report import ROW_MARK, Report

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


def rows_of(section: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict]:
    """The rows that a section printed, by name."""
    report = Report(torch.device("cpu"), tiny=True, can_compile=False)
    gpu_sections.run(section, report)
    lines = [line.removeprefix(ROW_MARK) for line in capsys.readouterr().out.splitlines() if line.startswith(ROW_MARK)]
    rows = {row["name"]: row for row in map(json.loads, lines)}
    assert not [row for row in rows.values() if row.get("error")]
    return rows


def test_the_driver_keeps_rows_of_sections_that_end_well_and_badly(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path), "--tiny", "--device", "cpu"]
    done = subprocess.run([*command, "--sections", "machine"], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["torch"] == torch.__version__
    assert [row["name"] for row in results["rows"]] == ["versions", "bf16 matrix product", "memory copy"]
    assert results["rows"][1]["numbers"]["TFLOP/s"] > 0
    assert "| memory copy | GB/s" in (tmp_path / "results.md").read_text()
    # Without time nothing starts, and the row says so.
    subprocess.run([*command, "--sections", "head", "--seconds", "1"], capture_output=True, timeout=200)
    assert "left_out" in json.loads((tmp_path / "results.json").read_text())["rows"][0]


def test_a_failure_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(torch.device("cpu"), tiny=True, can_compile=False)
    assert report.attempt("broken", lambda: 1 // 0) is None
    row = json.loads(capsys.readouterr().out.removeprefix(ROW_MARK))
    assert row["error"] == "ZeroDivisionError: integer division or modulo by zero"
    assert "1 // 0" in "".join(row["traceback"])


@pytest.mark.parametrize("section", ["sft-0.6b", "dpo-0.6b"])
def test_training(section: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(section, capsys)
    assert {"hand", "ours"} <= rows.keys()
    for name in ("hand", "ours"):
        assert len(rows[name]["rounds"]) == 2
        assert min(rows[name]["rounds"]) > 0
    assert rows["ours"]["numbers"]["/ hand"] > 0


def test_head_attention_and_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows_of("head", capsys).keys() == {"plain", "chunked", "recomputed"}
    packed = rows_of("attention", capsys)
    assert packed["blocked, bf16: packed"]["numbers"]["passed"]
    assert packed["sdpa, fp32: packed"]["numbers"]["gradient"] < 1e-4
    bits = rows_of("bits", capsys)
    assert bits.pop("inputs on the host")["left_out"] == "the device has no memory of its own" and bits
    assert rows_of("decoding", capsys)["batch 2"]["numbers"]["tokens/s"] > 0
