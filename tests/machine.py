"""What tests ask of the machine that they run on."""

import os
import random
import socket

import torch


def has_fp16() -> bool:
    """Whether DeepSpeed computes in fp16 here: a CPU with AVX512-FP16 or AMX-FP16, unless ONEDNN_MAX_CPU_ISA hides it."""
    mkldnn = torch.ops.mkldnn
    return hasattr(mkldnn, "_is_mkldnn_fp16_supported") and mkldnn._is_mkldnn_fp16_supported()


def free_port() -> int:
    """A port that nobody listens on.

    Each of pytest's workers looks in a range of its own, below the ports that the kernel hands out by itself: nobody
    else takes it between this look and its use.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + 1_000 * (worker % 10)
    for port in random.SystemRandom().sample(range(first, first + 1_000), 1_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise OSError(f"no free port from {first} to {first + 999}")
