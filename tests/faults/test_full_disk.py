"""A disk that fills up at any moment: one message with path, needed and free bytes, and nothing is lost by it."""

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.checkpoint import CheckpointError, CheckpointManager
from llm_trainer.cli.main import main
from llm_trainer.train.hooks import Hook
from llm_trainer.train.snapshot import Checkpoints

sys.path.insert(0, str(Path(__file__).parent))
from victim import make_trainer, outcome

from small_disk import SmallDisk, fill

SAID = r"'{path}[^']*' could not be saved: No space left on device. It needs at least [\d.,]+ (MB|bytes); .*are free"


def press(disk: Path, first: int, last: int) -> Hook:
    """Let the disk be full from one step to another."""

    def change(run: Any) -> None:
        if run.progress.step == first:
            fill(disk)
        if run.progress.step == last:
            (disk / "filler").unlink()

    return Hook("press", change, every_steps=1)


def test_while_data_is_prepared(
    small_disk: SmallDisk, tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(1 << 20)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"row {i} " + "some words " * 60}) + "\n" for i in range(7000)))
    command = [
        "data",
        "prepare",
        str(rows),
        "--tokenizer",
        str(reference_dir / "tokenizer"),
        "--out",
        str(disk / "out"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(command)
    said = capsys.readouterr().err
    assert ended.value.code == 1 and re.search(SAID.format(path=disk / "out"), said) and said.count("\n") == 1
    assert [path for path in disk.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("background", [True, False])
def test_at_the_first_save_and_not_any_more_later(
    background: bool, small_disk: SmallDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(8 << 20)
    make_trainer(tmp_path / "whole", max_epochs=1).train()
    capsys.readouterr()

    def wait_for_the_save(run: Any) -> None:
        run.checkpoints.saving._pending and run.checkpoints.saving._pending.exception()

    hooks = [Hook("wait", wait_for_the_save, every_steps=4), press(disk, 1, 4)]  # the save is that of step 3
    options: dict[str, Any] = {"log_dir": str(tmp_path / "log"), "max_epochs": 1, "save_in_background": background}
    make_trainer(disk / "run", hooks=hooks, **options).train()
    said = capsys.readouterr().out
    assert len(re.findall(SAID.format(path=disk / "run" / "checkpoint-00000003"), said)) == said.count("WARNING") == 1
    assert "Training goes on" in said
    pressed, whole = CheckpointManager(disk / "run").load(), CheckpointManager(tmp_path / "whole").load()
    assert pressed.step == whole.step == 8
    (disk / "run" / "log").symlink_to(tmp_path / "log")
    kept = outcome(disk / "run"), outcome(tmp_path / "whole")
    assert kept[0]["weights"] == kept[1]["weights"] and kept[0]["metrics"] == kept[1]["metrics"]


def test_at_a_save_with_a_file_of_the_best(small_disk: SmallDisk, tmp_path: Path) -> None:
    disk = small_disk(8 << 20)
    trainer = make_trainer(disk / "run", log_dir=str(tmp_path / "log"), max_epochs=1, best_file=True)
    saved = trainer.save_checkpoint(is_best=True)
    before = {path: path.read_bytes() for path in (disk / "run").rglob("*") if path.is_file()}
    fill(disk)
    for leave in (0, 8 << 10, 150 << 10):  # no lock, no checkpoint, no best_model.pt
        os.truncate(disk / "filler", (disk / "filler").stat().st_size - leave)
        with pytest.raises(CheckpointError, match=SAID.format(path=disk / "run")):
            trainer.save_checkpoint(is_best=True)
        fill(disk)
    assert before == {path: path.read_bytes() for path in (disk / "run").rglob("*") if path.is_file()}
    assert CheckpointManager(disk / "run").latest() == Path(saved)


def test_while_a_model_is_published(
    small_disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a link does not fit any more, nor a copy: said, and the run has ended well, with all its checkpoints."""
    disk = small_disk(8 << 20)

    def refuse(self: Path, target: Path, target_is_directory: bool = False) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def publish(self: Checkpoints) -> None:
        fill(disk)
        monkeypatch.setattr(Path, "symlink_to", refuse)
        publish_now(self)

    publish_now = Checkpoints.publish
    monkeypatch.setattr(Checkpoints, "publish", publish)
    last = make_trainer(disk / "run", log_dir=str(tmp_path / "log"), max_epochs=1).train()
    said = capsys.readouterr().out
    assert "eval_loss" in last and len(re.findall(SAID.format(path=disk / "run" / "model"), said)) == 1
    assert said.count("WARNING") == 1 and CheckpointManager(disk / "run").load().step == 8
    assert (disk / "run" / "model").resolve().is_dir(), "what was published before is there"
