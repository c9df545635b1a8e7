"""`llm-trainer rollout-server`: start vLLM as a server that draws completions for a trainer, and end it with this command."""

import http.client
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from llm_trainer.cli.errors import RunFailed
from llm_trainer.config.env import environment_with

WORKER = Path(__file__).parents[1] / "generation" / "worker"
LOOK_SECONDS = 1.0
END_SECONDS = 30.0  # from SIGTERM to SIGKILL
# What a trainer needs; what is given behind -- comes later, and may say otherwise.
NEEDED = (
    "--enable-scale-out",  # tokens in, tokens out
    "--skip-tokenizer-init",
    "--enable-prompt-tokens-details",  # says what came out of the prefix cache
    "--logprobs-mode",
    "processed_logprobs",
    "--worker-extension-cls",
    "llm_trainer_vllm.TrainerWorker",
    "--weight-transfer-config",
    '{"backend": "llm_trainer"}',
)


def rollout_server(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="the model that the run begins from")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- OPTIONS]", help="options of vLLM's own, behind --")
    ] = None,
    python: Annotated[
        str, typer.Option(help="the interpreter of an environment with vLLM (examples/cluster/make_vllm_env.sh)")
    ] = sys.executable,
    host: Annotated[
        str, typer.Option(help="the address to listen at; 0.0.0.0: for trainers on other machines")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    wait: Annotated[float, typer.Option(min=1, help="seconds until it must be ready")] = 1800.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the command, and start nothing")] = False,
) -> None:
    """Start a server of vLLM that takes its weights from a trainer."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: there is no config.json; expected the folder of a model, such as the run's model_config"
        )
    command = command_of(python, folder, host, port, options or [])
    own = variables()
    if dry_run:
        print(" ".join([*(f"{name}={shlex.quote(value)}" for name, value in own.items()), shlex.join(command)]))
        return
    _check_vllm(python)
    here = host
    if host == "0.0.0.0":
        here = "127.0.0.1"
    url = f"http://{here}:{port}"
    if _is_ready(here, port):
        raise ValueError(f"{url}: a server answers there already; expected a free --port, or the other server ended")
    print(f"starting: {shlex.join(command)}", flush=True)
    _let_signals_end_us()
    process = subprocess.Popen(command, env=environment_with(own), start_new_session=True)
    try:
        _wait_until_ready(process, here, port, wait)
        print(f"ready: {url} (rollout_servers: [http://HOST:{port}], as the trainer reaches this machine)", flush=True)
        code = process.wait()
    finally:
        _end(process)
    raise RunFailed(f"vLLM ended with code {code}; what it said stands above")


def command_of(python: str, folder: Path, host: str, port: int, further: list[str]) -> list[str]:
    """The command of a server."""
    # NOTE: the module, not the `vllm` command, which fails in builds for CPUs.
    server = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [*server, "--host", host, "--port", str(port), *NEEDED, *further]


def variables() -> dict[str, str]:
    """The environment variables of a server: our file in its workers, and the paths that update weights."""
    return {
        "PYTHONPATH": str(WORKER),  # only that: the rest of ours, and what it needs, is for another environment
        "VLLM_SERVER_DEV_MODE": "1",
    }


def _check_vllm(python: str) -> None:
    """
    Raises:
        ValueError: there is no vLLM.
    """
    looked = subprocess.run(
        [python, "-c", "import importlib.util as util; print(bool(util.find_spec('vllm')))"],
        capture_output=True,
        text=True,
        check=False,
    )
    if looked.stdout.strip() != "True":
        raise ValueError(
            f"{python} has no vLLM, which pins another transformers than the trainer and lives in an environment of its own: "
            f"make one with examples/cluster/make_vllm_env.sh, and pass --python ENV/bin/python"
        )


def _is_ready(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _wait_until_ready(process: subprocess.Popen[bytes], host: str, port: int, seconds: float) -> None:
    """
    Raises:
        RunFailed: it has ended, or is not ready in time.
    """
    until = time.monotonic() + seconds
    while not _is_ready(host, port):
        if process.poll() is not None:
            raise RunFailed(f"vLLM ended with code {process.returncode} before it was ready; what it said stands above")
        if time.monotonic() > until:
            raise RunFailed(f"vLLM was not ready after {seconds:g} seconds; --wait gives it longer")
        time.sleep(LOOK_SECONDS)


def _let_signals_end_us() -> None:
    """Let a signal end this command as an exception would, so that it ends the server on its way out."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    def stop(number: int, frame: FrameType | None) -> None:
        for further in numbers:  # the end is under way
            signal.signal(further, signal.SIG_IGN)
        # NOTE: the server is not ended here: the wait for it that was interrupted holds the lock of its `Popen`.
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, stop)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server and all processes that it has started: they are a session of their own."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
