"""Code against tests: what passes, what is stopped, and how many checks a second."""

import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards import code
from llm_trainer.rewards.code import CodeTests, as_tests, code_of
from llm_trainer.rewards.confine import can_filter, landlock_version, seccomp_program
from llm_trainer.rewards.functions import RewardFunctions

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "code" / "mbpp_train.jsonl"
linux = pytest.mark.skipif(sys.platform != "linux", reason="code is confined on Linux only")
pytestmark = linux


@pytest.fixture(scope="module")
def tests() -> Iterator[CodeTests]:
    made = CodeTests(seconds=20.0)
    yield made
    made.close()


def judge(tests: CodeTests, completions: list[str], of_each: str | list[str]) -> list[Any]:
    several = [of_each] * len(completions)
    return tests([""] * len(completions), completions, [None] * len(completions), tests=several)


def test_right_and_wrong(tests: CodeTests) -> None:
    right = "Here it is:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    wrong = "def add(a, b):\n    return a - b"
    broken = "def add(a, b: return"
    exits = "import os\nos._exit(0)"
    leaves = "raise SystemExit"
    cheats = "import builtins\nbuiltins.exec = lambda *a: None\nbuiltins.compile = lambda *a: None"
    prints = "print('x' * 10_000_000)\n" + wrong
    asserts = ["assert add(1, 1) == 2", "assert add(0, 0) == 0"]
    assert judge(tests, [right, wrong, broken, exits, leaves, cheats, prints, right], asserts) == [
        1,
        0,
        0,
        0,
        0,
        0,
        0,
        1,
    ]


def test_single_tests_count(tests: CodeTests) -> None:
    partial = CodeTests(partial=True, seconds=20.0, unconfined=True)
    assert judge(partial, ["x = 1"], ["assert x == 1", "assert x == 2"]) == [0.5]
    partial.close()


def test_rows_without_tests_have_no_reward(tests: CodeTests) -> None:
    assert judge(tests, ["x = 1"], "") == [None]


OUTSIDE = str(Path(tempfile.gettempdir()) / "written_by_code_of_a_model")
FORBIDDEN = {
    "a socket": "import socket; socket.socket()",
    "a unix socket": "import socket; socket.socket(socket.AF_UNIX)",
    "a process": "import os\nif os.fork() == 0: os._exit(0)",
    "a command": "import subprocess; subprocess.run(['true'])",
    "a command in its place": "import os; os.execv('/bin/true', ['true'])",
    "a signal": "import os; os.kill(os.getppid(), 0)",
    "a file outside": f"open({OUTSIDE!r}, 'w').close()",
    "a folder outside": f"import os; os.mkdir({OUTSIDE!r})",
    "a link outside": f"import os; os.symlink('/etc/passwd', {OUTSIDE!r})",
    "a link into another folder": "import os; os.link('/etc/passwd', 'here'); open('here', 'a').close()",
    "a mode": f"import os; os.chmod({__file__!r}, 0o644)",
    "a time": f"import os; os.utime({__file__!r})",
    "what is there": f"import os; os.unlink({__file__!r})",
    "reading a file": f"open({__file__!r}).close()",
    "reading of others": "import os; open(f'/proc/{os.getppid()}/environ').close()",
    "the environment": "import os; os.environ['PATH']",
    "its own limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "another's limits": "import os, resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "much memory": "x = bytearray(2_000_000_000)",
    "large files": "open('large', 'wb').write(bytes(50_000_000))",
    "tracing": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "a name space": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
}
ALLOWED = {
    "a file of its own": "open('mine', 'w').write('x'); assert open('mine').read() == 'x'",
    "a folder of its own": "import os, shutil; os.mkdir('d'); open('d/f', 'w').close(); shutil.rmtree('d')",
    "threads": "import threading; t = threading.Thread(target=print); t.start(); t.join()",
    "the library": "import sqlite3, decimal, datetime, unicodedata, zoneinfo, hashlib; hashlib.sha256(b'x')",
    "chance": "import random, secrets; random.random(); secrets.token_hex()",
    "a temporary file": "import tempfile; tempfile.tempdir = '.'; tempfile.NamedTemporaryFile().close()",
    "asyncio without sockets": "import time; time.sleep(0.01)",
}


@pytest.mark.skipif(not (landlock_version() and can_filter()), reason="this kernel has no Landlock, or no seccomp")
def test_what_code_may_do_and_what_is_stopped(tests: CodeTests) -> None:
    attempts = [*FORBIDDEN.values(), *ALLOWED.values()]
    rewards = tests([""] * len(attempts), ["x = 1"] * len(attempts), [None] * len(attempts), tests=attempts)
    by_name = dict(zip([*FORBIDDEN, *ALLOWED], rewards, strict=True))
    assert by_name == {**dict.fromkeys(FORBIDDEN, 0.0), **dict.fromkeys(ALLOWED, 1.0)}
    assert not Path(OUTSIDE).exists()
    assert tests.notes == []


