"""Rollouts on disk: found again by what they were made of, made in parts that survive a kill, set aside, removed.

`save_dir/rollouts/00000012` is rollout 12, a token store whose `meta.json` says what it was made of. While it is made it is
`00000012.building`, where `plan.json` says of what, and each finished part is a file. All processes take part in what is
done here; the main one decides and writes, but for the parts, which are written by whoever made them.
"""

import json
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from llm_trainer.data.encode.store import (
    Part,
    TokenStore,
    close_store,
    columns_of,
    join_columns,
    part_path,
    write_column,
    write_part,
)
from llm_trainer.disk import flush, remove, whole_file
from llm_trainer.machine import Machine
from llm_trainer.state import Stopped

T = TypeVar("T")
Row = Mapping[str, np.ndarray]  # column -> values of one row
VISIBLE_WITHIN_S = 60  # a file that another process has written
LOOKS_EVERY_S = 0.2  # at the files by which other processes say something
VERSION = 1  # of what is written here


class RolloutError(ValueError):
    """A rollout on disk that cannot be learned from; the message says why."""


class Stored(NamedTuple):
    """What there is of a rollout.

    Attributes:
        is_finished: whether it can be learned from; else some parts of it may be there.
        made_of: what it was made of, by name.
        after: position of the prompts behind it.
        parts: of an unfinished one, the prompts `[first, last)` of each part.
        missing: how many of them are not there.
    """

    is_finished: bool
    made_of: dict[str, Any]
    after: int
    parts: list[tuple[int, int]]
    missing: int = 0


