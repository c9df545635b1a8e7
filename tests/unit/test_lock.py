"""One live process holds a lock; a dead one's is taken over, by one process only."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llm_trainer import lock as lock_module
from llm_trainer.disk import DiskError
from llm_trainer.lock import Holder, Lock, LockedError

RACE = """
import os, random, signal, sys
from pathlib import Path
from llm_trainer.lock import Lock

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])

def life(seed):
    chance = random.Random(seed)
    while True:
        with Lock(folder / "lock", "the counter").held(wait=True, say=lambda message: None):
            inside = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)  # fails if another process is inside too
            os.close(inside)
            count = int((folder / "count").read_text())
            (folder / "count").write_text(str(count + 1))
            (folder / "inside").unlink()
            if count + 1 >= rounds:
                os._exit(0)
            if chance.random() < 0.2:
                os.kill(os.getpid(), signal.SIGKILL)

(folder / "count").write_text("0")
children, seeds = {}, iter(range(10**9))
while int((folder / "count").read_text() or 0) < rounds:
    while len(children) < 4:
        seed, child = next(seeds), os.fork()
        if not child:
            life(seed)
        children[child] = seed
    child, status = os.wait()
    del children[child]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit("two processes were inside at once")
for child in children:
    os.waitpid(child, 0)
"""


def test_who_holds_a_lock_is_named_and_who_waits_gets_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "lock"
    first = Lock(path, "folder 'a'", "Choose another save_dir")
    first.acquire()
    found = (
        rf"folder 'a' is in use by process {os.getpid()} on host \S+. Choose another save_dir. If .* remove '{path}'"
    )
    with pytest.raises(LockedError, match=found):
        Lock(path, "folder 'a'", "Choose another save_dir").acquire()
    said: list[str] = []
    threading.Timer(0.2, first.release).start()
    with Lock(path, "folder 'a'").held(wait=True, say=said.append):
        assert [p.name for p in path.parent.iterdir()] == ["lock"] and len(said) == 1
    assert list(path.parent.iterdir()) == []


def test_a_lock_of_a_dead_process_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    dies = (
        f"import os; from llm_trainer.lock import *; Lock(Path({str(path)!r}), 'x').acquire(); os.kill(os.getpid(), 9)"
    )
    child = subprocess.Popen([sys.executable, "-c", dies])
    while child.poll() is None and not (path.exists() and _is_zombie(child.pid)):
        time.sleep(0.01)
    with Lock(path, "x").held():  # also while nobody has noticed its end
        pass
    child.wait()
    # A number that another process has now, as in a container that was started again.
    here = Holder.here()
    if here.started:
        path.write_text(json.dumps(vars(replace(here, started="1"))))
        Lock(path, "x").acquire()


def _is_zombie(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_holder_on_another_host_is_known_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    elsewhere = replace(Holder.here(), host="node7", boot="another")
    path.write_text(json.dumps(vars(elsewhere)))
    threading.Timer(0.2, lambda: os.utime(path)).start()  # it lives
    with pytest.raises(LockedError, match="in use by process .* on host node7"):
        Lock(path, "x").acquire(say=lambda message: None)
    monkeypatch.setattr(lock_module, "STALE_S", 0.3)  # it does not any more
    with Lock(path, "x").held(say=lambda message: None):
        pass
    path.write_text("")  # it died while it wrote, on a disk without links
    os.utime(path, (0, 0))
    monkeypatch.setattr(lock_module, "STALE_S", 60.0)
    with Lock(path, "x").held():
        pass


def test_a_live_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT_S", 0.01)
    with Lock(tmp_path / "lock", "x").held():
        os.utime(tmp_path / "lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / "lock").stat().st_mtime > 0


def test_a_disk_without_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    with Lock(tmp_path / "lock", "x").held(), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        Lock(tmp_path / "lock", "x").acquire()
    with pytest.raises(DiskError, match="could not be saved: (File exists|Not a directory). Choose another"):
        (tmp_path / "file").touch()
        Lock(tmp_path / "file" / "lock", "x").acquire()


def test_processes_that_are_killed_in_a_lock_never_let_two_in(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RACE, str(tmp_path), "150"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert int((tmp_path / "count").read_text()) >= 150