def test_time_and_processes_have_limits() -> None:
    """Threads without end, and loops; the next check is none the worse for it."""
    short = CodeTests(seconds=0.5, parallel=2, unconfined=True)
    forever = [
        "while True: pass",
        "import time\ntime.sleep(60)",
        "import threading\nwhile True: threading.Thread(target=input).start()",
    ]
    began = time.monotonic()
    assert judge(short, forever, "pass") == [0.0] * 3
    assert time.monotonic() - began < 2 * (0.5 + 1) + 1
    short.seconds = 20.0
    assert judge(short, ["x = 1"], "assert x == 1") == [1.0]
    short.close()


def test_a_process_that_is_lost_is_started_again(tests: CodeTests) -> None:
    judge(tests, ["x = 1"], "pass")
    assert tests._server is not None
    os.kill(tests._server.pid, 9)
    assert judge(tests, ["x = 1"], "assert x == 1") == [1.0]


@pytest.mark.skipif(not DATA.is_file(), reason="the shared data is not here")
def test_reference_solutions_pass_inside_that_pass_outside_and_quickly(tests: CodeTests) -> None:
    rows = [json.loads(line) for line in DATA.read_text().splitlines()][:150]
    solutions = [row["code"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("test_list", "test_setup_code")}
    judge(tests, ["x = 1"], "pass")
    began = time.monotonic()
    rewards = tests([""] * len(rows), solutions, [None] * len(rows), **columns)
    rate = len(rows) / (time.monotonic() - began)
    failed = [row["task_id"] for row, reward in zip(rows, rewards, strict=True) if reward != 1.0]
    assert failed == []  # 927, which needs a class that it does not define, is not among the first
    assert rate > 15  # 90 to 170 a second on two cores with nothing else to do; see docs/results.md


def test_a_machine_that_cannot_confine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "_holes", lambda: ["read files outside its folder"])
    assert "not fully confined: on this machine it can read files outside its folder" in CodeTests().notes[0]
    monkeypatch.setattr(code, "_holes", lambda: ["open network connections"])
    with pytest.raises(ConfigError, match=r"could open network connections; expected.*unconfined: true"):
        CodeTests()
    assert "it can open network connections" in CodeTests(unconfined=True).notes[0]
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="confined on Linux only, this is darwin"):
        CodeTests(unconfined=True)


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders of checks are removed, also where the code runs below a process that is ended with all it has started."""
    monkeypatch.setattr(code, "ENVIRONMENT", {"TMPDIR": str(tmp_path)})
    functions = RewardFunctions({"code": CodeTests(seconds=20.0)})
    rewards = functions(
        ["p"], ["open('mine', 'w').close()"], [None], {"tests": ["import os; assert os.path.exists('mine')"]}
    )
    assert rewards.values.tolist() == [[1.0]]
    assert len(list(tmp_path.glob("checks-*"))) == 1
    functions.close()
    assert list(tmp_path.iterdir()) == []


def test_code_of_and_as_tests() -> None:
    assert code_of("a\n```python\nx = 1\n```\nb\n```py\nx = 2\n```") == "x = 2\n"
    assert code_of("x = 3") == "x = 3"
    assert code_of("```\nx = 4") == "x = 4"
    assert as_tests('["assert a", "assert b"]') == ["assert a", "assert b"]
    assert as_tests(["assert a"]) == ["assert a"] == as_tests("assert a")
    assert as_tests(None) == as_tests("") == []
    assert code.cores_of_this_rank() >= 1


def evaluate(program: bytes, architecture: int, number: int, argument: int) -> int:
    """What a filter returns for a system call whose arguments are all `argument`: a second reading of the instructions."""
    place, value = 0, 0
    data = {0: number, 4: architecture, 16: argument, 24: argument, 32: argument}
    while True:
        instruction, if_true, if_false, constant = struct.unpack_from("=HBBI", program, 8 * place)
        place += 1
        if instruction == 0x20:
            value = data[constant]
        elif instruction == 0x06:
            return constant
        else:
            holds = {0x15: value == constant, 0x45: bool(value & constant), 0x35: value >= constant}[instruction]
            place += if_true if holds else if_false


@pytest.mark.parametrize(
    ("machine", "architecture", "calls"),
    [
        ("x86_64", 0xC000003E, {"read": 0, "openat": 257, "socket": 41, "clone": 56, "clone3": 435, "tgkill": 234}),
        ("aarch64", 0xC00000B7, {"read": 63, "openat": 56, "socket": 198, "clone": 220, "clone3": 435, "tgkill": 131}),
    ],
)
def test_the_filter_of_each_machine(machine: str, architecture: int, calls: dict[str, int]) -> None:
    """Also of the one that this test does not run on."""
    allow, refuse, missing, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
    program = seccomp_program(machine, 1234, may_write=False)

    def verdict(name: str, argument: int = 0, of: int = architecture) -> int:
        return evaluate(program, of, calls[name], argument)

    assert verdict("read") == allow and verdict("socket") == refuse and verdict("clone3") == missing
    assert verdict("read", of=0x40000003) == kill  # 32-bit calls have other numbers
    assert verdict("clone", 0x00010000) == allow and verdict("clone", 17) == refuse  # a thread; a process
    assert verdict("tgkill", 1234) == allow and verdict("tgkill", 1) == refuse
    assert verdict("openat", os.O_RDONLY) == allow and verdict("openat", os.O_RDWR | os.O_CREAT) == refuse
    assert evaluate(seccomp_program(machine, 1, may_write=True), architecture, calls["openat"], os.O_RDWR) == allow
