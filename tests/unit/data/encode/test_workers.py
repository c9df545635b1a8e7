"""Token stores are built in parts: a killed build goes on, and whoever has rows can write a part."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_trainer.data.encode import workers
from llm_trainer.data.encode.store import Part, TokenStore, compact_ids, join_parts, private_folder, write_part
from llm_trainer.data.encode.workers import ROWS_PER_PART, build_store
from llm_trainer.disk import DiskError


def test_a_killed_build_goes_on_from_its_last_part(tmp_path):
    rows = list(range(2 * ROWS_PER_PART + 5))
    calls = []

    def encode(chunk):
        calls.append(chunk[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return Part({"input_ids": [np.array([i], dtype=np.uint16) for i in chunk]})

    with pytest.raises(KeyboardInterrupt):
        build_store(tmp_path / "s", rows, encode, ["input_ids"])
    store = build_store(tmp_path / "s", rows, encode, ["input_ids"])
    assert calls == [0, ROWS_PER_PART, 2 * ROWS_PER_PART, 2 * ROWS_PER_PART]
    assert store["input_ids"].values.tolist() == rows
    assert json.loads((tmp_path / "s" / "meta.json").read_text())["rows"] == len(rows)
    build_store(tmp_path / "s", [], encode, ["input_ids"])
    assert len(calls) == 4, "a finished store is opened, not built again"


def test_parts_that_several_wrote_are_joined_in_the_order_of_their_numbers(tmp_path):
    def part(*rows):
        return Part({"input_ids": [compact_ids(row, 100) for row in rows]})

    last = part([7])
    last.dropped["tie"] += 2
    write_part(tmp_path, 1, last)
    assert not TokenStore.exists(tmp_path), "parts alone are no store"
    write_part(tmp_path, 0, part([1, 2], [3]))
    store = join_parts(tmp_path, 2, ["input_ids"], meta={"source": "rollouts"})
    assert [store["input_ids"][i].tolist() for i in range(len(store))] == [[1, 2], [3], [7]]
    assert store.meta["dropped"] == {"tie": 2} and store.meta["source"] == "rollouts"
    assert not (tmp_path / "parts").exists()
    with pytest.raises(FileNotFoundError):
        join_parts(tmp_path, 1, ["input_ids"])
    assert len(join_parts(tmp_path / "none", 0, ["input_ids"])) == 0
    assert (compact_ids([1], 1 << 16).dtype, compact_ids([1], (1 << 16) + 1).dtype) == (np.uint16, np.uint32)


BUILDERS = """
import os, random, signal, sys, threading, time
from contextlib import nullcontext
from pathlib import Path
import numpy as np
from llm_trainer.data.encode import workers
from llm_trainer.data.encode.store import Part

folder, tries, mode = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
workers.ROWS_PER_PART = 5
ROWS = list(range(200))

def encode(chunk):
    time.sleep(0.0005)
    return Part({"input_ids": [np.full(i % 7 + 1, i, dtype=np.uint16) for i in chunk]})

def build(store, chance):
    if mode == "no lock":  # as on a disk whose locks promise nothing
        workers.Lock.held = lambda lock, wait: nullcontext()
    if mode == "killed" and chance.random() < 0.7:
        threading.Timer(chance.uniform(0, 0.06), os.kill, (os.getpid(), signal.SIGKILL)).start()
    try:
        ids = workers.build_store(store, ROWS, encode, ["input_ids"])["input_ids"]
    except FileNotFoundError:  # another builder took its parts over: an error is not a wrong store
        os._exit(4)
    right = len(ids) == 200 and all(ids[i].tolist() == [i] * (i % 7 + 1) for i in ROWS)
    os._exit(0 if right else 3)

def start(store, seed):
    child = os.fork()
    if not child:
        build(store, random.Random(seed))
    return child

