"""All or nothing: what is half written never has its final name, and a full disk says what it needs."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from llm_trainer.checkpoint.valid import CheckpointError, name_valid_neighbour, read_manifest, valid_checkpoints

LEFT_BEHIND = re.compile(r"(.+)\.(partial|replaced)-(\d+)")
FULL_OR_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}


def partial_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial-{os.getpid()}")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def clear_left_behind(folder: Path) -> None:
    """Remove what dead processes left; a replaced checkpoint whose successor never arrived is put back."""
    for path in sorted(folder.iterdir()):
        match = LEFT_BEHIND.fullmatch(path.name)
        if not match or _is_other_process(int(match[3])):
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
    try:
        remove(partial)
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = storage_failure(error)
        if reason is None:
            raise
        raise CheckpointError(explain_storage_failure(reason, partial, target)) from error
    finally:
        if target.parent.is_dir():
            clear_left_behind(target.parent)


def storage_failure(error: BaseException) -> str | None:
    """The operating system's reason behind an error of safetensors, torch or Python; None: it has another cause."""
    cause: BaseException | None = error
    while cause is not None:
        code = None
        in_rust = re.search(r"\(os error (\d+)\)", str(cause))  # safetensors has the number in its text only
        if in_rust:
            code = int(in_rust[1])
        elif isinstance(cause, OSError):
            code = cause.errno
        if code in FULL_OR_BROKEN | NOT_WRITABLE:
            return os.strerror(code)
        cause = cause.__cause__ or cause.__context__
    return None


def explain_storage_failure(reason: str, partial: Path, target: Path) -> str:
    """The message for a failed save: what was written, what is free, and what is still valid."""
    if not target.parent.is_dir():
        return f"'{target}' could not be saved: {reason}. Choose another folder"
    written = sum(path.stat().st_size for path in [partial, *partial.rglob("*")] if path.is_file())
    free = shutil.disk_usage(target.parent).free
    needed = written
    previous = next(valid_checkpoints(target.parent, "sizes"), None)
    if previous is not None:
        size = sum(file["size"] for file in read_manifest(previous)["files"].values())
        needed = max(written, size)
    return (
        f"'{target}' could not be saved: {reason}. It needs at least {needed / 1e6:.1f} MB; {written / 1e6:.1f} MB "
        f"were written and {free / 1e6:.1f} MB are free. Free some space or choose another folder. "
        f"{name_valid_neighbour(target)}"
    )
