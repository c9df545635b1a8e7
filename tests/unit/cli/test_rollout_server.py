"""`llm-trainer rollout-server`: the command that it builds, and a server that ends with it."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Stands for an environment with vLLM: answers /health, starts a worker, and writes what it was given.
PYTHON = """#!{python}
import os, subprocess, sys
if sys.argv[1] == "-c":
    print(True)
    sys.exit()
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
assert os.path.exists(os.environ["PYTHONPATH"] + "/llm_trainer_vllm.py") and os.environ["VLLM_SERVER_DEV_MODE"] == "1"
worker = subprocess.Popen(["sleep", "60"])
open({log!r}, "w").write(str(worker.pid))
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_the_command_is_printed(folder: Path, run, capsys) -> None:
    assert (
        run("rollout-server", str(folder), "--dry-run", "--python", "env/bin/python", "--", "--dtype", "float32") == 0
    )
    said = capsys.readouterr().out.strip()
    assert (
        said.startswith("PYTHONPATH=")
        and "VLLM_SERVER_DEV_MODE=1 env/bin/python -m vllm.entrypoints.openai.api_server" in said
    )
    assert said.endswith('--weight-transfer-config \'{"backend": "llm_trainer"}\' --dtype float32')


def test_what_is_missing_is_named(folder: Path, run, capsys) -> None:
    assert run("rollout-server", str(folder / "nothing")) == 2
    assert "no config.json; expected the folder of a model" in capsys.readouterr().err
    assert run("rollout-server", str(folder)) == 2  # the trainer's own environment
    assert "has no vLLM, which pins another transformers" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_the_server_ends_with_the_command(folder: Path) -> None:
    log, python = folder / "worker", folder / "python"
    python.write_text(PYTHON.format(python=sys.executable, log=str(log)))
    python.chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "llm_trainer.cli.main", "rollout-server", str(folder), "--python", str(python)]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = [process.stdout.readline(), process.stdout.readline()]
    try:
        assert lines[1].startswith(f"ready: http://127.0.0.1:{port}"), lines
        time.sleep(0.5)  # until the command waits for its server
        process.send_signal(signal.SIGTERM)
        assert process.wait(8) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    process.stdout.close()
    worker, until = Path("/proc", log.read_text()), time.monotonic() + 5
    while worker.exists() and "Z" not in (worker / "stat").read_text().split()[2] and time.monotonic() < until:
        time.sleep(0.05)
    assert not worker.exists() or "Z" in (worker / "stat").read_text().split()[2]
