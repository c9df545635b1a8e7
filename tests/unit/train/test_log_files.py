"""A full disk delays the lines of logs: said once, nothing torn, and nothing missing once there is room."""

import json
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.disk import DiskError
from llm_trainer.state import Progress
from llm_trainer.train import run as run_module
from llm_trainer.train.hooks import Hook
from llm_trainer.train.log_files import FullDisk, LineFile, copy_logs, set_aside
from llm_trainer.train.reporter import Reporter
from llm_trainer.train.signals import TrainingInterrupted

sys.path.insert(0, str(Path(__file__).parents[2] / "faults"))
from victim import make_trainer, metric_lines

from small_disk import SmallDisk, fill


def test_lines_wait_while_the_disk_is_full(small_disk: SmallDisk) -> None:
    disk, told = small_disk(256 << 10), list[str]()
    trouble = FullDisk(told.append)
    paths = [disk / "log" / "a.txt", disk / "log" / "b.txt"]
    files = [LineFile(path, trouble=trouble) for path in paths]
    line = "x" * 3000
    for step in range(30):
        if step == 10:
            fill(disk)
        for file in files:
            file.append(f"step={step} {line}")
    assert len(told) == 1 and re.search(
        r"a.txt' could not be saved: No space left.*needs at least [36],0.. bytes", told[0]
    )
    assert "Training goes on" in told[0] and "0 bytes are free" in told[0]
    for path in paths:
        content = path.read_bytes()
        assert content.endswith(b"x\n") and 10 <= content.count(b"\n") < 30, "no line is torn"
    (disk / "filler").unlink()
    for file in files:
        file.append("step=30")
    for path in paths:
        assert path.read_text().splitlines() == [*(f"step={step} {line}" for step in range(30)), "step=30"]
    assert len(told) == 2 and "are complete again" in told[1]
    fill(disk)
    for file in files:
        file.append(line * 2)
        file.close()
    lost = [message for message in told[2:] if "the last 1 line of" in message and "will be missing" in message]
    assert len(lost) == 2


def test_a_torn_line_is_cut_off_on_a_full_disk_too(small_disk: SmallDisk) -> None:
    disk = small_disk(32 << 10)
    (disk / "a.txt").write_text("step=1 x\nstep=2 x\nstep=3 x\nstep=4")
    fill(disk)
    for last_step, kept in ((3, [1, 2, 3]), (1, [1]), (-1, [])):
        LineFile(disk / "a.txt", last_step, FullDisk(lambda message: None)).close()
        assert (disk / "a.txt").read_text() == "".join(f"step={step} x\n" for step in kept)
    with pytest.raises(DiskError, match="could not be saved: (File exists|Not a directory)"):
        LineFile(disk / "a.txt" / "b.txt")


