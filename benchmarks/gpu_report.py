"""How a section of `gpu.py` tells what it found: a row is a line of its output."""

import json
import resource
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from llm_trainer.plan.gpus import half_peak

ROW_MARK = "ROW "


def wait_for(device: torch.device) -> None:
    """Wait until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> float:
    """The most memory in GiB: of the device since the last reset, or of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def fastest(function: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of `repeats` calls, after one that is not timed."""
    function()
    best = float("inf")
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        function()
        wait_for(device)
        best = min(best, time.perf_counter() - start)
    return best


class Report:
    """What a section knows of the machine, and where its rows go.

    Attributes:
        device: where everything runs.
        tiny: small models and few rounds.
        can_compile: whether rows that need `torch.compile` are wanted.
        attention: of the models that are trained.
    """

    def __init__(self, device: torch.device, tiny: bool, can_compile: bool, attention: str = "auto") -> None:
        self.device, self.tiny, self.can_compile = device, tiny, can_compile
        self.attention = attention
        self._measured_peak: float | None = None

    def say(self, text: str) -> None:
        """A line of the log."""
        print(text, flush=True)

    def row(self, name: str, numbers: dict[str, Any], rounds: list[float] | None = None) -> None:
        """A result."""
        self._print({"name": name, "numbers": numbers, "rounds": rounds or []})

    def leave_out(self, name: str, reason: str) -> None:
        """A row that this machine cannot give, and why."""
        self._print({"name": name, "left_out": reason})

    def attempt(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What `function` returns; a failure becomes a row of this name, and the section goes on."""
        try:
            return function(*arguments)
        except Exception as error:  # whatever it is: one row fails, not the ten minutes on a lent machine
            tail = traceback.format_exc().splitlines()[-12:]
            first_line = (str(error).splitlines() or [""])[0]
            row = {"name": name, "error": f"{type(error).__name__}: {first_line}"[:400], "traceback": tail}
            self._print(row)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def measured_peak(self) -> float:
        """FLOP/s of a large bf16 matrix product, the best of ten."""
        if self._measured_peak is None:
            size = 8192 if self.device.type == "cuda" else 512
            a = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
            b = torch.randn(size, size, device=self.device, dtype=torch.bfloat16)
            self._measured_peak = 2 * size**3 / fastest(lambda: a @ b, self.device, 10)
        return self._measured_peak

    def utilisation(self, flops_per_second: float) -> dict[str, float]:
        """MFU against the data sheet, where the GPU is known, and against the measured peak."""
        found = {"MFU of measured peak": flops_per_second / self.measured_peak()}
        if self.device.type == "cuda":
            sheet = half_peak(torch.cuda.get_device_name(self.device))
            if sheet is not None:
                found = {"MFU": flops_per_second / sheet} | found
        return found

    def _print(self, row: dict[str, Any]) -> None:
        print(ROW_MARK + json.dumps(row), flush=True)
