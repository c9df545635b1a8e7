"""`torch.compile`, asked for in one place."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    """`torch.compile`, without the warnings of the parts of torch that the compiler imports and torch deprecates."""
    with _ready_compiler():
        return torch.compile(function, dynamic=dynamic)


def compile_module(module: nn.Module) -> None:
    """Compile a module in place: its parameters keep their names."""
    with _ready_compiler():
        module.compile()


@contextmanager
def _ready_compiler() -> Iterator[None]:
    """The compiler, imported without those warnings and set up."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        _tell_vector_widths_apart()
        yield


def _tell_vector_widths_apart() -> None:
    """Make the width of this CPU's vectors part of the key of a compiled graph.

    Trap: torch 2.13 leaves it out. A cache that machines share, or that outlives a change of ATEN_CPU_CAPABILITY, then
    serves code for vectors of 512 bits where they have 256, and it computes wrong numbers without an error. The width
    set here is the one that the compiler would have picked.
    """
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.simdlen is None:
        config.cpp.simdlen = cpu_vec_isa.pick_vec_isa().bit_width()
