"""One process at a time: a lock that says who holds it, and that a dead holder cannot keep.

The lock is a file. It is made by a hard link, which is atomic on network disks too, where `flock` may be a promise of this
host alone. It names its holder: host, boot and process namespace (containers number their processes alike), process, and
when that process started (numbers come back). A holder that can be looked at from here is alive or not; of any other, the
file's time says it, which a live one renews: both times are of the disk's clock, so hosts may disagree about theirs.
"""

import errno
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from glob import escape
from pathlib import Path

from llm_trainer.disk import DiskError, storage_failure

Say = Callable[[str], object]
WARN: Say = logging.getLogger(__name__).warning

BEAT_S = 10.0  # between two signs of life
STALE_S = 60.0  # without any, a holder that cannot be looked at counts as dead
POLL_S = 0.05
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LockedError(ValueError):
    """Another live process holds the lock; the message says which, and what to do."""


@dataclass(frozen=True)
class Holder:
    """A process that no other is mistaken for.

    Attributes:
        host: its name.
        boot: which start of the host's kernel.
        namespace: in which its number means something: a container has one of its own.
        pid: its number.
        started: when it started, in ticks since the boot.
        token: of this one lock.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    token: str

    @staticmethod
    def here() -> "Holder":
        """This process, with a new token."""
        boot, namespace = "", ""
        with suppress(OSError):  # Linux has both; elsewhere the host's name has to do
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            namespace = os.readlink("/proc/self/ns/pid")
        pid = os.getpid()
        return Holder(socket.gethostname(), boot, namespace, pid, _started(pid), uuid.uuid4().hex)

    def is_near(self, other: "Holder") -> bool:
        """Whether the other's process can be looked at from here."""
        return (self.host, self.boot, self.namespace) == (other.host, other.boot, other.namespace)

    def is_running(self) -> bool:
        """Whether the process lives, for one that is near."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # somebody else's
        return _started(self.pid) in (self.started, "")

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


def _started(pid: int) -> str:
    """When a process started; 'dead' for one that has ended and only waits to be noticed, '' where nobody says."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *rest = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return "dead" if state in "ZX" else rest[18]


