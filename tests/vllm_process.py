"""A server of vLLM on this machine, started by the command.

LLM_TRAINER_VLLM_PYTHON is the interpreter of vLLM's environment, which examples/cluster/make_vllm_env.sh makes.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from machine import free_port

PYTHON = os.environ.get("LLM_TRAINER_VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(
    PYTHON is None,
    reason="needs vLLM: examples/cluster/make_vllm_env.sh makes its environment, LLM_TRAINER_VLLM_PYTHON is its python",
)


@contextmanager
def started(folder: Path, *options: str) -> Iterator[str]:
    """The address of a server with the model of `folder`, which its log goes into; `options` of vLLM."""
    port, log = free_port(), folder / "log-of-the-server"
    command = [sys.executable, "-m", "llm_trainer.cli.main", "rollout-server", str(folder), "--port", str(port)]
    command += ["--python", str(PYTHON), "--wait", "200", "--", "--dtype", "float32", "--enforce-eager", *options]
    # On CPUs vLLM 0.32 dies where a request with a seed is computed in parts: its generator there has no offset to go back by.
    command += ["--max-num-batched-tokens", "16384"]
    variables = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env=variables, cwd=Path(__file__).parent, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        while b"ready: http" not in log.read_bytes():
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
