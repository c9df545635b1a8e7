"""A process that runs code of a model against tests, each in a confined fork of its own. Imports nothing but the library.

It is started as a program, not forked from the trainer: a fork would hold the trainer's memory, with all that is in it. Frames
of JSON come in by stdin and go out by stdout: `{"id", "code", "tests", "seconds", "memory"}` -> `{"id", "passed"}` and, where
not all tests passed, `"why"`.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
from typing import Any, NamedTuple, NoReturn

from llm_trainer.rewards.confine import Limits, confine

FRAME = struct.Struct(">I")
# Imported before the fork: what most code begins with.
COMMON = (
    "bisect collections copy datetime decimal fractions functools heapq itertools json math operator random re string"
)
READABLE = [
    "/usr/lib",
    "/usr/share/zoneinfo",
    "/lib",
    "/lib64",
    "/etc/localtime",
    "/dev/urandom",
    "/dev/random",
    "/dev/zero",
]
MOST_WORDS = 300  # characters of why a test did not pass


class Check(NamedTuple):
    """A run of some code.

    Attributes:
        key: Of whoever asked.
        pid: Of its process.
        verdict: Where that says how it went.
        deadline: On the monotonic clock.
        folder: Its own.
    """

    key: int
    pid: int
    verdict: int
    deadline: float
    folder: str


def main(parallel: int) -> None:
    """Serve requests until stdin is closed, `parallel` at a time."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in COMMON.split():
        __import__(name)
    out = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    with tempfile.TemporaryDirectory(prefix="checks-", ignore_cleanup_errors=True) as base:
        serve(parallel, out, base)


def serve(parallel: int, out: int, base: str) -> None:
    """The loop: read what is asked, start what there is room for, answer what has ended."""
    waiting: list[dict[str, Any]] = []
    running: dict[int, Check] = {}
    received, is_open = bytearray(), True
    os.set_blocking(0, False)
    while is_open or waiting or running:
        # 1. start
        while waiting and len(running) < parallel:
            check = start(waiting.pop(0), base)
            running[check.verdict] = check

        # 2. wait
        poll = select.poll()
        if is_open:
            poll.register(0, select.POLLIN)
        for verdict in running:
            poll.register(verdict, select.POLLIN)
        deadline = min((check.deadline for check in running.values()), default=time.monotonic() + 60)
        ready = {end for end, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000 + 1)}

        # 3. read requests
        if 0 in ready:
            chunk = os.read(0, 1 << 20)
            is_open = bool(chunk)
            received += chunk
            while len(received) >= FRAME.size and len(received) >= FRAME.size + FRAME.unpack_from(received)[0]:
                size = FRAME.size + FRAME.unpack_from(received)[0]
                waiting.append(json.loads(received[FRAME.size : size]))
                del received[:size]

        # 4. answer
        now = time.monotonic()
        for check in list(running.values()):
            if check.verdict in ready or now >= check.deadline:
                answer = {"id": check.key, **finish(check)}
                del running[check.verdict]
                frame = json.dumps(answer).encode()
                os.write(out, FRAME.pack(len(frame)) + frame)


def start(request: dict[str, Any], base: str) -> Check:
    """Fork a process for a request."""
    folder = tempfile.mkdtemp(dir=base)
    secret = os.urandom(16).hex()
    verdict, end = os.pipe()
    os.set_blocking(verdict, False)
    pid = os.fork()
    if pid == 0:
        run(request, folder, end, secret)
    os.close(end)
    _SECRETS[pid] = secret
    return Check(request["id"], pid, verdict, time.monotonic() + request["seconds"], folder)


_SECRETS: dict[int, str] = {}  # by process; said by it when it came to its end


def finish(check: Check) -> dict[str, Any]:
    """End a process, and say how it went; one that did not come to its end has passed nothing."""
    words = b""
    with contextlib.suppress(BlockingIOError):
        words = os.read(check.verdict, 4096)
    is_late = not words and time.monotonic() >= check.deadline
    with contextlib.suppress(ProcessLookupError):
        os.kill(check.pid, signal.SIGKILL)
    _, status = os.waitpid(check.pid, 0)
    os.close(check.verdict)
    with contextlib.suppress(OSError, RecursionError):
        shutil.rmtree(check.folder)
    secret = _SECRETS.pop(check.pid)
    if is_late:
        return {"passed": 0, "why": "it took too long"}
    said, _, rest = words.decode(errors="replace").partition(" ")
    if said != secret:
        return {"passed": 0, "why": f"it ended its process (status {os.waitstatus_to_exitcode(status)})"}
    return json.loads(rest)


# --- in the process of a check


def run(request: dict[str, Any], folder: str, end: int, secret: str) -> NoReturn:
    """Confine this process, run the code and then each test, say how it went, and end."""
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        os.closerange(3, end)
        os.closerange(end + 1, 1024)
        os.chdir(folder)
        readable = [*READABLE, sys.prefix, sys.base_prefix, os.path.dirname(os.__file__)]
        confine(folder, readable, Limits(int(request["seconds"]) + 1, request["memory"]))
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        result = judge(request["code"], request["tests"])
        said = f"{secret} {json.dumps(result)}".encode()
        os.write(end, said)
    finally:
        os._exit(0)


def judge(code: str, tests: list[str]) -> dict[str, Any]:
    """Run `code`, then `tests` in its names; how many passed, and what the first other one said."""
    run_it, make = exec, compile  # the code may put something else in their place
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        run_it(make(code, "completion.py", "exec"), names)
    except BaseException as error:  # also SystemExit: it is the code's
        return {"passed": 0, "why": f"the code raised {_in_words(error)}"}
    passed, why = 0, ""
    for test in tests:
        try:
            run_it(make(test, "test.py", "exec"), names)
            passed += 1
        except BaseException as error:
            why = why or f"{_in_words(error)} in {test.strip()}"[:MOST_WORDS]
    result: dict[str, Any] = {"passed": passed}
    if why:
        result["why"] = why
    return result


def _in_words(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:MOST_WORDS]
    except BaseException:
        return type(error).__name__


# --- what this machine can do


def holes() -> list[str]:
    """What confined code can do on this machine and should not, tried out in a confined process."""
    attempts = {
        "open network connections": "import socket; socket.socket()",
        "start processes": "import os\nif os.fork() == 0: os._exit(0)",
        "write files outside its folder": "open(OUTSIDE, 'w').close()",
        "read files outside its folder": "open(SECRET).close()",
        "change files outside its folder": "import os; os.chmod(SECRET, 0o644)",
    }
    found = []
    with tempfile.TemporaryDirectory() as outside, tempfile.TemporaryDirectory() as base:
        secret = os.path.join(outside, "secret")
        with open(secret, "w"):
            pass
        names = f"OUTSIDE, SECRET = {os.path.join(outside, 'new')!r}, {secret!r}\n"
        for what, attempt in attempts.items():
            check = start({"id": 0, "code": "", "tests": [names + attempt], "seconds": 10, "memory": 1 << 29}, base)
            poll = select.poll()
            poll.register(check.verdict, select.POLLIN)
            poll.poll(10_000)
            answer = finish(check)
            if answer["passed"]:
                found.append(what)
            elif "status" in answer["why"] or "too long" in answer["why"]:
                found.append(f"{what} (not known: {answer['why']})")
    return found