class Lock:
    """A lock at `path`.

    Args:
        path: its file; the folder is made if needed.
        what: that is protected, for messages.
        advice: what a user who is refused can do.
    """

    def __init__(self, path: Path, what: str, advice: str = "Wait for it, or stop it") -> None:
        self.path, self.what, self.advice = path, what, advice
        self._mine: Holder | None = None
        self._released = threading.Event()

    @contextmanager
    def held(self, wait: bool = False, say: Say = WARN) -> Iterator[None]:
        """The context in which this process holds the lock: see `acquire`."""
        self.acquire(wait, say)
        try:
            yield
        finally:
            self.release()

    def acquire(self, wait: bool = False, say: Say = WARN) -> None:
        """Take the lock. A dead holder's is taken over; whether one on another host is dead shows within `STALE_S`.

        Args:
            wait: for a live holder to release it, as long as that takes.
            say: called once, when it has to be waited.

        Raises:
            LockedError: a live process holds it, and `wait` is False.
            DiskError: the folder cannot be written.
        """
        mine = Holder.here()
        draft = self.path.with_name(f"{self.path.name}.{mine.token}")
        content = json.dumps(asdict(mine))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(content, encoding="utf-8")
            self._get(draft, mine, wait, say)
        except OSError as error:
            reason = storage_failure(error)
            if reason is None:
                raise
            raise DiskError(self.path, reason, len(content)) from error
        finally:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
        self._mine, self._released = mine, threading.Event()
        self._clear_drafts(mine)
        threading.Thread(target=self._beat, args=(self._released,), daemon=True, name=f"holds {self.path}").start()

    def _clear_drafts(self, mine: Holder) -> None:
        """Remove what processes left that died while they waited."""
        for path in self.path.parent.glob(f"{escape(self.path.name)}.*"):
            holder = Lock(path, self.what)._holder()
            if holder is not None and mine.is_near(holder) and not holder.is_running():
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _get(self, draft: Path, mine: Holder, wait: bool, say: Say) -> None:
        """Make `draft` the lock, now or when its holder is no more."""
        first_seen: float | None = None  # sign of life
        while not _make(draft, self.path):
            holder, renewed = self._holder(), _time_of(self.path)
            if holder is None or renewed is None:
                continue  # it was released just now
            if mine.is_near(holder):
                is_alive = holder.is_running()
                is_dead = not is_alive
            else:  # it cannot be looked at: the time of its sign of life, and of one of ours, by the clock of the disk
                os.utime(draft)
                is_dead = draft.stat().st_mtime - renewed > STALE_S
                is_alive = first_seen is not None and renewed != first_seen
            if is_dead:
                if self._take_over(holder, draft, mine):
                    return
                continue
            if is_alive and not wait:
                raise LockedError(self._refusal(holder))
            if first_seen is None:
                first_seen = renewed
                patience = "" if wait else f", up to {STALE_S:.0f} s for a sign of life"
                say(f"{self.what} is in use by {holder}; waiting{patience}")
            time.sleep(POLL_S)

    def release(self) -> None:
        """Give the lock back; nothing happens where this process does not hold it (a fork of the holder does not)."""
        mine, self._mine = self._mine, None
        if mine is None or mine.pid != os.getpid():
            return
        self._released.set()
        with suppress(OSError):
            if self._holder() == mine:
                self.path.unlink()

    def _refusal(self, holder: Holder) -> str:
        return (
            f"{self.what} is in use by {holder}. {self.advice}. If that process is no more, remove '{self.path}' and "
            "start again"
        )

    def _holder(self) -> Holder | None:
        """Who holds the lock; None: nobody. A file that cannot be read is somebody's whose time alone counts."""
        try:
            found = json.loads(self.path.read_bytes())
            return Holder(**{field.name: found[field.name] for field in fields(Holder)})
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return Holder("unknown", "", "", 0, "", "unreadable")

    def _take_over(self, dead: Holder, draft: Path, mine: Holder) -> bool:
        """Replace a dead holder's lock by `draft`, unless another process does so just now."""
        # Who has the claim on this very lock may replace it, and nobody else: a process that is late would otherwise
        # replace the lock of the one that was first.
        claim = Lock(self.path.with_name(f"{self.path.name}.claim-{dead.token}"), self.what)
        if not _make(draft, claim.path):
            claimant = claim._holder()
            if claimant is not None and mine.is_near(claimant) and not claimant.is_running():
                claim.path.unlink(missing_ok=True)  # it died between these lines
            time.sleep(POLL_S)
            return False
        try:
            is_still_his = self._holder() == dead
            if is_still_his:
                os.replace(draft, self.path)
            return is_still_his
        finally:
            claim.path.unlink(missing_ok=True)

    def _beat(self, released: threading.Event) -> None:
        """Renew the file's time until the lock is released."""
        while not released.wait(BEAT_S):
            with suppress(OSError):
                os.utime(self.path)


def _time_of(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _make(draft: Path, path: Path) -> bool:
    """Let `path` be there with the content of `draft`, whole; False: it is there already."""
    try:
        os.link(draft, path)
        return True
    except OSError as error:
        if draft.stat().st_nlink > 1:
            return True  # a network disk did it, and its answer was lost
        if error.errno == errno.EEXIST:
            return False
        if error.errno not in NO_LINKS:
            raise
    try:
        with path.open("xb") as file:
            file.write(draft.read_bytes())
    except FileExistsError:
        return False
    return True


def lock_of_run(save_dir: str | Path) -> Lock:
    """The lock of the one run that writes into a folder of checkpoints."""
    advice = "Wait for that run to end, stop it, or choose another save_dir"
    return Lock(Path(save_dir) / ".run.lock", f"save_dir '{save_dir}'", advice)
