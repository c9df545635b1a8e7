"""Curves side by side: where they part, who is to blame, and what is only missing."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_trainer.cli import compare
from llm_trainer.cli.compare import parting
from llm_trainer.cli.main import main

LOSSES = [4.0, 3.5, 3.0, 2.5]


@pytest.fixture
def run_yaml(tmp_path: Path) -> Path:
    values = {
        "model_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "tokenizer": "somewhere",
        "file_dataset": ["rows.jsonl"],
        "run_config": {"precision": "fp32", "device": "cpu"},
        "sft_config": {},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


class Runs:
    """Stands for the processes: writes the losses that a way shall have, or a last line and an exit code."""

    def __init__(self) -> None:
        self.losses: dict[str, list[float]] = {}
        self.ends: dict[str, tuple[int, str]] = {}
        self.commands: dict[str, list[str]] = {}

    def __call__(self, command: list[str], log: Path) -> tuple[int, int]:
        way = log.parent.name
        self.commands[way] = command
        (log.parent / "log").mkdir(parents=True)
        code, last = self.ends.get(way, (0, "done"))
        log.write_text(f"first\n{last}\n\n")
        lines = [
            {"step": step, "loss": loss, "grad_norm": 1.0, "tokens_per_second": 100.0 * step}
            for step, loss in enumerate(self.losses.get(way, LOSSES), 1)
        ]
        (log.parent / "log" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return code, 3 << 20


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    stand_in = Runs()
    monkeypatch.setattr(compare, "_run", stand_in)
    return stand_in


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


def test_the_first_step_that_differs_is_named() -> None:
    reference = {1: 4.0, 2: 3.5, 3: 3.0}
    assert parting(reference, {1: 4.0, 2: 3.5009, 3: 3.0}, 1e-3) is None
    assert parting(reference, {1: 4.0, 2: 3.5011, 3: 3.0}, 1e-3) == 2
    assert parting(reference, {1: 4.0, 2: 3.5}, 1e-3) == 3, "a curve that ends early has parted"
    assert parting(reference, {1: 4.0, 2: math.nan, 3: 3.0}, 1e-3) == 2
    assert parting(reference, reference, 0.0) is None


def test_equal_curves(run_yaml: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    picture = tmp_path / "curves.svg"
    runs.losses["lowmem"] = [loss + 2e-4 for loss in LOSSES]
    assert run("compare", run_yaml, "--engines", "torch,lowmem", "--steps", 4, "-o", picture) == 0
    shown = capsys.readouterr().out
    assert "   2      3.500000      3.500200" in shown
    assert (
        "torch                350         3 MiB     0 lines  what the others are compared with" in shown
    )  # without warm-up
    assert "the same within 0.001 (2.0e-04 at most)" in shown
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(("way", "code"), [("lowmem", 1), ("fsdp", 1), ("llamafactory", 0)])
def test_curves_that_part(way: str, code: int, run_yaml: Path, runs: Runs, capsys: pytest.CaptureFixture) -> None:
    """Of engines of ours that is a mistake; of LLaMA-Factory it is news."""
    runs.losses[way] = [4.0, 3.5, 3.1, 2.9]
    assert run("compare", run_yaml, "--engines", f"torch,{way}") == code
    shown = capsys.readouterr().out
    assert "PARTS at step 3, by more than 0.001 (4.0e-01 at most)" in shown
    assert f"{way}: {compare.WAYS[way].hint}" in shown and "only the divisor differs" not in shown
    assert run("compare", run_yaml, "--engines", f"torch,{way}", "--tolerance", 0.5) == 0


def test_another_divisor_is_recognised(run_yaml: Path, runs: Runs, capsys: pytest.CaptureFixture) -> None:
    runs.losses["llamafactory"] = [loss * 31 / 32 for loss in LOSSES]
    assert run("compare", run_yaml, "--engines", "torch,llamafactory") == 0
    assert "every loss is 0.9688 of the first one's, so only the divisor differs" in capsys.readouterr().out


def test_what_is_not_installed_is_skipped(
    run_yaml: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compare, "find_spec", lambda name: None if name == "deepspeed" else True)
    runs.ends["llamafactory"] = (compare.EXIT_UNAVAILABLE, "LLaMA-Factory has no environment: do this")
    assert run("compare", run_yaml, "--engines", "deepspeed,torch,llamafactory,lowmem") == 0
    shown = capsys.readouterr().out
    assert "deepspeed     skipped: pip install deepspeed" in shown
    assert "llamafactory  skipped: LLaMA-Factory has no environment: do this" in shown
    assert shown.count("what the others are compared with") == 1 and shown.count("the same within") == 1


def test_a_run_that_fails_is_shown_and_fails(run_yaml: Path, runs: Runs, capsys: pytest.CaptureFixture) -> None:
    runs.ends["fsdp"] = (2, "error: no such file\nroot cause: exit code 2")
    runs.ends["hf"] = (-9, "loading")
    assert run("compare", run_yaml, "--engines", "torch,fsdp,hf,lowmem") == 1
    shown = capsys.readouterr().out
    assert "fsdp          FAILED: exit code 2, its last words:\n  error: no such file\nhf " in shown
    assert "FAILED: exit code -9, its last words:\n  first\n  loading\n" in shown
    assert shown.count("the same within") == 1


def test_everything_but_the_engine_is_the_same(run_yaml: Path, runs: Runs, tmp_path: Path) -> None:
    engines = "torch,fsdp,hf,llamafactory"
    out = tmp_path / "out"
    assert run("compare", run_yaml, "batch_size=7", "--engines", engines, "--nproc", 2, "--steps", 5, "--out", out) == 0

    def told(way: str) -> list[Any]:
        return [argument for argument in runs.commands[way] if "=" in argument and "save_dir" not in argument]

    wanted = {"batch_size=7", "run_config.max_steps=5", "run_config.log_interval=1", "eval_dataset=null",
              "data_loader_config.data_loader_shuffle=false", "run_config.resume=never"}  # fmt: skip
    for way in engines.split(","):
        assert wanted <= set(told(way)) and f'run_config.save_dir="{out / way}"' in runs.commands[way]
    assert (
        runs.commands["torch"][-1] == "run_config.engine=torch"
        and runs.commands["fsdp"][-1] == "run_config.engine=fsdp"
    )
    assert "--nproc-per-node=2" in runs.commands["hf"] and "--nproc-per-node=2" not in runs.commands["llamafactory"]
    assert runs.commands["llamafactory"][-2:] == ["--nproc", "2"]


def test_long_runs_are_shown_in_a_screen(run_yaml: Path, runs: Runs, capsys: pytest.CaptureFixture) -> None:
    runs.losses["torch"] = [1.0] * 200
    assert run("compare", run_yaml, "--engines", "torch") == 0
    assert 12 < capsys.readouterr().out.count("1.000000") <= compare.ROWS


def test_mistakes_are_told_before_anything_runs(
    run_yaml: Path, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("compare", run_yaml, "--engines", "torch,megatron") == 2
    assert "--engines: got megatron, expected some of torch, fsdp" in capsys.readouterr().err
    assert run("compare", run_yaml, "--out", tmp_path) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert runs.commands == {}


def test_peak_memory_and_exit_code_of_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own memory, whatever this process has."""
    ours = bytearray(500 << 20)  # noqa: F841
    monkeypatch.setattr(compare, "_gpu_bytes", lambda: iter(()))  # as on a machine without one
    program = "import sys; block = bytearray(200 << 20); print('last'); sys.exit(3)"
    code, peak = compare._run([sys.executable, "-c", program], tmp_path / "way" / "output.txt")
    assert code == 3 and 200 << 20 < peak < 400 << 20
    assert (tmp_path / "way" / "output.txt").read_text() == "last\n"
