"""The only place that reads or writes environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_trainer.config.errors import ConfigError

PARALLEL_TYPES = ("ds", "ddp", "fsdp", "none")
# The names that oneDNN knows (https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html), in its order.
AVX512_16_BITS = ("avx512_core_bf16", "avx512_core_fp16", "avx512_core_amx", "avx512_core_amx_fp16")
AVX10 = ("avx10_1_512", "avx10_1_512_amx", "avx10_1_512_amx_fp16", "avx10_2_512", "avx10_2_512_amx_2")
CPU_ISAS_WITHOUT_BF16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
CPU_ISAS = (*CPU_ISAS_WITHOUT_BF16, *AVX512_16_BITS, *AVX10, "default")


@dataclass(frozen=True)
class Environment:
    """What the environment says, with the values of a plain single process where it says nothing.

    Attributes:
        token_dir: `TOKEN_DIR`, the tokenizer's folder.
        log_dir: `LOG_DIR`, the folder of log.txt, lr.txt and metrics.jsonl.
        checkpoint_dir: `CHECKPOINT_DIR`, else `DIST_CHECKPOINT_DIR`.
        checkpoints_to_keep: `CKPT_MAX_TO_KEEP`.
        base_model: `BASE_MODEL`, the folder or hub name of the base of adapters that is no longer where they say.
        cache_dir: `LLM_TRAINER_CACHE`, the folder of tokenized data; else `llm_trainer` in `XDG_CACHE_HOME` or `~/.cache`.
        parallel_type: `PARALLEL_TYPE`, one of ds, ddp, fsdp, none; None lets the machine decide.
        rank: `RANK` of this process among all.
        local_rank: `LOCAL_RANK`, its number on this node, and so its device.
        world_size: `WORLD_SIZE`, the number of processes.
        local_world_size: `LOCAL_WORLD_SIZE`, the number of processes on this node.
        master_addr: `MASTER_ADDR`, where the processes meet.
        master_port: `MASTER_PORT`.
        launched: whether torchrun (or another launcher) started this process: `RANK` and `WORLD_SIZE` are set.
        agent_store: whether the processes meet in a store that torchrun itself keeps (`TORCHELASTIC_USE_AGENT_STORE`).
        restarts: `TORCHELASTIC_RESTART_COUNT`, how often torchrun has started the processes again.
        threads: `OMP_NUM_THREADS`, else `MKL_NUM_THREADS`, as the user wrote it: libraries also take a list, one number per
            level. None: he did not.
        launchers_threads: `OMP_NUM_THREADS` where torchrun set it by itself; else None.
        max_cpu_isa: `ONEDNN_MAX_CPU_ISA`, the richest CPU instructions to use, one of `CPU_ISAS` in any case. oneDNN, which
            computes matrix products on CPUs, reads it too, and so does DeepSpeed through it: with AVX2 a rich CPU stands in
            for a poor one.
    """

    token_dir: str | None = None
    log_dir: str | None = None
    checkpoint_dir: str | None = None
    checkpoints_to_keep: int = 2
    base_model: str | None = None
    cache_dir: str = "~/.cache/llm_trainer"
    parallel_type: str | None = None
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 29500
    launched: bool = False
    agent_store: bool = False
    restarts: int = 0
    threads: str | None = None
    launchers_threads: str | None = None
    max_cpu_isa: str = "default"


def environment(variables: Mapping[str, str] | None = None) -> Environment:
    """Reads the variables afresh, so that a launcher or a test may change them at any time.

    Args:
        variables: read instead of the process's own.

    Raises:
        ConfigError: when a variable has a value that cannot be meant.
    """
    given = {name: value for name, value in (os.environ if variables is None else variables).items() if value}

    def number(name: str, default: int, least: int = 0) -> int:
        text = given.get(name, str(default))
        if not text.isdecimal() or int(text) < least:
            raise ConfigError(f"environment variable {name}: got {text!r}, expected an integer of at least {least}")
        return int(text)

    parallel_type = given.get("PARALLEL_TYPE")
    if parallel_type not in (None, *PARALLEL_TYPES):
        expected = ", ".join(PARALLEL_TYPES)
        raise ConfigError(f"environment variable PARALLEL_TYPE: got {parallel_type!r}, expected one of {expected}")
    # oneDNN ignores a name it does not know: a typing error would hide nothing, and nobody would notice.
    isa = given.get("ONEDNN_MAX_CPU_ISA", Environment.max_cpu_isa)
    if isa.lower() not in CPU_ISAS:
        expected = ", ".join(CPU_ISAS).upper()
        raise ConfigError(f"environment variable ONEDNN_MAX_CPU_ISA: got {isa!r}, expected one of {expected}")
    threads, launchers_threads = given.get("OMP_NUM_THREADS"), None
    if threads is not None and "TORCHELASTIC_RUN_ID" in given and _set_by_parent("OMP_NUM_THREADS", threads):
        threads, launchers_threads = None, threads
    return Environment(
        token_dir=given.get("TOKEN_DIR"),
        log_dir=given.get("LOG_DIR"),
        checkpoint_dir=given.get("CHECKPOINT_DIR", given.get("DIST_CHECKPOINT_DIR")),
        base_model=given.get("BASE_MODEL"),
        cache_dir=_cache_dir(given),
        checkpoints_to_keep=number("CKPT_MAX_TO_KEEP", Environment.checkpoints_to_keep, least=1),
        parallel_type=parallel_type,
        rank=number("RANK", Environment.rank),
        local_rank=number("LOCAL_RANK", Environment.local_rank),
        world_size=number("WORLD_SIZE", Environment.world_size, least=1),
        local_world_size=number("LOCAL_WORLD_SIZE", Environment.local_world_size, least=1),
        master_addr=given.get("MASTER_ADDR", Environment.master_addr),
        master_port=number("MASTER_PORT", Environment.master_port, least=1),
        launched="RANK" in given and "WORLD_SIZE" in given,
        agent_store=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        restarts=number("TORCHELASTIC_RESTART_COUNT", Environment.restarts),
        threads=threads or given.get("MKL_NUM_THREADS"),
        launchers_threads=launchers_threads,
        max_cpu_isa=isa.lower(),
    )


def _set_by_parent(name: str, value: str) -> bool:
    """Whether the process that started this one gave it `value` without having been given the variable itself.

    Linux keeps what a process was started with; where that cannot be read, the user counts as having set it.
    """
    try:
        own, parents = (_started_with(Path(f"/proc/{pid}/environ")) for pid in ("self", os.getppid()))
    except OSError:
        return False
    return own.get(name) == value and name not in parents


def _started_with(path: Path) -> dict[str, str]:
    entries = path.read_bytes().decode(errors="replace").split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _cache_dir(given: Mapping[str, str]) -> str:
    """https://specifications.freedesktop.org/basedir-spec: a relative path there is no path."""
    caches = given.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(caches):
        caches = "~/.cache"
    return given.get("LLM_TRAINER_CACHE", f"{caches}/llm_trainer")


def set_default(name: str, value: str) -> None:
    """Sets a variable for this process and its children unless the user already did (`TOKENIZERS_PARALLELISM`, ...)."""
    os.environ.setdefault(name, value)


def secret(name: str) -> str:
    """The value of a variable that the user names, such as the key of a server.

    Raises:
        ConfigError: it is not set.
    """
    value = os.environ.get(name)
    if not value:
        raise ConfigError(f"the environment variable {name} is not set; expected a key")
    return value


def override(name: str, value: str) -> None:
    """Sets a variable for this process and its children, whatever the user set."""
    os.environ[name] = value


def environment_with(variables: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is started with further variables."""
    return {**os.environ, **variables}
