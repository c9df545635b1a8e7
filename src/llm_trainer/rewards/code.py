"""A reward for code: it runs against tests, each completion in a confined process of its own (`sandbox.py`)."""

import json
import math
import os
import re
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from llm_trainer.config import env
from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards.returned import Missing

FENCED = re.compile(r"```(?:python|py|Python)?[ \t]*\n(.*?)(?:```|$)", re.DOTALL)
TESTS = ("tests", "test_list", "test", "test_cases")  # columns that data sets have
SETUP = ("test_setup_code", "setup", "test_imports")
GRAVE = ("network", "write")  # what code may never do unless the user says so
START_S = 30.0
DISMISS_S = 2.0  # to end by itself
# Of the process, without those of the trainer, which hold keys. Libraries start a thread for each core unless they are told.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
_BEGIN = "import sys; sys.path.insert(0, {root!r}); from llm_trainer.rewards import sandbox; del sys.path[0]; {call}"


class CodeTests:
    """The share of a row's tests that a completion's code passes, or 1 where it passes all, else 0.

    The code is the completion's last fenced block, or else all of it. Its process has no network, starts no processes, and sees
    no files but Python's own and those in its folder. Code that fails is worth 0; a completion whose code could not be run, by
    no fault of its own, has no reward. A row without tests has none either. NOTE: tests run in the process of the code, so code
    that is made to deceive them can.

    Args:
        seconds: that the code and its tests may take.
        memory_gb: that they may take.
        partial: count single tests.
        column: of the data, with the tests: a text, or a list of texts; None: one of `TESTS`.
        parallel: processes at a time; None: one for each core.
        unconfined: run code although this machine cannot keep it from the network or from files.

    Attributes:
        notes: what this machine cannot confine.

    Raises:
        ConfigError: this machine cannot confine the code in what matters most.
    """

    def __init__(
        self,
        seconds: float = 5.0,
        memory_gb: float = 0.5,
        partial: bool = False,
        column: str | None = None,
        parallel: int | None = None,
        unconfined: bool = False,
    ) -> None:
        self.seconds, self.memory, self.partial, self.column = seconds, int(memory_gb * 1e9), partial, column
        self.parallel = parallel or cores_of_this_rank()
        self.notes = _notes(unconfined)
        self._server: subprocess.Popen[bytes] | None = None

    def seconds_for(self, count: int) -> float:
        """That a call with `count` completions may take: its processes have their own limit."""
        return START_S + (self.seconds + 1) * math.ceil(count / self.parallel)

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        answers: Sequence[str | None],
        **columns: Sequence[Any],
    ) -> list[Any]:
        tests = self._tests(columns, len(completions))
        setup = _column(columns, SETUP)
        requests = {}
        for row, completion in enumerate(completions):
            if tests[row]:
                code = code_of(completion)
                if setup is not None and setup[row]:
                    code = f"{setup[row]}\n{code}"
                requests[row] = {"code": code, "tests": tests[row], "seconds": self.seconds, "memory": self.memory}
        said = self._ask(requests)
        return [self._reward(said.get(row), tests[row]) for row in range(len(completions))]

    def _reward(self, said: Mapping[str, Any] | None, tests: Sequence[str]) -> Any:
        if not tests:
            return None
        if said is None:
            return Missing("lost the process that runs code, twice")
        if self.partial:
            return said["passed"] / len(tests)
        return float(said["passed"] == len(tests))

    def _tests(self, columns: Mapping[str, Sequence[Any]], count: int) -> list[list[str]]:
        names = TESTS if self.column is None else (self.column,)
        found = _column(columns, names)
        if found is None:
            raise Missing(
                f"needs tests, which the data does not have: expected a column {' or '.join(names)}, found "
                f"{', '.join(columns) or 'none'}"
            )
        assert len(found) == count
        return [as_tests(found[row]) for row in range(count)]

    # The process that forks the others.

    def _ask(self, requests: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The answers, by row; a process that is lost is started again, once."""
        said: dict[int, dict[str, Any]] = {}
        for _ in range(2):
            waiting = [row for row in requests if row not in said]
            if not waiting:
                break
            with suppress(OSError):  # it was killed from outside
                self._ask_once(requests, waiting, said)
        return said

    def _ask_once(
        self, requests: Mapping[int, dict[str, Any]], waiting: list[int], said: dict[int, dict[str, Any]]
    ) -> None:
        from llm_trainer.rewards.sandbox import FRAME

        server = self._running()
        assert server.stdin is not None and server.stdout is not None
        asked, received = 0, bytearray()
        open_rows = len(waiting)
        while open_rows:
            # A few more than run at a time are on their way: what is written is always read, so that nobody waits for ever.
            while asked < len(waiting) and asked - (len(waiting) - open_rows) < 2 * self.parallel:
                frame = json.dumps({"id": waiting[asked], **requests[waiting[asked]]}).encode()
                server.stdin.write(FRAME.pack(len(frame)) + frame)
                server.stdin.flush()
                asked += 1
            poll = select.poll()
            poll.register(server.stdout, select.POLLIN)
            ready = poll.poll((START_S + self.seconds) * 1000)
            chunk = os.read(server.stdout.fileno(), 1 << 20) if ready else b""
            if not chunk:
                self.close()
                return
            received += chunk
            while len(received) >= FRAME.size and len(received) >= FRAME.size + FRAME.unpack_from(received)[0]:
                size = FRAME.size + FRAME.unpack_from(received)[0]
                answer = json.loads(received[FRAME.size : size])
                said[answer.pop("id")] = answer
                del received[:size]
                open_rows -= 1

    def _running(self) -> subprocess.Popen[bytes]:
        if self._server is not None and self._server.poll() is not None:
            self.close()
        if self._server is None:
            command = _command(f"sandbox.main({self.parallel})")
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)
        return self._server

    def close(self) -> None:
        """End the process that runs code."""
        server, self._server = self._server, None
        if server is None:
            return
        assert server.stdin is not None and server.stdout is not None
        with suppress(OSError):
            server.stdin.close()  # at which it removes its folder and ends
        try:
            server.wait(DISMISS_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        server.stdout.close()


def code_of(completion: str) -> str:
    """The last fenced block of a completion, or all of it."""
    blocks = FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def as_tests(value: Any) -> list[str]:
    """Tests as a data set has them: one text, a list of texts, or such a list as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        value = [value]
    return [str(test) for test in value or () if str(test).strip()]


def _column(columns: Mapping[str, Sequence[Any]], names: Sequence[str]) -> Sequence[Any] | None:
    for name in names:
        if name in columns:
            return columns[name]
    return None


def cores_of_this_rank() -> int:
    """Cores that one of the processes of this machine may count on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // env.environment().local_world_size)


def _command(call: str) -> list[str]:
    root = str(Path(__file__).resolve().parents[2])
    return [sys.executable, "-I", "-c", _BEGIN.format(root=root, call=call)]


def _notes(unconfined: bool) -> list[str]:
    """What confined code can do on this machine and should not, tried out.

    Raises:
        ConfigError: it is too much, and the user has not said that it shall run all the same.
    """
    if sys.platform != "linux":
        raise ConfigError(f"the reward code: code of a model is confined on Linux only, this is {sys.platform}")
    holes = _holes()
    is_grave = any(word in ", ".join(holes) for word in GRAVE)
    if is_grave and not unconfined:
        raise ConfigError(
            f"the reward code: on this machine code of the model could {', '.join(holes)}; expected a Linux with Landlock or "
            "seccomp. Run in a container that holds nothing of value, and set unconfined: true"
        )
    if holes:
        return [f"code of the model is not fully confined: on this machine it can {', '.join(holes)}"]
    return []


def _holes() -> list[str]:
    command = _command("import json; print(json.dumps(sandbox.holes()))")
    tried = subprocess.run(command, capture_output=True, text=True, timeout=4 * START_S, env=ENVIRONMENT)
    if tried.returncode:
        raise ConfigError(f"the reward code: its process does not start on this machine: {tried.stderr.strip()[-500:]}")
    return json.loads(tried.stdout)
