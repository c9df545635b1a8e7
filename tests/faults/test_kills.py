"""Kills and signals at any moment: the run that was started again ends as the one that was left alone, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

VICTIM = Path(__file__).parent / "victim.py"
AIMED = Path(__file__).parent / "aimed.py"
AIMS = ("store", "save", "publish", "best_model", "rotate")


def kill(folder: Path, kills: int, *options: str, python: str = sys.executable) -> dict[str, Any]:
    """The report of victim.py; its comparison covers weights, optimizer, schedule, best checkpoint and metrics.jsonl."""
    command = [python, str(VICTIM), str(folder), str(kills), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    print(f"{' '.join(options)}: {done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])  # libraries may have spoken before


def test_three_kills(tmp_path: Path, warm_python: str) -> None:
    report = kill(tmp_path, 3, "plain", "fp32", "behind", python=warm_python)
    assert report["kills"] == 3 and report["different"] == [] and report["lines"] == 18


@pytest.mark.slow
def test_thirty_kills_of_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft")
    for options in (["fp32", "behind"], ["bf16"]):
        report = kill(tmp_path / options[0], 15, "lora", *options)
        assert report["kills"] == 15 and report["during_save"] >= 3 and report["different"] == []


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["previous_step", "bias"])
def test_ten_kills_of_experts(balance: str, tmp_path: Path) -> None:
    report = kill(tmp_path, 10, balance, "fp32", "behind")
    assert report["kills"] == 10 and report["during_save"] >= 2 and report["different"] == []


@pytest.mark.slow
def test_fifteen_kills_of_a_model_that_sees(tmp_path: Path) -> None:
    """Its rows lie flat, and workers decode their images."""
    pytest.importorskip("PIL", reason="needs pillow")
    report = kill(tmp_path, 15, "vision", "fp32", "behind")
    assert report["kills"] == 15 and report["during_save"] >= 2 and report["different"] == []


@pytest.mark.slow
def test_ten_kills_of_adapters_on_4_bits_with_moments_in_8(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="needs peft")
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    report = kill(tmp_path, 10, "qlora", "fp32", "behind")
    assert report["kills"] == 10 and report["during_save"] >= 2 and report["different"] == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["plain", "qwen3"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_kills(model: str, precision: str, tmp_path: Path) -> None:
    report = kill(tmp_path, 10, model, precision)
    assert report["kills"] == 10 and report["during_save"] >= 2 and report["different"] == []


@pytest.mark.slow
@pytest.mark.parametrize("model", ["plain", "qwen3"])
def test_twenty_kills_while_checkpoints_are_written_behind_the_training(model: str, tmp_path: Path) -> None:
    report = kill(tmp_path, 20, model, "fp32", "behind")
    assert report["kills"] == 20 and report["during_save"] >= 8 and report["different"] == []


def aimed_kills(folder: Path, kills: int, python: str) -> None:
    """The report of aimed.py: `save_dir/model` opened after every kill, and every run ended as the one left alone."""
    command = [python, str(AIMED), str(folder), str(kills), *AIMS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    report = json.loads(done.stdout)
    assert report["wrong"] == [] and report["kills"] == dict.fromkeys(AIMS, kills)
    assert all(report["operations"][aim] > 0 for aim in AIMS)


def test_a_kill_between_two_operations_on_every_kind_of_file(tmp_path: Path, warm_python: str) -> None:
    aimed_kills(tmp_path, 1, warm_python)


@pytest.mark.slow
def test_fifty_kills_between_two_operations(tmp_path: Path) -> None:
    aimed_kills(tmp_path, 10, sys.executable)


@pytest.mark.parametrize(("number", "where"), [(signal.SIGTERM, "step"), (signal.SIGINT, "evaluation")])
def test_a_signal_saves_and_exits_with_75(number: signal.Signals, where: str, tmp_path: Path) -> None:
    """To the whole process group, as a terminal and Slurm send it: the loader's workers must survive it."""
    began = time.monotonic()
    command = [sys.executable, str(VICTIM), "--signalled", where, str(tmp_path / "run")]
    with (tmp_path / "out").open("w") as out:
        run = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        while not (tmp_path / "run" / f"in-{where}").exists():
            assert run.poll() is None and time.monotonic() - began < 60, (tmp_path / "out").read_text()
            time.sleep(0.02)
        os.killpg(run.pid, number)
        assert run.wait(timeout=30) == 75, (tmp_path / "out").read_text()
    text = (tmp_path / "out").read_text()
    assert text.count("interrupted at step") == 1 and "Traceback (most recent call last)" not in text
    if where == "evaluation":  # the first one, after step 4: the signal did not wait for another step
        assert "interrupted at step 4: saved" in text
