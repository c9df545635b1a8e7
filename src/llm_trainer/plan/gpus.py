"""What GPUs can do, from their data sheets; nothing here was measured."""

import re
from dataclasses import dataclass

from llm_trainer.config.errors import ConfigError


@dataclass(frozen=True)
class Gpu:
    """One accelerator, as its data sheet describes it.

    Attributes:
        chip: the word by which the name of a device tells it: `H100` of "NVIDIA H100 80GB HBM3".
        memory: bytes.
        half_flops: dense peak of 16-bit matrix products in FLOP/s (no structured sparsity).
        single_flops: peak of fp32 without TF32, which is PyTorch's default, in FLOP/s.
        memory_bandwidth: bytes/s of its own memory.
        link: bytes/s that one GPU sends to the others of its node (one direction).
        network: bytes/s that one GPU sends to other nodes (one direction), its share of the usual machine's adapters.
        has_bf16: whether bf16 has matrix units; where not, 16 bit is fp16.
    """

    chip: str
    memory: float
    half_flops: float
    single_flops: float
    memory_bandwidth: float
    link: float
    network: float
    has_bf16: bool = True


GB = 1e9
_GIB = 2**30

# Memory as the driver shows it, not as it is sold. NVLink and PCIe by direction. Networks: DGX B200, H200 and H100 have
# 400 Gbit/s per GPU, DGX A100 200, DGX-1 V100 50; for cards in servers a 100 Gbit/s adapter shared by eight is assumed,
# 25 Gbit/s for the consumer ones.
GPUS: dict[str, Gpu] = {
    # nvidia.com/en-us/data-center/dgx-b200 (per GPU), hgx: NVLink 5, 1.8 TB/s both ways
    "b200": Gpu("B200", 178 * _GIB, 2250e12, 75e12, 7700 * GB, 900 * GB, 50 * GB),
    # nvidia.com/en-us/data-center/h200, SXM: NVLink 4, 900 GB/s both ways
    "h200": Gpu("H200", 139 * _GIB, 989e12, 67e12, 4800 * GB, 450 * GB, 50 * GB),
    # nvidia.com/en-us/data-center/h100, SXM
    "h100": Gpu("H100", 79 * _GIB, 989e12, 67e12, 3350 * GB, 450 * GB, 50 * GB),
    # nvidia.com/en-us/data-center/a100, SXM: NVLink 3, 600 GB/s both ways
    "a100-80": Gpu("A100", 79 * _GIB, 312e12, 19.5e12, 2039 * GB, 300 * GB, 25 * GB),
    "a100-40": Gpu("A100", 39 * _GIB, 312e12, 19.5e12, 1555 * GB, 300 * GB, 25 * GB),
    # nvidia.com/en-us/data-center/l40s: PCIe 4 x16
    "l40s": Gpu("L40S", 44 * _GIB, 362e12, 91.6e12, 864 * GB, 32 * GB, 1.56 * GB),
    # nvidia.com/en-us/data-center/products/a10-gpu and l4: PCIe 4 x16
    "a10": Gpu("A10", 22 * _GIB, 125e12, 31.2e12, 600 * GB, 32 * GB, 1.56 * GB),
    "l4": Gpu("L4", 22 * _GIB, 121e12, 30.3e12, 300 * GB, 32 * GB, 1.56 * GB),
    # NVIDIA Ada and Ampere GA102 whitepapers, FP16 with FP32 accumulate: PCIe 4 x16
    "rtx4090": Gpu("4090", 23.5 * _GIB, 165e12, 82.6e12, 1008 * GB, 32 * GB, 0.39 * GB),
    "rtx3090": Gpu("3090", 23.5 * _GIB, 71e12, 35.6e12, 936 * GB, 32 * GB, 0.39 * GB),
    # nvidia.com/en-gb/data-center/tesla-v100, SXM2: NVLink 2, 300 GB/s both ways
    "v100": Gpu("V100", 31.7 * _GIB, 125e12, 15.7e12, 900 * GB, 150 * GB, 6.25 * GB, has_bf16=False),
    # nvidia.com/en-us/data-center/tesla-t4: PCIe 3 x16
    "t4": Gpu("T4", 14.6 * _GIB, 65e12, 8.1e12, 300 * GB, 16 * GB, 1.56 * GB, has_bf16=False),
}


def find_gpu(name: str) -> Gpu:
    """The GPU called `name` (a key of `GPUS`, in any case).

    Raises:
        ConfigError: there is no such name.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu: got {name!r}, expected one of {', '.join(GPUS)}")
    return gpu


def half_peak(device_name: str) -> float | None:
    """16-bit peak in FLOP/s of the GPU that calls itself `device_name` ("NVIDIA H100 80GB HBM3"); None: not known."""
    words = re.split(r"[\s-]+", device_name)
    return next((gpu.half_flops for gpu in GPUS.values() if gpu.chip in words), None)