class RolloutFolder:
    """The rollouts of a run, or of its evaluations; every method is called by all processes together.

    They see one disk: processes on several machines need a `save_dir` that these share.

    Args:
        folder: that holds them.
        machine: of the run.
    """

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder, self._machine = folder, machine

    def path(self, number: int) -> Path:
        """Where rollout `number` is when it is finished."""
        return self.folder / f"{number:08d}"

    def _building(self, number: int) -> Path:
        return self.folder / f"{number:08d}.building"

    def _on_main(self, function: Callable[[], T]) -> T:
        """What `function` gives in the main process, or its error, everywhere."""
        found: Any = None
        failure: Exception | None = None
        if self._machine.process_number == 0:
            try:
                found = function()
            except (OSError, ValueError) as error:
                failure = error
        found, failure = self._machine.gather((found, failure))[0]
        if failure is not None:
            raise failure
        return found

    def _wait_for(self, path: Path) -> None:
        """Wait until every process sees what the main one has written; a network's disk shows it some seconds later.

        Raises:
            RolloutError: one does not see it.
        """
        deadline = time.monotonic() + VISIBLE_WITHIN_S
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(LOOKS_EVERY_S)
        blind = [number for number, seen in enumerate(self._machine.gather(path.exists())) if not seen]
        if blind:
            raise RolloutError(
                f"{path}: written by the main process and not seen by process {', '.join(map(str, blind))}; expected one disk: "
                "set save_dir to a folder that all machines of the run share"
            )

    # Finding.

    def set_all_aside(self) -> None:
        """Take all that an earlier run has left out of the way of one that begins anew, and say so."""
        target = self._on_main(self._set_all_aside)
        if target is not None:
            self._machine.say(
                f"WARNING: this run starts at step 0; the rollouts of an earlier one were moved to {target}"
            )

    def _set_all_aside(self) -> Path | None:
        for building in self.folder.glob("*.building"):
            remove(building)
        earlier = sorted(self.folder.glob("[0-9]" * 8))
        if not earlier:
            return None
        target = self._unused()
        for path in earlier:
            os.rename(path, target / path.name)
        return target

    def _unused(self) -> Path:
        """A new folder for what is set aside."""
        attempt = 1
        while (self.folder / f"set-aside-{attempt}").exists():
            attempt += 1
        target = self.folder / f"set-aside-{attempt}"
        target.mkdir()
        return target

    def find(self, number: int) -> Stored | None:
        """What there is of a rollout; None: nothing.

        Raises:
            RolloutError: it is damaged.
        """
        return self._on_main(lambda: self._find(number))

    def _find(self, number: int) -> Stored | None:
        path, building = self.path(number), self._building(number)
        if not path.exists() and TokenStore.exists(building):  # killed right before it got its name
            os.rename(building, path)
        if path.exists():
            meta = verified(path)
            return Stored(True, meta["made_of"], meta["after"], [])
        plan = building / "plan.json"
        if not plan.exists():
            return None
        facts = json.loads(plan.read_text(encoding="utf-8"))
        parts = [tuple(part) for part in facts["parts"]]
        missing = sum(not part_path(building, part).exists() for part in range(len(parts)))
        return Stored(False, facts["made_of"], facts["after"], parts, missing)

    def set_aside(self, number: int, keep: bool) -> Path | None:
        """Take a rollout out of the way: into a folder of its own if it is finished and to be kept; that folder."""
        return self._on_main(lambda: self._set_aside(number, keep))

    def _set_aside(self, number: int, keep: bool) -> Path | None:
        remove(self._building(number))
        path = self.path(number)
        if not path.exists():
            return None
        if not keep:
            remove(path)
            return None
        target = self._unused() / path.name
        os.rename(path, target)
        return target

    def prune(self) -> None:
        """Remove rollouts that no checkpoint needs.

        The oldest of the checkpoints that rotation leaves needs the rollout that was under way there and all later ones; of
        the others, such as the best one, each needs the one that it lies inside.
        """
        self._on_main(self._prune)

    def _prune(self) -> None:
        recent, others = self._machine.checkpoint_steps()
        if not recent:
            return
        finished = {path: step_of(path) for path in sorted(self.folder.glob("[0-9]" * 8)) if TokenStore.exists(path)}
        paths, begins = list(finished), list(finished.values())
        for path, begin, end in zip(paths, begins, begins[1:], strict=False):  # the last one has no end yet
            if end > min(recent):
                continue
            inside = [step for step in others if begin < step < end]
            if not inside:
                remove(path)

    # Making.

    def begin(self, number: int, facts: Mapping[str, Any]) -> list[int]:
        """Open the folder of a rollout that is to be made; the numbers of the parts that are missing."""
        missing = self._on_main(lambda: self._begin(number, facts))
        self._wait_for(self._building(number) / "plan.json")
        return missing

    def _begin(self, number: int, facts: Mapping[str, Any]) -> list[int]:
        building = self._building(number)
        building.mkdir(parents=True, exist_ok=True)
        (building / "parts").mkdir(exist_ok=True)
        self.stop_sign(number).unlink(missing_ok=True)
        with whole_file(building / "plan.json") as partial:
            partial.write_text(json.dumps(facts), encoding="utf-8")
        return [part for part in range(len(facts["parts"])) if not part_path(building, part).exists()]

    def stop_sign(self, number: int) -> Path:
        """The file by which a process tells the others that it has been asked to stop."""
        return self._building(number) / "stop"

    def write_part(self, number: int, part: int, rows: Sequence[Row]) -> None:
        """Write a part, by the process that made it alone."""
        columns: dict[str, list[np.ndarray]] = {}
        for name in rows[0]:
            columns[name] = [row[name] for row in rows]
        write_part(self._building(number), part, Part(columns))

    def wait_for_parts(self, number: int, count: int, stop: Callable[[], bool]) -> None:
        """Wait, by looking and not in a collective, until all parts are there or `stop` says so.

        Raises:
            Stopped: a process was asked to stop; on all of them.
        """
        building, missing = self._building(number), set(range(count))
        while missing and not stop():
            missing = {part for part in missing if not part_path(building, part).exists()}
            if missing:
                time.sleep(LOOKS_EVERY_S / 4)
        if any(self._machine.gather(bool(missing) or stop())):
            raise Stopped

    def join(self, number: int, count: int) -> tuple[Path, dict[str, Any]]:
        """Join the parts, which stay until the rollout is finished; its folder so far, and its facts."""
        building = self._building(number)
        facts = self._on_main(lambda: self._join(building, count))
        for name in facts["columns"]:
            self._wait_for(building / f"{name}.values.npy")
        return building, facts

    def _join(self, building: Path, count: int) -> dict[str, Any]:
        return join_columns(building, count, columns_of(part_path(building, 0)), flushed=False)

    def finish(
        self,
        number: int,
        columns: Mapping[str, Sequence[np.ndarray]],
        facts: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> Path:
        """Write further columns and then `meta.json`, and give the rollout its name.

        Args:
            columns: name -> an array per row.
            facts: what `join` gave.
            meta: more facts, `made_of` and `after` among them.
        """
        self._machine.gather(None)  # all have opened the folder that is about to get another name
        path = self._on_main(lambda: self._finish(number, columns, {**facts, **meta}))
        self._wait_for(path / "meta.json")
        return path

    def _finish(self, number: int, columns: Mapping[str, Sequence[np.ndarray]], meta: dict[str, Any]) -> Path:
        building, path = self._building(number), self.path(number)
        for name, rows in columns.items():
            write_column(building, name, rows)
        meta["columns"] = [*meta["columns"], *(name for name in columns if name not in meta["columns"])]
        meta["files"] = {file.name: check_sum(file) for file in sorted(building.glob("*.npy"))}
        close_store(building, {"version": VERSION, **meta})
        (building / "plan.json").unlink()
        flush(building)
        os.rename(building, path)
        flush(self.folder)
        return path


class AnyAsked:
    """Whether any process was asked to stop; cheap enough to be asked at every token.

    Args:
        sign: the file by which processes tell each other.
    """

    def __init__(self, machine: Machine, sign: Path) -> None:
        self._machine, self._sign = machine, sign
        self._looked, self._seen, self._told = 0.0, False, False
        self._given_up = False

    def give_up(self) -> None:
        """From now on this process is asked to stop, whatever the others are."""
        self._given_up = True

    def __call__(self) -> bool:
        if self._given_up:
            return True
        if self._machine.stop_requested():
            if not self._told and self._machine.num_processes > 1:
                self._sign.touch()
                self._told = True
            return True
        now = time.monotonic()
        if self._machine.num_processes > 1 and now - self._looked >= LOOKS_EVERY_S:
            self._looked, self._seen = now, self._sign.exists()
        return self._seen


def check_sum(file: Path) -> list[int]:
    """Bytes of a file, and their CRC-32."""
    crc = 0
    with file.open("rb") as opened:
        while piece := opened.read(1 << 22):
            crc = zlib.crc32(piece, crc)
    return [file.stat().st_size, crc]


def step_of(path: Path) -> int:
    """Optimizer steps that were done when a finished rollout was made."""
    return json.loads((path / "meta.json").read_text(encoding="utf-8"))["made_of"]["step"]


def verified(path: Path) -> dict[str, Any]:
    """The facts of a finished rollout, all of whose bytes have been compared with them.

    Raises:
        RolloutError: it is damaged, or no rollout.
    """
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RolloutError(
            f"{path}: no rollout that can be read ({error}); expected meta.json and its columns"
        ) from error
    if not isinstance(meta, dict) or "made_of" not in meta:
        raise RolloutError(
            f"{path}: a token store of other data; expected a rollout, as a run writes to save_dir/rollouts"
        )
    for name, expected in meta["files"].items():
        file = path / name
        found = check_sum(file) if file.is_file() else None
        if found != expected:
            what = "is missing" if found is None else f"has {found[0]:,} bytes that are not those that were written"
            raise RolloutError(f"{path}: damaged, {name} {what} ({expected[0]:,} bytes); expected it as it was written")
    return meta