def test_logs_of_another_run_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs that take turns in one folder of logs: each begins its own files, and no line is lost."""
    logs = tmp_path / "logs"
    options: dict[str, Any] = {"log_dir": str(logs), "log_interval": 1, "max_epochs": 1, "resume": "auto"}

    def steps_of(name: str) -> list[int]:
        lines = [json.loads(line) for line in (logs / name).read_text().splitlines()]
        return [line["step"] for line in lines if "loss" in line]

    make_trainer(tmp_path / "first", **options, max_steps=3).train()
    assert steps_of("metrics.jsonl") == [1, 2, 3]
    make_trainer(tmp_path / "first", **options, max_steps=4).train()
    assert steps_of("metrics.jsonl") == [1, 2, 3, 4] and not (logs / "metrics-1.jsonl").exists()
    assert "has the logs of" not in capsys.readouterr().out

    make_trainer(tmp_path / "second", **options, max_steps=2).train()
    assert (steps_of("metrics-1.jsonl"), steps_of("metrics.jsonl")) == ([1, 2, 3, 4], [1, 2])
    told = f"WARNING: '{logs}' has the logs of the run in '{tmp_path / 'first'}'; they are kept there as log-1.txt, lr-1.txt, "
    assert told in capsys.readouterr().out
    make_trainer(tmp_path / "first", **options, max_steps=6).train()
    assert (steps_of("metrics-1.jsonl"), steps_of("metrics-2.jsonl")) == ([1, 2, 3, 4], [1, 2])
    assert steps_of("metrics.jsonl") == [4, 5, 6]


def test_logs_within_a_run_are_its_own_unless_another_has_written_there(tmp_path: Path) -> None:
    log, other = tmp_path / "run" / "log", tmp_path / "other"
    log.mkdir(parents=True)
    (log / "log.txt").write_text("step=1 x\n")
    assert set_aside(log, tmp_path / "run") is None
    assert "has the logs of another run" in str(set_aside(log, other))
    (log / "log.txt").write_text("step=2 x\n")
    assert f"the run in '{other}'" in str(set_aside(log, tmp_path / "run"))
    assert (log / "log-1.txt").read_text() == "step=1 x\n" and (log / "log-2.txt").read_text() == "step=2 x\n"
    assert set_aside(log, tmp_path / "run") is None


def test_logs_of_another_run_are_not_copied_beside_the_checkpoints_of_this_one(tmp_path: Path) -> None:
    logs, first, second = (tmp_path / name for name in ("logs", "first", "second"))
    assert set_aside(logs, first) is None
    (logs / "log.txt").write_text("step=1 of the first\n")
    copy_logs(logs, second, tmp_path / "of_second")
    copy_logs(logs, first, tmp_path / "of_first")
    assert not (tmp_path / "of_second").exists()
    assert (tmp_path / "of_first" / "log.txt").read_text() == "step=1 of the first\n"


def test_a_note_that_a_full_disk_left_empty_names_nobody(tmp_path: Path) -> None:
    (tmp_path / ".run").touch()
    (tmp_path / "log.txt").write_text("step=1\n")
    assert f"'{tmp_path}' has the logs of another run; they are kept" in str(set_aside(tmp_path, tmp_path / "own"))
    assert (tmp_path / ".run").read_text() == "own"


def test_a_full_disk_of_the_logs_neither_ends_a_run_nor_loses_a_line(
    small_disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(64 << 10)

    def press(run: Any) -> None:
        if run.progress.step == 3:
            fill(disk)
        if run.progress.step == 20:
            (disk / "filler").unlink()

    options: dict[str, Any] = {"log_interval": 1, "max_epochs": 4, "save_interval_steps": 100}
    make_trainer(tmp_path / "whole", log_dir=str(tmp_path / "whole" / "log"), **options).train()
    capsys.readouterr()
    pressed = [Hook("press", press, every_steps=1)]
    make_trainer(tmp_path / "pressed", log_dir=str(disk / "log"), hooks=pressed, **options).train()
    told = capsys.readouterr().out
    assert told.count("WARNING") == 2 and "Training goes on" in told and "are complete again" in told
    assert metric_lines(disk) == metric_lines(tmp_path / "whole")
    for name in ("lr.txt", "log.txt"):
        whole = (tmp_path / "whole" / "log" / name).read_text().count("step=")
        assert (disk / "log" / name).read_text().count("step=") == whole


def test_a_writer_of_a_library_whose_disk_is_full_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    class Full:
        def write(self, step: int, values: Any) -> None:
            raise RuntimeError("worker died") from OSError(28, "No space left on device")

    seen: list[int] = []

    class Seeing(Full):
        def write(self, step: int, values: Any) -> None:
            seen.append(step)

    progress = Progress()
    reporter = Reporter(True, progress)
    reporter._writers = [Full(), Seeing()]  # type: ignore[list-item]
    for progress.step in (1, 2):
        reporter.write({"loss": 1.0})
    assert seen == [1, 2]
    assert capsys.readouterr().out.count("WARNING: Full: No space left on device; it gets no more metrics") == 1


def test_answers_are_kept_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over a stop right after they were given, and one after the steps that followed."""
    monkeypatch.setattr(run_module, "answer", lambda *given: ["a\nb\x1b[31m\ud800"])
    lives = 0
    while True:
        lives += 1

        def stop(run: Any) -> None:
            if run.progress.step % 4 < 2:
                os.kill(os.getpid(), signal.SIGTERM)

        trainer = make_trainer(tmp_path, eval_prompts=["?"], max_epochs=1, hooks=[Hook("stop", stop, every_steps=1)])
        try:
            trainer.train()
            break
        except TrainingInterrupted:
            pass
    lines = (tmp_path / "log" / "gen.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [f"step={n} '?' -> 'a\\nb\\x1b[31m\\ud800'" for n in (4, 8)]
    assert lives > 3 and len(metric_lines(tmp_path)[0]) > 2
