"""`torch.compile`, asked for in one place."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from textwrap import shorten
from typing import Any

import torch
from torch import nn


def compiled(function: Callable[..., Any], dynamic: bool | None = None) -> Callable[..., Any]:
    """`torch.compile`, without the warnings of the parts of torch that the compiler imports and torch deprecates."""
    with _ready_compiler():
        return torch.compile(function, dynamic=dynamic)


def sizes_by_themselves() -> AbstractContextManager[Any]:
    """The context in which a function is called that is compiled for all sizes.

    Trap: torch takes sizes that are equal in the first call, such as 256 queries and 256 keys, for one size, and compiles
    again where they are not.
    """
    from torch.fx.experimental import _config

    config: Any = _config
    each_by_itself: AbstractContextManager[Any] = config.patch(use_duck_shape=False)
    return each_by_itself


def compile_module(module: nn.Module) -> None:
    """Compile a module in place, once for rows of all lengths: its parameters keep their names."""
    with _ready_compiler():
        module.compile(dynamic=True)


def compiler_errors() -> tuple[type[Exception], ...]:
    """What is raised where something cannot be compiled, such as without a C++ compiler."""
    # Imported here: the compiler takes a second to import.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor.exc import InvalidCxxCompiler

    return TorchDynamoException, InvalidCxxCompiler


def reason_of(error: Exception) -> str:
    """Why something cannot be compiled, in one line: of what a C++ compiler says, its first error."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("backend=")] or [""]
    first = next((line for line in told if "error: " in line), told[0])
    return shorten(f"{type(error).__name__}: {first}", 300)


class CompiledLayers:
    """The layers of models, which may be switched between plain and compiled from one call to the next.

    Layers rather than whole models: those of a model are alike, so that one is compiled for all of them, in a fraction of the
    time (docs/results.md). What cannot be compiled runs plain: the call under way too, so that nothing is lost.

    Attributes:
        layers: of all models.
        is_on: whether they are compiled, each at its first call.
        failure: why they could not be; empty: nothing has failed.
    """

    def __init__(self) -> None:
        self.layers: list[nn.Module] = []
        self.is_on, self.failure = False, ""
        self._compiled: Callable[..., Any] = _call
        self._errors: tuple[type[Exception], ...] = ()

    def add(self, layers: list[nn.Module]) -> None:
        """Switch `layers` together with the others."""
        self.layers += layers
        if self.is_on:
            self._place(layers)

    def switch(self, on: bool) -> None:
        """Run compiled from the next call on, or plain."""
        self.is_on, self.failure = on, ""
        if on:
            self._errors = compiler_errors()
            # Tracing looks at inputs as it does at parameters.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            try:
                # Lengths differ from batch to batch: one graph for all of them.
                self._compiled = compiled(_call, dynamic=True)
            except self._errors as error:
                self._give_up(error)
        self._place(self.layers)

    def _place(self, layers: list[nn.Module]) -> None:
        for layer in layers:
            # What `nn.Module.compile` sets and `nn.Module.__call__` asks; copies and checkpoints leave it out.
            layer._compiled_call_impl = partial(self._run, layer) if self.is_on else None

    def _run(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        writes = kwargs.get("past_key_values") is not None  # into a cache that grows by a token per call
        if writes or not self.is_on:
            return _call(layer, args, kwargs)
        try:
            with _compiling_soundly():
                return self._compiled(layer, args, kwargs)
        except self._errors as error:
            self._give_up(error)
            return _call(layer, args, kwargs)

    def _give_up(self, error: Exception) -> None:
        self.failure, self.is_on = reason_of(error), False


def _call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return layer._call_impl(*args, **kwargs)


@contextmanager
def _compiling_soundly() -> Iterator[None]:
    """The context in which a layer is called, and compiled if that has to be."""
    dynamo, autograd, inductor = torch._dynamo.config, torch._functorch.config, torch._inductor.config
    with (
        dynamo.patch(optimize_ddp=False),  # DDP's buckets would cut graphs, and are larger than a layer
        autograd.patch(force_non_lazy_backward_lowering=True),  # what cannot be compiled shows in the forward
        inductor.patch(fallback_random=True),  # the same dropout as without
    ):
        yield


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
