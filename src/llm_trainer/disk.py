"""What everything that writes to the disk shares: files that are whole or not there, and one message for a full disk."""

import errno
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

FULL_OR_BROKEN = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
NUMPY_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # its error for a full disk has no number


class DiskError(OSError):
    """Something could not be written; the message says what, why, and how many bytes are needed and free.

    Attributes:
        reason: of the operating system.
        needed: bytes that it takes, as far as they are known.
    """

    def __init__(self, path: Path, reason: str, needed: int, written: int | None = None) -> None:
        super().__init__(cannot_write(path, reason, needed, written))
        self.reason, self.needed = reason, needed
        self._said = (path, reason, needed, written)

    def __reduce__(self) -> tuple[type["DiskError"], tuple[Path, str, int, int | None]]:
        """Errors cross process borders, where `OSError` would rebuild them from the message alone."""
        return type(self), self._said


def storage_failure(error: BaseException, among: Collection[int] = FULL_OR_BROKEN | NOT_WRITABLE) -> str | None:
    """The operating system's reason behind an error of safetensors, torch, numpy or Python; None: it has another cause."""
    reasons = [os.strerror(code) for code in among]
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, DiskError) and cause.reason in reasons:
            return cause.reason
        code = None
        in_text = re.search(r"(?:\(os error |\[Errno )(\d+)", str(cause))  # safetensors and shutil have it there only
        if in_text:
            code = int(in_text[1])
        elif isinstance(cause, OSError):
            code = cause.errno
            if code is None and NUMPY_SHORT_WRITE.search(str(cause)):
                code = errno.ENOSPC
        if code is not None and code in among:
            return os.strerror(code)
        cause = cause.__cause__ or cause.__context__
    return None


def cannot_write(path: Path, reason: str, needed: int, written: int | None = None) -> str:
    """The message for something that could not be written.

    Args:
        path: what it would have been.
        reason: of the operating system.
        needed: bytes that it takes, as far as they are known.
        written: bytes that were written before it failed; None: nothing was tried.
    """
    if reason in map(os.strerror, NOT_WRITABLE):
        return f"'{path}' could not be saved: {reason}. Choose another folder, or make this one writable"
    folder = _nearest_folder(path)
    so_far = "" if written is None else f"{in_bytes(written)} were written and "
    free = in_bytes(shutil.disk_usage(folder).free)
    return (
        f"'{path}' could not be saved: {reason}. It needs at least {in_bytes(needed)}; {so_far}{free} are free. "
        "Free some space or choose another folder"
    )


def in_bytes(number: int) -> str:
    """`512 bytes`, `1.5 MB`."""
    if number < 100_000:
        return f"{number:,} bytes"
    return f"{number / 1e6:,.1f} MB"


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def check_space(path: Path, needed: int) -> None:
    """Look for space before anything is written.

    Raises:
        DiskError: `needed` bytes are more than the disk of `path` has free.
    """
    if needed > shutil.disk_usage(_nearest_folder(path)).free:
        raise DiskError(path, os.strerror(errno.ENOSPC), needed)


def bytes_in(path: Path) -> int:
    """Size of a file, or of all files in a folder; 0 where there is neither."""
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def explained(path: Path, partial: Path, needed: int = 0) -> Iterator[None]:
    """The context in which `partial` is written, to become `path`; where it fails, nothing of it is left.

    Args:
        path: the file or folder that is wanted.
        partial: what is written.
        needed: bytes that it will take, as far as they are known.

    Raises:
        DiskError: the disk is full or cannot be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a full disk as the latter
        reason = storage_failure(error)
        if reason is None:
            raise
        written = bytes_in(partial)
        if isinstance(error, DiskError):  # of one file of several
            needed = max(needed, error.needed)
        full = DiskError(path, reason, max(needed, written), written)
        remove(partial)
        raise full from error


@contextmanager
def whole_file(path: Path, needed: int = 0) -> Iterator[Path]:
    """A path to write to, which becomes `path` when the block has ended well: it is there whole, or as it was before.

    Raises:
        DiskError: see `explained`.
    """
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with explained(path, partial, needed):
            yield partial
            flush(partial)
            os.replace(partial, path)
            flush(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
