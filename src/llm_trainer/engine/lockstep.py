"""Modules whose forward needs all ranks, called as often as each rank's data asks for."""

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from llm_trainer.checkpoint import plain_name
from llm_trainer.engine import dist
from llm_trainer.engine.watch import where_they_part

SUM, DONE = (
    1 << 20,
    1 << 21,
)  # what a rank announces besides the number of a module; smaller numbers take their turn first


class Lockstep:
    """Lets ranks call modules whose forward is a collective different numbers of times.

    One rank has mismatched rows to score and another has none, or scores with a reference that another skips. Inside
    `together` a rank announces each call, and one that does not make it makes up for it: it runs the same forward with
    the inputs of a rank that has some, and drops what comes out.

    Every rank announces what it does next, and the smallest number takes its turn: that of the first module. So whatever
    the calls of the ranks are, each comes to its end.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._modules: list[nn.Module] = []
        self._is_together = False
        self._is_within = False  # a call that was announced, or is made up for: what it calls itself is a part of it
        self._way: list[str] = []  # layers that have run a forward since `together` began
        self._made_up: list[Tensor] = []  # zeros of forwards with gradients, whose backward needs all ranks too

    def add(self, module: nn.Module, layers: Collection[nn.Module], calls_others: bool = False) -> None:
        """A module whose forward needs all ranks; all of them add the same ones in the same order.

        Args:
            layers: of it, whose weights are gathered one after the other, on all ranks in the same order.
            calls_others: its forward calls another module that was added.
        """
        number = len(self._modules)
        self._modules.append(module)

        @torch.compiler.disable
        def announce(module: nn.Module, inputs: Any, keywords: Any) -> None:
            if self._is_together and not self._is_within:
                self._take_turns(number, (inputs, keywords))
                self._is_within = calls_others

        def leave(module: nn.Module, inputs: Any, outputs: Any) -> None:
            self._is_within = False

        module.register_forward_pre_hook(announce, prepend=True, with_kwargs=True)  # before weights are gathered
        if calls_others:
            module.register_forward_hook(leave, always_call=True)
        for name, layer in module.named_modules():
            if layer in layers:
                self._note_forwards(layer, plain_name(name).removeprefix("module."))

    def _note_forwards(self, layer: nn.Module, name: str) -> None:
        @torch.compiler.disable
        def note(layer: nn.Module, inputs: Any) -> None:
            if self._is_together:  # else a rank may be generating by itself
                self._way.append(name)
                dist.passed(name)

        layer.register_forward_pre_hook(note, prepend=True)

    @contextmanager
    def together(self) -> Iterator[None]:
        """The context of what all ranks do together; its end, or `finish` before, is where they wait for each other."""
        self._is_together, self._is_within = True, False
        self._way.clear()
        try:
            yield
            self._finish()
        finally:
            self._is_together = False

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The context, perhaps inside `together`, of what ranks do by themselves on gathered weights."""
        was_together, self._is_together = self._is_together, False
        try:
            yield
        finally:
            self._is_together = was_together

    def _finish(self) -> None:
        if self._is_together:
            dist.passed("the end of its forward")
            self._take_turns(DONE)
        self._is_together = False

    def before_backward(self, loss: Tensor) -> Tensor:
        """`[]` the loss, with a gradient of 0 for the forwards that this rank has made up for, or still has to."""
        self._finish()
        made_up, self._made_up = self._made_up, []
        return torch.stack([loss, *made_up]).sum() if made_up else loss

    def joined(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """The same sum, inside `together`: a rank that comes to it early makes up for the calls of others before."""

        def after_all_calls(values: Tensor) -> Tensor:
            self._take_turns(SUM)
            return sum_over_ranks(values)

        return after_all_calls

    def _take_turns(self, mine: int, inputs: Any = None) -> None:
        """Make up for calls of other ranks until it is the turn of this rank's next call, sum or end."""
        processes = dist.num_processes()
        while True:
            way = zlib.crc32("\n".join(self._way).encode())
            encoded = mine * processes + dist.process_number()  # of those whose turn it is, the first one shares inputs
            (least, _), (_, greatest), (way_of_one, way_of_other) = dist.extremes([encoded, mine, way])
            turn, caller = divmod(least, processes)
            if turn == greatest and way_of_one != way_of_other:
                self._refuse_ways()
            if turn == SUM and greatest != SUM:
                raise RuntimeError(
                    f"_begin_step: process {caller} sums over ranks and another one does not; expected the same number of "
                    f"sums on every rank, whatever its data"
                )
            if turn == greatest or turn >= SUM:
                return
            shared = dist.share_object(_on_host(inputs), caller)
            if turn == mine:
                return
            self._make_up(turn, shared)

    def _refuse_ways(self) -> None:
        """The ranks have gathered weights of different layers: what they have computed is wrong, and nothing else shows it.

        Raises:
            ValueError: on every rank.
        """
        ways = dist.gather_objects([dist.place(), *self._way, "the end of its forward"])
        raise ValueError(where_they_part(dict(enumerate(ways))))

    def _make_up(self, number: int, shared: Any) -> None:
        (args, keywords), with_gradients = _on_device(shared, self._device)
        self._is_within = True
        try:
            with torch.set_grad_enabled(with_gradients):
                outputs = self._modules[number](*args, **keywords)
        finally:
            self._is_within = False
        if with_gradients:
            self._made_up.append(zero_loss(outputs, self._modules[number]))


def _on_host(inputs: Any) -> Any:
    """Inputs of a forward for another process, with where each tensor was, and whether gradients are wanted."""
    leaves, structure = tree_flatten(inputs)
    places = [leaf.device.type if isinstance(leaf, Tensor) else None for leaf in leaves]
    leaves = [leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return tree_unflatten(leaves, structure), places, torch.is_grad_enabled()


def _on_device(shared: Any, device: torch.device) -> tuple[Any, bool]:
    """What `_on_host` made on another rank, as inputs on this one."""
    inputs, places, with_gradients = shared
    leaves, structure = tree_flatten(inputs)
    for i, place in enumerate(places):
        if place == device.type:
            leaves[i] = leaves[i].to(device)
    return tree_unflatten(leaves, structure), with_gradients


def zero_loss(outputs: Any, module: nn.Module) -> Tensor:
    """`[]` the loss of a batch without terms: 0, with a gradient of 0 that goes the way of every other batch's.

    Its own loss may be 0 / 0, and NaN * 0 is NaN. Sharded layers exchange gradients on the way, so no rank may leave it out.
    """
    reached = [tensor for tensor in _tensors_of(outputs) if tensor.requires_grad]
    if not reached:
        reached = [parameter for parameter in module.parameters() if parameter.requires_grad]
    zeros = [(tensor.nan_to_num(0.0, 0.0, 0.0) * 0).sum().float() for tensor in reached]
    return torch.stack(zeros).sum()


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_of([getattr(value, f.name) for f in fields(value)])
