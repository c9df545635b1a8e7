"""The files of a log folder: log.txt, lr.txt, gen.txt and metrics.jsonl. A full disk delays their lines, and no more."""

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path

from llm_trainer.config.errors import counted
from llm_trainer.disk import FULL_OR_BROKEN, DiskError, cannot_write, storage_failure

LOGS = ("log.txt", "lr.txt", "gen.txt", "metrics.jsonl", "tensorboard")
OWNER = ".run"  # in a log folder outside save_dir: the way from there to the save_dir whose logs it has


class FullDisk:
    """Says once that lines cannot be written, and once that none is missing any more."""

    def __init__(self, warn: Callable[[str], object] = print) -> None:
        self.warn = warn
        self._waiting: set[Path] = set()

    def has_refused(self, path: Path, reason: str, num_bytes: int) -> None:
        """Note that lines of a file have to wait."""
        if not self._waiting:
            self.warn(
                f"{cannot_write(path, reason, num_bytes)}. Training goes on; the lines of the logs in '{path.parent}' "
                "are kept in memory until they can be written"
            )
        self._waiting.add(path)

    def has_taken(self, path: Path) -> None:
        """Note that all lines of a file are written."""
        if path in self._waiting:
            self._waiting.remove(path)
            if not self._waiting:
                self.warn(f"the logs in '{path.parent}' are complete again")


def set_aside(folder: Path, save_dir: Path) -> str | None:
    """Rename the logs in `folder` if they are of another run than the one in `save_dir`: it would cut them off.

    Returns:
        What to say of it; None: there are none.

    Raises:
        DiskError: a file cannot be renamed.
    """
    folder, save_dir = folder.resolve(), save_dir.resolve()
    try:
        owner = _owner(folder, save_dir)
        if owner == save_dir:
            return None
        kept = _renamed([folder / name for name in LOGS if (folder / name).exists()])
    except OSError as error:
        raise DiskError(folder, error.strerror or str(error), 0) from error
    with suppress(OSError):  # of a full disk: they are set aside once more when this run goes on
        folder.mkdir(parents=True, exist_ok=True)
        (folder / OWNER).write_text(os.path.relpath(save_dir, folder), encoding="utf-8")
    if not kept:
        return None
    whose = "another run" if owner is None else f"the run in '{owner}'"
    names = ", ".join(path.name for path in kept)
    return f"'{folder}' has the logs of {whose}; they are kept there as {names}. Give each run a log_dir of its own, or none"


def _owner(folder: Path, save_dir: Path) -> Path | None:
    """The `save_dir` whose logs are in `folder`, as far as is known: where nothing is noted there, the one that it lies in."""
    note = folder / OWNER
    way = note.read_text(encoding="utf-8") if note.exists() else ""
    if way:
        return Path(os.path.normpath(folder / way))
    return save_dir if folder.is_relative_to(save_dir) else None


def copy_logs(folder: Path, save_dir: Path, to: Path) -> None:
    """Copy the logs in `folder`, if they are of the run in `save_dir`, into a new one: one that begins before their last step
    cuts them off.
    """
    folder, save_dir = folder.resolve(), save_dir.resolve()
    if _owner(folder, save_dir) != save_dir:  # these stay, under other names
        return
    to.mkdir()
    for name in LOGS:
        path = folder / name
        if path.is_dir():
            shutil.copytree(path, to / name)
        elif path.exists():
            shutil.copy2(path, to / name)


def _renamed(files: list[Path]) -> list[Path]:
    """Rename files by the smallest number behind their names that is free for all of them."""
    number = 1
    while any(file.with_stem(f"{file.stem}-{number}").exists() for file in files):
        number += 1
    return [file.rename(file.with_stem(f"{file.stem}-{number}")) for file in files]


