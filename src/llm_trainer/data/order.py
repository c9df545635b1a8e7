"""The order in which a user's loader gives its samples, made a function of (seed, epoch).

Samplers draw from generators that they were given or hold, or from Python's, numpy's or torch's global ones. A resumed run
must draw the same again, in a process in which nothing else has happened as before.
"""

import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from llm_trainer.data.stream import mix_seeds

# Their order depends on their generator alone.
_KEEP_NOTHING = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    list,
    tuple,
    range,
)
_SAMPLED_POINTS = 4096  # of a tensor, for its fingerprint


def is_indexed(loader: Any) -> bool:
    """Whether a loader draws indices first and then loads their samples, so that what is not wanted need not be loaded."""
    is_plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return is_plain and not isinstance(loader.dataset, IterableDataset)


def drawers_of(loader: Any) -> list[Any]:
    """All objects that have a say in the order of a loader, the outer before the inner ones."""
    if not isinstance(loader, DataLoader):
        return [loader]
    itself = [] if type(loader).__iter__ is DataLoader.__iter__ else [loader]
    if isinstance(loader.dataset, IterableDataset):
        return [*itself, loader.dataset]
    outermost = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    return [*itself, *samplers_in(outermost)]


def samplers_in(outermost: Any) -> list[Any]:
    """A sampler and those that it draws from."""
    found = [outermost]
    for sampler in found:  # grows meanwhile
        for name, value in getattr(sampler, "__dict__", {}).items():
            is_drawn_from = isinstance(value, Sampler) or name in ("sampler", "batch_sampler")
            if is_drawn_from and all(value is not other for other in found):
                found.append(value)
    return found


def ranks_of(drawer: Any) -> int:
    """Number of ranks that a sampler deals to by itself; 1: it knows of no ranks."""
    return int(getattr(drawer, "num_replicas", 1))


def undealt(sampler: Any, ranks: int) -> Any:
    """A sampler of the samples of all ranks in place of torch's DistributedSampler of one of `ranks`; others as they are.

    Dealing can then follow the position, so that another number of ranks may go on from it. Shuffled, its order is that of
    a RandomSampler: a script that has one or the other, by its number of ranks, goes on with the other.
    """
    if type(sampler) is BatchSampler:
        inner = undealt(sampler.sampler, ranks)
        return sampler if inner is sampler.sampler else BatchSampler(inner, sampler.batch_size, sampler.drop_last)
    if type(sampler) is not DistributedSampler or sampler.num_replicas != ranks:
        return sampler
    return RandomSampler(sampler.dataset) if sampler.shuffle else SequentialSampler(sampler.dataset)  # type: ignore[arg-type]


class Order:
    """Everything that draws the order of a loader, begun anew in every epoch.

    Args:
        drawers: see `drawers_of`.
        seed: of the run.

    Attributes:
        seed: of all epochs: the run's, mixed with those of the generators that the drawers came with.
    """

    def __init__(self, drawers: list[Any], seed: int) -> None:
        self.drawers = drawers
        self._replaced: list[tuple[Any, str, Any]] = []  # drawer, attribute, and the generator of the user
        chosen: list[int] = []
        for drawer in drawers:
            chosen += _seeds(drawer)
        self.seed = mix_seeds(seed, *chosen) if chosen else seed

    @property
    def may_remember(self) -> bool:
        """Whether an epoch may depend on those before: on what a sampler of the user keeps from one to the next."""
        return not all(type(drawer) in _KEEP_NOTHING or hasattr(drawer, "set_epoch") for drawer in self.drawers)

    def begin(self, epoch: int) -> "Randomness":
        """Seed every drawer for an epoch; what it is to be drawn from."""
        self.end()
        for number, drawer in enumerate(self.drawers):
            if hasattr(drawer, "set_epoch"):
                drawer.set_epoch(epoch)
            for name, generator in _generators(drawer).items():
                self._replaced.append((drawer, name, generator))
                setattr(drawer, name, _like(generator, mix_seeds(self.seed, epoch, number)))
        lent = None if all(type(drawer) in _KEEP_NOTHING for drawer in self.drawers) else mix_seeds(self.seed, epoch)
        return Randomness(lent)

    def end(self) -> None:
        """Give every drawer back the generator that it came with: another run may begin with it."""
        while self._replaced:
            drawer, name, generator = self._replaced.pop()
            setattr(drawer, name, generator)


def _generators(drawer: Any) -> dict[str, Any]:
    """The generators that a drawer holds, by attribute; None: a sampler has a place for one."""
    found = {}
    for name, value in getattr(drawer, "__dict__", {}).items():
        has_place = name == "generator" and value is None and isinstance(drawer, Sampler)
        if has_place or type(value) in (torch.Generator, random.Random, np.random.Generator, np.random.RandomState):
            found[name] = value
    return found


def _like(generator: Any, seed: int) -> Any:
    """A generator for a drawer alone, of the same kind as the one it has."""
    if isinstance(generator, random.Random):
        return random.Random(seed)
    if isinstance(generator, np.random.Generator):
        return np.random.Generator(type(generator.bit_generator)(seed))  # type: ignore[call-arg]
    if isinstance(generator, np.random.RandomState):
        return np.random.RandomState(seed % 2**32)
    device = torch.device("cpu") if generator is None else generator.device
    return torch.Generator(device).manual_seed(seed)


def _seeds(drawer: Any) -> Iterator[int]:
    """What the user has chosen about the order: the seeds of a drawer's generators."""
    if isinstance(drawer, DistributedSampler) and drawer.seed:
        yield drawer.seed
    for generator in _generators(drawer).values():
        if isinstance(generator, torch.Generator):
            yield generator.initial_seed()
        elif generator is not None:
            yield crc32(pickle.dumps(generator))


class Randomness:
    """Python's, numpy's and torch's global generators as one drawer sees them, whatever else draws from them meanwhile.

    Args:
        seed: of all three; None: the drawer does not use them, and they are left as they are.
    """

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self._state: tuple[Any, ...] | None = None

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        """In the block the global generators go on from where the last block ended; afterwards they are as before."""
        if self._seed is None:
            yield
            return
        outside = _global_state()
        if self._state is None:
            random.seed(self._seed)
            np.random.seed(self._seed % 2**32)
            torch.default_generator.manual_seed(self._seed)
        else:
            _set_global_state(self._state)
        try:
            yield
        finally:
            self._state = _global_state()
            _set_global_state(outside)


def _global_state() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def _set_global_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.default_generator.set_state(state[2])


def fingerprint(value: Any, before: int = 0) -> int:
    """A number that tells indices, or batches, from others: of what was drawn `before`, and of this.

    Of a large tensor some thousand elements are read; of what is not in host memory the shape.
    """
    if isinstance(value, Mapping):
        for key, item in value.items():
            before = fingerprint(item, crc32(str(key).encode(), before))
        return before
    if isinstance(value, torch.Tensor):
        before = crc32(str(tuple(value.shape)).encode(), before)
        if value.device.type != "cpu" or value.layout is not torch.strided:
            return before
        flat = value.detach().flatten()
        some = flat[:: max(1, len(flat) // _SAMPLED_POINTS)].contiguous()
        return crc32(some.view(torch.uint8).numpy().tobytes(), before)
    if isinstance(value, list | tuple) and not all(isinstance(item, int | str) for item in value):
        for item in value:
            before = fingerprint(item, before)
        return before
    if isinstance(value, np.ndarray | np.generic):
        return crc32(value.tobytes(), before) if value.dtype != object else before
    if isinstance(value, list | tuple | str | int | float | bool):
        return crc32(repr(value).encode(), before)
    return before
