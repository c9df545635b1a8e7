"""Files are whole or as they were before, and a full disk is one message with path, needed and free bytes."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_trainer.disk import DiskError, check_space, in_bytes, storage_failure, whole_file

SmallDisk = Callable[[int], Path]


def test_a_file_appears_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for text in ("first", "second"):
        with whole_file(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    with pytest.raises(KeyError), whole_file(path) as partial:
        partial.write_text("third")
        raise KeyError("a mistake")
    assert path.read_text() == "second" and [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_said_with_what_is_needed_and_free(small_disk: SmallDisk) -> None:
    disk = small_disk(200_000)
    (disk / "kept.bin").write_bytes(b"old")
    found = r"could not be saved: No space left on device. It needs at least 0.5 MB; .* were written and [\d.,]+ .* are free"
    with pytest.raises(DiskError, match=found), whole_file(disk / "kept.bin", needed=500_000) as partial:
        partial.write_bytes(bytes(500_000))
    with pytest.raises(DiskError, match=re.escape(f"'{disk / 'array.npy'}' could not be saved: No space left")):  # noqa: SIM117
        with whole_file(disk / "array.npy") as partial, partial.open("wb") as file:
            np.save(file, np.zeros(100_000))
    assert [p.name for p in disk.iterdir()] == ["kept.bin"] and (disk / "kept.bin").read_bytes() == b"old"
    check_space(disk / "not" / "yet" / "there", 100_000)
    with pytest.raises(DiskError, match=r"It needs at least 300.0 MB; [\d,.]+ (MB|bytes) are free. Free some space or"):
        check_space(disk / "not" / "yet" / "there", 300_000_000)


def test_a_reason_is_found_behind_errors_of_libraries() -> None:
    full = os.strerror(28)
    assert storage_failure(OSError(28, full)) == storage_failure(RuntimeError("io (os error 28)")) == full
    assert storage_failure(OSError("4096 requested and 0 written")) == full  # numpy's
    assert storage_failure(FileNotFoundError(2, "no such file")) is None and storage_failure(ValueError("28")) is None
    try:
        try:
            raise OSError(28, full)
        finally:
            raise RuntimeError("a writer failed")
    except RuntimeError as error:
        assert storage_failure(error) == full
    assert (in_bytes(512), in_bytes(1_500_000)) == ("512 bytes", "1.5 MB")