class LineFile:
    """Lines that are on the disk as soon as they are written, each whole; those that do not fit on it wait.

    Args:
        path: the file; its folder is made if needed.
        last_step: a resumed run goes on after it: lines of later steps, which will be run again, and a line that was torn
            when the process died are cut off. -1 begins the file anew.
        trouble: hears about a full disk.

    Raises:
        DiskError: the file cannot be written, for another reason than a full disk.
    """

    _STEP = re.compile(rb'\bstep(?:=|": )(\d+)\b')

    def __init__(self, path: Path, last_step: int = -1, trouble: FullDisk | None = None) -> None:
        self.path, self._trouble = path, trouble or FullDisk()
        self._waiting: list[bytes] = []
        self._file: FileIO | None = None
        try:
            if path.exists():
                os.truncate(path, self._length_until(last_step))  # in place: this needs no space
        except OSError as error:
            raise DiskError(path, error.strerror or str(error), 0) from error
        self._write_waiting()

    def _length_until(self, last_step: int) -> int:
        """Bytes of the lines up to `last_step`."""
        length = 0
        with self.path.open("rb") as file:
            for line in file:
                found = self._STEP.search(line)
                is_later = found is not None and int(found[1]) > last_step
                if last_step < 0 or is_later or not line.endswith(b"\n"):
                    break
                length += len(line)
        return length

    def append(self, line: str) -> None:
        """Write a line, now or as soon as there is room."""
        self._waiting.append(f"{line}\n".encode(errors="backslashreplace"))
        self._write_waiting()

    def _write_waiting(self) -> None:
        content = b"".join(self._waiting)
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("ab", buffering=0)
            _write_whole(self._file, content)
        except OSError as error:
            reason = storage_failure(error, FULL_OR_BROKEN)
            if reason is None:
                raise DiskError(self.path, error.strerror or str(error), len(content)) from error
            self._trouble.has_refused(self.path, reason, len(content))
        else:
            self._waiting.clear()
            self._trouble.has_taken(self.path)

    def close(self) -> None:
        """Write what still waits, or say that it is lost."""
        self._write_waiting()
        if self._waiting:
            lost = counted(len(self._waiting), "line")
            self._trouble.warn(f"the last {lost} of '{self.path}' could not be written and will be missing in it")
        if self._file is not None:
            self._file.close()


def _write_whole(file: FileIO, content: bytes) -> None:
    """Append all of `content`, or nothing."""
    length, left = os.fstat(file.fileno()).st_size, memoryview(content)
    try:
        while left:
            left = left[os.write(file.fileno(), left) :]
    except OSError:
        os.ftruncate(file.fileno(), length)  # half a line would spoil the next one
        raise


class TextLog:
    """`log.txt`, lines like `2026-01-31 12:00:00 step=10 loss=2.345 ...`."""

    def __init__(self, folder: str | Path, last_step: int = -1, trouble: FullDisk | None = None) -> None:
        """Continues the file in `folder` after `last_step`; -1 begins it anew."""
        self._file = LineFile(Path(folder) / "log.txt", last_step, trouble)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; spaces in names become `_`."""
        names = [re.sub(r"[\s=]", "_", name) for name in values]
        pairs = [f"{name}={value:.8g}" for name, value in zip(names, values.values(), strict=True)]
        self.note(step, " ".join(pairs))

    def note(self, step: int, words: str) -> None:
        """Appends a line of words."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.append(f"{now} step={step} {' '.join(words.split())}")

    def close(self) -> None:
        self._file.close()


class LearningRates:
    """`lr.txt`: a line for every step, like `step=10 learning_rate=0.001`."""

    def __init__(self, folder: str | Path, last_step: int = -1, trouble: FullDisk | None = None) -> None:
        """Continues the file in `folder` after `last_step`; -1 begins it anew."""
        self._file = LineFile(Path(folder) / "lr.txt", last_step, trouble)

    def note(self, step: int, learning_rate: float) -> None:
        """Appends a line: the learning rate that a step was taken with."""
        self._file.append(f"step={step} learning_rate={learning_rate:.8g}")

    def close(self) -> None:
        self._file.close()


class Answers:
    """`gen.txt`: a line for every answer to one of `eval_prompts`; both as Python writes strings, so each is one line."""

    def __init__(self, folder: str | Path, last_step: int = -1, trouble: FullDisk | None = None) -> None:
        """Continues the file in `folder` after `last_step`; -1 begins it anew."""
        self._file = LineFile(Path(folder) / "gen.txt", last_step, trouble)

    def note(self, step: int, prompt: str, answer: str) -> None:
        """Appends a line."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._file.append(f"{now} step={step} {prompt!r} -> {answer!r}")

    def close(self) -> None:
        self._file.close()


class JsonLines:
    """`metrics.jsonl`: an object per line with `step`, `time` (seconds since 1970) and all metrics.

    What the machine chose has lines of its own, whose only other key is `choices`.
    """

    def __init__(self, folder: str | Path, last_step: int = -1, trouble: FullDisk | None = None) -> None:
        """Continues the file in `folder` after `last_step`; -1 begins it anew."""
        self._file = LineFile(Path(folder) / "metrics.jsonl", last_step, trouble)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; JSON has no NaN and no infinity, so both become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._append(step, finite)

    def note_choices(self, step: int, choices: Mapping[str, Mapping[str, str]], **facts: object) -> None:
        """Appends a line: the fields of each choice, by its name, and other facts beside them."""
        self._append(step, {"choices": choices, **facts})

    def _append(self, step: int, values: Mapping[str, object]) -> None:
        self._file.append(json.dumps({"step": step, "time": round(time.time(), 3), **values}, ensure_ascii=False))

    def close(self) -> None:
        self._file.close()
