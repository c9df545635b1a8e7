"""Element-wise functions of large tables: in blocks that stay in the cache, and compiled into one pass once that pays.

Compiling costs seconds, at the first step of a run that may be over in a minute. On a CPU a function therefore runs as it
is, a block of rows at a time, which gives the same bits, until a run is long enough: `compile_after`.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llm_trainer.compiler import compiled, compiler_errors, sizes_by_themselves

# Below this many elements neither blocks nor a compiled kernel save anything.
LARGE = 2**18
# Of the first input in a block, counted in float32; what is computed from it shares the cache of a core with it.
BLOCK_BYTES = 512 * 2**10

# Products of a run from which on kernels are compiled: compiling takes about 5 s (25 s for the first time on a machine) and
# then saves a twentieth of the time, so it comes where it has been missed for about as long as it takes.
REPAID_FLOPS = 2**44

_compiles = True


def compile_after(flops: float | None) -> bool:
    """Run large inputs on a CPU compiled from now on, if a run has done this many FLOPs; on a GPU they always do.

    A number of the run's, not of this process's: where it goes on after a stop, the same step meets the same kernels.

    Args:
        flops: None: at once.

    Returns:
        Whether they do now.
    """
    global _compiles
    _compiles = flops is None or flops >= REPAID_FLOPS
    return _compiles


class Kernel:
    """A function that computes each row, `first[i]`, by itself, from tensors and for large ones by the best way there is.

    Args:
        function: takes tensors that all have a row for each of `first`'s, then the rest; gives such tensors, or writes into
            those it got.
        per_row: how many of its arguments have such rows.
    """

    def __init__(self, function: Callable[..., Any], per_row: int) -> None:
        self.function, self.per_row = function, per_row
        self.can_compile = True
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, first: Tensor, *rest: Any) -> Any:
        is_large = first.numel() >= LARGE and first.dtype in (torch.float32, torch.bfloat16)
        if not is_large or first.device.type not in ("cpu", "cuda"):
            return self.function(first, *rest)
        if self.can_compile and (_compiles or first.device.type == "cuda"):
            return self._compiled(first, *rest)
        return self._plain(first, *rest)

    def _plain(self, first: Tensor, *rest: Any) -> Any:
        if first.device.type == "cpu":
            return self._in_blocks(first, *rest)
        return self.function(first, *rest)

    def _compiled(self, first: Tensor, *rest: Any) -> Any:
        try:
            if self.compiled is None:
                # The number of rows differs from batch to batch: one kernel for all of them.
                self.compiled = compiled(self.function, dynamic=True)
            with sizes_by_themselves():
                return self.compiled(first, *rest)
        except compiler_errors() as error:
            self.can_compile = False
            warnings.warn(
                f"{self.function.__name__} runs uncompiled, up to 2 times slower: torch.compile failed with "
                f"{str(error).splitlines()[0]!r}. A C++ compiler (g++) is what is usually missing.",
                stacklevel=3,
            )
            return self._plain(first, *rest)

    def _in_blocks(self, *inputs: Any) -> Any:
        rows, others = inputs[: self.per_row], inputs[self.per_row :]
        row_bytes = 4 * rows[0][0].numel()
        size = max(1, BLOCK_BYTES // row_bytes)
        blocks = zip(*(tensor.split(size) for tensor in rows), strict=True)
        results = [self.function(*block, *others) for block in blocks]
        if isinstance(results[0], Tensor):
            return torch.cat(results)
        if results[0] is None:  # it wrote into its inputs
            return None
        return tuple(torch.cat(column) for column in zip(*results, strict=True))
