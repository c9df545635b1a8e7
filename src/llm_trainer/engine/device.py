"""What this machine has: the device of a process, and the arithmetic in which it is fast."""

import torch

from llm_trainer.config.env import CPU_ISAS_WITHOUT_BF16, environment, set_default
from llm_trainer.config.errors import ConfigError
from llm_trainer.state import Choice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The compute capability from which on GPUs multiply in 8-bit floating point, by how factors are scaled.
FLOAT8 = {"tensorwise": (8, 9), "rowwise": (9, 0), "rowwise_with_gw_hp": (9, 0)}


def detect_device(name: str | None) -> torch.device:
    """The device called `name`, or the best one of this process: its own GPU under torchrun, else any GPU, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    device = _detect(name)
    if device.type == "cpu":
        # oneDNN keeps 1,024 kernels, one per shape: with ragged rows half a GiB. It asks once, at its first product, so
        # this has to come before any model is tried out.
        set_default("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    return device


def _detect(name: str | None) -> torch.device:
    if name is not None:
        available = ["cpu"]
        if torch.cuda.is_available():
            available.append("cuda")
        if torch.backends.mps.is_available():
            available.append("mps")
        if name.split(":")[0] not in available:
            raise ValueError(f"device: got {name!r}, but this machine has {', '.join(available)}")
        if name != "cuda":  # without a number it means each process's own
            return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda", environment().local_rank)
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products have hardware of their own: CUDA from Ampere on, CPUs with AVX512-BF16 or AMX.

    A CPU whose instructions `ONEDNN_MAX_CPU_ISA` hides from oneDNN, which computes the products, has none.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu" or environment().max_cpu_isa in CPU_ISAS_WITHOUT_BF16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def choose_precision(name: str, device: torch.device) -> str:
    """Resolve 'auto': bf16 where it is fast, fp16 (with a loss scaler) on older GPUs, fp32 elsewhere.

    Raises:
        ValueError: `name` is unknown, or fp16 is asked for on a device other than a GPU.
    """
    if name == "auto":
        if has_fast_bf16(device):
            return "bf16"
        return "fp16" if device.type == "cuda" else "fp32"
    if name not in DTYPES:
        raise ValueError(f"precision: got {name!r}, expected one of auto, {', '.join(DTYPES)}")
    if name == "fp16" and device.type != "cuda":
        raise ValueError(f"precision: fp16 needs a GPU, this run is on {device}; use bf16 or fp32")
    return name


def precision_choice(chosen: str, device: str) -> Choice:
    """What `run_config.precision: auto` has come to, for the screen before training.

    Args:
        chosen: 'bf16', 'fp16' or 'fp32'.
        device: its kind, such as 'cuda'.
    """
    if chosen == "fp32":
        return Choice("precision", chosen, f"this {device} has no fast products in bf16", "run_config.precision: bf16")
    return Choice("precision", chosen, f"{device} has hardware for such products", "run_config.precision: fp32")


def compute_capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU of NVIDIA's; (0, 0) of anything else."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def check_float8(scaling: str, device: torch.device, precision: str) -> None:
    """
    Args:
        scaling: a key of `FLOAT8`.
        device: where the run computes.
        precision: 'fp32', 'bf16' or 'fp16'.

    Raises:
        ConfigError: this device has no such products, or what is not in 8 bits would be in something else than bf16.
    """
    key, found = "quantization_config.float8", compute_capability(device)
    if found < FLOAT8[scaling]:
        nearest = "leave it out: precision: bf16 is the nearest that works here"
        if found >= FLOAT8["tensorwise"]:
            nearest = "expected tensorwise, which works here"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        needed = ".".join(map(str, FLOAT8[scaling]))
        raise ConfigError(
            f"{key}: got {scaling}, which needs a GPU of compute capability {needed} or later (Ada has 8.9, Hopper 9.0), and "
            f"this run is on {name}; {nearest}"
        )
    if precision != "bf16":
        raise ConfigError(
            f"{key}: got it beside precision: {precision}, and what is not in 8 bits is in bf16 then; expected "
            f"run_config.precision: bf16"
        )
