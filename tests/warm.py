"""Commands that start at once: a process that has imported the heavy libraries, and forks itself for each of them.

A command of a guide or an example takes a second of its own and several to import torch and transformers. `commands(...)`
makes a folder with `llm-trainer` and `python` to put first on PATH: small programs that hand their arguments, folder,
environment and streams to the warm process, wait, and end with its exit code. What a new process does when it starts is
tested elsewhere, with real ones. A script that forks ranks is warmer still: DeepSpeed takes most of five seconds.
"""

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
request = {{"name": {name!r}, "arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
connection.shutdown(socket.SHUT_WR)
process = int(connection.recv(10))
def pass_on(number, frame):
    try:
        os.kill(process, number)
    except ProcessLookupError:
        pass  # it has just ended
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
sys.exit(int(connection.recv(10) or b"1"))
"""


@contextmanager
def commands(folder: Path, of: str = "commands") -> Iterator[Path]:
    """A folder of warm commands, while the block runs; `of` says what is imported: see `WARM`."""
    address, shims = folder / "socket", folder / "bin"
    shims.mkdir(parents=True)
    for name in ("llm-trainer", "python"):
        shim = shims / name
        shim.write_text(CLIENT.format(python=sys.executable, address=str(address), name=name))
        shim.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, str(address), of], stdout=subprocess.PIPE)
    assert server.stdout is not None and server.stdout.readline() == b"warm\n"
    try:
        yield shims
    finally:
        server.terminate()
        server.communicate()


# What transformers imports at the first tokenizer and the first model, half of the time of a command that trains.
OF_TRANSFORMERS = (
    "tokenizers.trainers",
    "transformers.tokenization_utils_tokenizers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen3.modeling_qwen3",
)


def import_commands() -> None:
    """What commands need."""
    from importlib import import_module
    from importlib.util import find_spec

    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import llm_trainer.cli.chat
        import llm_trainer.cli.compare
        import llm_trainer.cli.data
        import llm_trainer.cli.main
        import llm_trainer.cli.plan
        import llm_trainer.cli.plots
        import llm_trainer.cli.score
        import llm_trainer.cli.training
        import llm_trainer.data.kinds.language  # noqa: F401
        from llm_trainer.engine.device import DTYPES, choose_precision
        from llm_trainer.train import size
        from llm_trainer.trainers import TRAINERS, get_trainer_class

        for trainer in TRAINERS:
            get_trainer_class(trainer)
        for name in OF_TRANSFORMERS:
            import_module(name)
        if find_spec("peft") is not None:
            import_module("peft")

    cpu = torch.device("cpu")
    for precision in (
        "fp32",
        choose_precision("auto", cpu),
    ):  # what every command that trains would measure for its MFU
        size.measured_peak(cpu, DTYPES[precision])


def import_ranks() -> None:
    """What the scripts of tests/distributed and tests/invariance need."""
    from importlib import import_module
    from importlib.util import find_spec

    sys.path.append(str(Path(__file__).parent / "distributed"))
    ranks = import_module("ranks")
    ranks.import_once()
    with warnings.catch_warnings(), redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        import transformers.trainer  # noqa: F401  # of the engine 'hf'

        for package in ("peft", "bitsandbytes"):
            if find_spec(package) is not None:
                import_module(package)


WARM = {"commands": import_commands, "ranks": import_ranks}


def serve(address: str, of: str) -> None:
    """Import what is needed, and fork for each command that comes."""
    from one_thread import use_one_thread
    from quick_disk import never_wait

    never_wait()
    use_one_thread()
    WARM[of]()
    gc.freeze()
    signal.signal(signal.SIGCHLD, _reap)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("warm", flush=True)
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection)
        connection.close()


def _reap(number: int, frame: object) -> None:
    """Wait for the processes that have ended: the processor time of ignored ones, and of their forks, counts nowhere."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _answer(connection: socket.socket) -> None:
    """Run one command in a process of its own and send its exit code; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    while more := connection.recv(1 << 20):
        message += more
    request = json.loads(message)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os._exit(_run(request))
    connection.sendall(b"%10d" % child)  # whom signals are for
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    connection.sendall(b"%10d" % (code if code >= 0 else 128 - code))
    os._exit(0)


def _run(request: dict[str, Any]) -> int:
    """Be the command; its exit code."""
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    arguments = request["arguments"]
    code: Any = 0
    try:
        if request["name"] == "llm-trainer":
            _llm_trainer(arguments)
        else:
            _python(arguments)
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if code is None or isinstance(code, int):
        return code or 0
    return 1


def _llm_trainer(arguments: list[str]) -> None:
    from llm_trainer.cli.main import main

    sys.argv = ["llm-trainer", *arguments]
    main(arguments)


def _python(arguments: list[str]) -> None:
    """`python -c CODE`, `python FILE`, the command and torchrun as modules; anything else by the real one."""
    if arguments[0] == "-u":  # as torchrun starts ranks; what a fork has printed is flushed at its end
        arguments = arguments[1:]
    first, rest = arguments[0], arguments[1:]
    if first == "-m" and rest[0] == "llm_trainer.cli.main":
        sys.path.insert(0, os.getcwd())
        _llm_trainer(rest[1:])
    elif first == "-m" and rest[0] == "torch.distributed.run":
        from torch.distributed.run import main

        main(rest[1:])
    elif first == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif first.endswith(".py"):
        sys.path.insert(0, str(Path(first).resolve().parent))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")
    else:
        os.execv(sys.executable, [sys.executable, *arguments])


if __name__ == "__main__":
    serve(*sys.argv[1:])
