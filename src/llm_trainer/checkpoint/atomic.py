"""All or nothing: what is half written never has its final name, and a full disk says what it needs."""

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from llm_trainer.checkpoint.valid import CheckpointError, name_valid_neighbour, read_manifest, valid_checkpoints
from llm_trainer.disk import bytes_in, cannot_write, remove, storage_failure

LEFT_BEHIND = re.compile(r"(.+)\.(partial|replaced)-(\d+)")
being_written: set[Path] = set()  # by this process, so that it is no predecessor's
CURRENT_FOLDER, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux' renameat2


def partial_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial-{os.getpid()}")


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def replace(new: Path, target: Path) -> None:
    """Let `target`, a file, a folder, a link or nothing, be `new` from one instant to the next; what it was is removed.

    Where the system cannot exchange two names, a folder has no name for a moment; `clear_left_behind` puts it back if
    this process dies then.
    """
    has_folder = _is_folder(new) or _is_folder(target)
    if not has_folder or not os.path.lexists(target):
        os.replace(new, target)
    elif exchange(new, target):
        remove(new)
    else:
        before = target.with_name(f"{target.name}.replaced-{os.getpid()}")
        remove(before)
        os.rename(target, before)
        os.rename(new, target)
        remove(before)


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths swap their names in one instant; whether system and file system can do that."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux
        return False
    return renameat2(CURRENT_FOLDER, os.fsencode(one), CURRENT_FOLDER, os.fsencode(other), EXCHANGE) == 0


def clear_left_behind(folder: Path) -> None:
    """Remove what dead processes left; a replaced checkpoint whose successor never arrived is put back."""
    for path in sorted(folder.iterdir()):
        match = LEFT_BEHIND.fullmatch(path.name)
        if not match or path in being_written or _is_other_process(int(match[3])):
            continue
        with suppress(OSError):  # the disk may have failed, or another rank clears: what stays is for the next start
            if match[2] == "replaced" and not (folder / match[1]).exists():
                os.rename(path, folder / match[1])
            else:
                remove(path)


def _is_other_process(pid: int) -> bool:
    """Whether another live process has this id. Our own id on a folder is a predecessor's: containers reuse ids."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def whole_or_nothing(partial: Path, target: Path) -> Iterator[None]:
    """Leave no `partial` behind, however the block ends; name a full or read-only disk as the cause."""
    being_written.add(partial)
    try:
        remove(partial)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = storage_failure(error)
        if reason is None:
            raise
        raise CheckpointError(explain_storage_failure(reason, partial, target)) from error
    finally:
        being_written.discard(partial)
        if target.parent.is_dir():
            clear_left_behind(target.parent)


def explain_storage_failure(reason: str, partial: Path, target: Path) -> str:
    """The message for a failed save: what was written, what is free, and what is still valid."""
    if not target.parent.is_dir():
        return f"'{target}' could not be saved: {reason}. Choose another folder"
    needed = written = bytes_in(partial)
    previous = next(valid_checkpoints(target.parent, "sizes"), None)
    if previous is not None:
        size = sum(file["size"] for file in read_manifest(previous)["files"].values())
        needed = max(written, size)
    return f"{cannot_write(target, reason, needed, written)}. {name_valid_neighbour(target)}"