allowed = {"plain": {0}, "killed": {0, -signal.SIGKILL}, "no lock": {0, 4}}[mode]
right, seeds = 0, iter(range(10**9))
for number in range(tries):
    store, codes = folder / f"store-{number}", []
    while 0 not in codes:
        children = [start(store, next(seeds)) for _ in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert set(codes) <= allowed, codes
    right += 1
print(right)
"""


def build_at_once(folder: Path, tries: int, mode: str) -> int:
    """How often a store was right that two processes built at once."""
    command = [sys.executable, "-c", BUILDERS, str(folder), str(tries), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("mode", ["plain", "killed", "no lock"])
def test_two_processes_that_build_one_store_at_once(mode: str, tmp_path: Path) -> None:
    assert build_at_once(tmp_path, 3, mode) == 3
    if mode == "plain":
        assert sorted(path.name for path in tmp_path.iterdir()) == ["store-0", "store-1", "store-2"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["plain", "killed", "no lock"])
def test_two_processes_build_one_store_thirty_times(mode: str, tmp_path: Path) -> None:
    assert build_at_once(tmp_path, 30, mode) == 30


def test_a_full_disk_while_a_store_is_built_is_an_error_that_leaves_nothing(
    small_disk: Callable[[int], Path],
) -> None:
    """At the first part, at a later one, and while they are joined; foreseen where the size of the source is known."""

    def encode(chunk: list[int]) -> Part:
        return Part({"input_ids": [np.full(50, i, dtype=np.uint16) for i in chunk]})

    def build(store: Path, parts: int, **options: int) -> None:
        build_store(store, range(parts * ROWS_PER_PART), encode, ["input_ids"], **options)

    part = ROWS_PER_PART * (50 * 2 + 8)  # bytes
    for size, parts in ((part // 2, 3), (part * 2, 3), (part * 4, 3)):
        store = small_disk(size) / "cache" / "store"
        found = (
            rf"'{store}' could not be saved: No space left on device. It needs at least .* (MB|bytes) are free. Free"
        )
        with pytest.raises(DiskError, match=found):
            build(store, parts)
        assert list(store.parent.iterdir()) == []
    source_bytes = 300 * ROWS_PER_PART * 3  # as 300 parts of small integers, pickled
    with pytest.raises(DiskError, match=r"It needs at least [\d.]+ MB; .* are free") as foreseen:
        build(store, 2, source_bytes=source_bytes)
    assert foreseen.value.needed > 20 * part and list(store.parent.iterdir()) == []
    build(small_disk(part * 8) / "store", 2)


def characters(chunk: list[str]) -> Part:
    """The code of every character; a row `kill` ends the process."""
    if "kill" in chunk:
        os.kill(os.getpid(), signal.SIGKILL)
    return Part({"input_ids": [np.array([ord(c) for c in row], dtype=np.uint32) for row in chunk]})


def test_several_processes_write_what_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ROWS_PER_PART", 7)
    rows = [f"row {i} é" * (i % 5) for i in range(100)]
    one = build_store(tmp_path / "one", rows, characters, ["input_ids"])
    two = build_store(tmp_path / "two", rows, characters, ["input_ids"], workers=2)
    for name in ("input_ids.values.npy", "input_ids.offsets.npy", "meta.json"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()
    assert ["".join(map(chr, two["input_ids"][i])) for i in range(100)] == rows


def test_long_rows_make_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is held in memory does not grow with the rows."""
    monkeypatch.setattr(workers, "SIZE_PER_PART", 1000)
    book = {"text": "x" * 900}
    chat = {"messages": [{"role": "user", "content": "y" * 300}, {"role": "assistant", "content": "z" * 300}]}
    ids = np.zeros(400, dtype=np.uint16)
    assert [len(chunk) for chunk in workers._chunks([book, book, chat, chat, ids, ids, book])] == [2, 2, 2, 1]


def test_a_killed_worker_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "ROWS_PER_PART", 2)
    with pytest.raises(ChildProcessError, match="one of 2 processes that tokenize was killed.*start again with fewer"):
        build_store(tmp_path / "s", ["a", "b", "kill"], characters, ["input_ids"], workers=2)


@pytest.mark.parametrize(
    ("error", "kept"), [(KeyboardInterrupt(), 1), (ChildProcessError("killed"), 1), (ValueError("a bad row"), 0)]
)
def test_parts_are_kept_where_the_same_build_can_go_on(error: BaseException, kept: int, tmp_path: Path) -> None:
    with pytest.raises(type(error)), private_folder(tmp_path / "s") as private:
        write_part(private, 0, characters(["a"]))
        raise error
    assert len(list(tmp_path.glob("s.building-*/parts/part-000000.npz"))) == kept


ORPHANS = """
import os, sys, time
from pathlib import Path
from llm_trainer.data.encode import workers
workers.ROWS_PER_PART = 1

def encode(chunk):
    os.write(1, f"{os.getpid()}\\n".encode())
    time.sleep(60)

workers.build_store(Path(sys.argv[1]), ["a", "b"], encode, ["input_ids"], workers=2)
"""


def test_workers_end_with_their_process_however_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ORPHANS, tmp_path / "s"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as builder:
        assert builder.stdout is not None
        assert [int(builder.stdout.readline()) != builder.pid for _ in range(2)] == [True, True]
        builder.kill()
        assert builder.stdout.read() == "", "this comes when the last process that could write has gone"
