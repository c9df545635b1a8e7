"""Layers that keep only what enters them and are computed again in the backward; what enters may wait in host memory.

transformers offers that too (`activation_checkpointing_enable(offload=True)`), with copies that the device waits for. Here a
stream of their own makes them while the device computes. See docs/decisions/0062-what-enters-layers-waits-in-host-memory.md.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.options import ON_THEIR_WAY
from llm_trainer.models.inside import transformers_model

if TYPE_CHECKING:
    from llm_trainer.config.options import Execution

SMALLEST = 1024  # bytes; copying less costs more than keeping it


class Copies(Protocol):
    """Copies between a device and the host, made in the order they are begun, while the device computes."""

    def host_like(self, tensor: Tensor) -> Tensor:
        """Memory on the host for a copy of a tensor."""

    def begin(self, source: Tensor, target: Tensor) -> Any:
        """Copy what `source` will hold once all that was begun before is computed; returns what `wait` takes.

        Whoever calls keeps the memory of a `source` on the device until `wait`; that of a `target` on the device is not
        given to others before the copy is over.
        """

    def wait(self, copy: Any) -> None:
        """Let what the device computes from now on wait for a copy."""


class CudaCopies:
    """Copies by a stream of their own, from and to pinned memory."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def host_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=True)

    def begin(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        # The source is computed by then, and whoever had the target's memory before is done with it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        if target.is_cuda:
            target.record_stream(self._stream)  # where a step is given up, it is freed while the copy is under way
        return self._stream.record_event()

    def wait(self, copy: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(copy)


COPIES: dict[str, Callable[[torch.device], Copies]] = {"cuda": CudaCopies}  # by the kind of a device


class Kept:
    """A tensor that waits in host memory.

    Attributes:
        host: the copy there.
        device: where it belongs.
        here: it itself, as long as it has not left, and from when it is called back until it is used.
        copy: under way, or over.
        before: what was kept before it, which the backward asks for next; None: that is gone.
    """

    def __init__(self, tensor: Tensor, copies: Copies, before: "Callable[[], Kept | None]") -> None:
        self._copies, self.before, self.device = copies, before, tensor.device
        self.host = copies.host_like(tensor)
        self.here: Tensor | None = tensor
        self._version, self._is_original = tensor._version, True
        self.copy = copies.begin(tensor, self.host)

    def leave(self) -> None:
        """Free its memory on the device as soon as the copy is over; once, and not where it was used already."""
        if not self._is_original:
            return
        self._copies.wait(self.copy)
        self._check()
        self._is_original, self.here = False, None

    def call_back(self) -> Tensor:
        """Begin to copy it to the device, unless it is there."""
        if self.here is None:
            self.here = torch.empty_like(self.host, device=self.device)
            self.copy = self._copies.begin(self.host, self.here)
        return self.here

    def use(self) -> Tensor:
        """It, on the device; a further use copies it again."""
        found = self.call_back()
        self._copies.wait(self.copy)
        if self._is_original:
            self._check()
        self._is_original, self.here = False, None
        return found

    def _check(self) -> None:
        """As torch does for what it keeps itself.

        Raises:
            RuntimeError: somebody has written into the tensor since.
        """
        if self.here is not None and self.here._version != self._version:
            raise RuntimeError(
                "activation_offload: what entered a layer was changed in place after it had been kept for the backward; "
                "expected layers that leave their input as it is, or activation_offload: false"
            )


class Offload:
    """Recomputes layers, and keeps in host memory what entered them.

    At most `ON_THEIR_WAY` tensors are on their way out: then the device waits, so that memory does not depend on who is faster.
    In the backward the next one comes back while the layer of the last one is computed.
    Nothing here keeps a graph alive: where a step is given up, all of it goes with the graph.
    """

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._leaving: deque[Callable[[], Kept | None]] = deque()
        self._last: Callable[[], Kept | None] = _nothing

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # NOTE: `checkpoint` has hooks of its own inside, so that these see nothing but what it keeps: the arguments.
        with saved_tensors_hooks(self._pack, self._unpack):
            return checkpoint(layer, *args, use_reentrant=False, **kwargs)

    def _pack(self, tensor: Tensor) -> "Tensor | Kept":
        if tensor.nbytes < SMALLEST or not tensor.is_floating_point():
            return tensor
        while len(self._leaving) >= ON_THEIR_WAY:
            first = self._leaving.popleft()()
            if first is not None:
                first.leave()
        kept = Kept(tensor.detach(), self._copies, self._last)
        self._last = weakref.ref(kept)
        self._leaving.append(self._last)
        return kept

    def _unpack(self, kept: "Tensor | Kept") -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        found, before = kept.use(), kept.before()
        if before is not None:
            before.call_back()
        return found


def _nothing() -> None:
    return None


def check_offload(options: "Execution", device: torch.device, engine: str, deepspeed: Mapping[str, Any] | None) -> None:
    """
    Args:
        options: of the run.
        device: where this process computes.
        engine: its name, never 'auto'.
        deepspeed: DeepSpeed's JSON, if any.

    Raises:
        ConfigError: what layers keep shall wait in host memory, and there is nothing, or it is there already.
    """
    if not options.activation_offload:
        return
    if not options.gradient_checkpointing:
        raise ConfigError(
            "activation_offload: got true without gradient_checkpointing, and it is what recomputed layers keep that waits "
            "in host memory; a layer that is not computed again keeps some twenty times as much, whose copies would take "
            "longer than computing it. Expected gradient_checkpointing: true with it"
        )
    if device.type not in COPIES:
        raise ConfigError(
            f"activation_offload: this run is on {device.type}, whose memory is the host's, so that there is nothing to gain; "
            f"expected a run on a GPU (cuda), or activation_offload: false"
        )
    if engine == "deepspeed" and "activation_checkpointing" in (deepspeed or {}):
        raise ConfigError(
            "activation_offload: got true, and DeepSpeed recomputes the layers in its own way (activation_checkpointing); "
            "expected cpu_checkpointing: true there, which keeps their inputs in host memory, or no such section"
        )


def recompute_activations(models: Iterable[nn.Module], device: torch.device, options: "Execution") -> None:
    """Let the layers of transformers models forget what they compute, and compute it again in the backward.

    Args:
        models: in each of which is a transformers model.
        device: where they compute.
        options: of the run, as `check_offload` takes them.

    Raises:
        ValueError: one is no such model.
    """
    offload = None
    if options.activation_offload:
        offload = Offload(COPIES[device.type](device))
    for model in models:
        found = transformers_model(model)
        if found is None:
            raise ValueError(f"gradient_checkpointing needs a transformers model, this is {type(model).__name__}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of a new name, which older versions do not have
            found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if offload is not None:
            found._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=offload)
