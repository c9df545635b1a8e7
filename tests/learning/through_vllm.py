"""GRPO on the sums of `reinforced_sums.py`, with completions drawn by a server of vLLM; prints its line.

LLM_TRAINER_VLLM_PYTHON is the interpreter of vLLM's environment (examples/cluster/make_vllm_env.sh).
"""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
import sums
from reinforced_sums import Sums, of_groups
from reinforcement import run

SEED = 0


def main() -> None:
    torch.set_num_threads(1)
    sums.SHAPE["num_attention_heads"] = 2  # vLLM's attention on CPUs has heads of 32 at least
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            base = sums.base_model(SEED, str(folder / "base"))
        base.save_pretrained(folder / "policy")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "llm_trainer.cli.main", "rollout-server", str(folder / "policy")]
        command += ["--python", os.environ["LLM_TRAINER_VLLM_PYTHON"], "--port", str(port)]
        log = stack.enter_context((folder / "log").open("wb"))
        server = subprocess.Popen([*command, "--", "--dtype", "float32", "--enforce-eager"], stdout=log, stderr=log)
        stack.callback(server.wait, 60)
        stack.callback(server.send_signal, signal.SIGTERM)
        while b"ready: http" not in (folder / "log").read_bytes():
            assert server.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.5)
        Sums.base = staticmethod(lambda seed: base)
        started = time.perf_counter()
        found = run(of_groups(rollout_servers=[f"http://127.0.0.1:{port}"]), SEED)
        before, after = found.accuracy
        print(f"GRPO, drawn by vLLM: {before:.1%} -> {after:.1%}, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
