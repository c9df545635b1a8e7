"""What is drawn from a user's loader, one step after the other: the same again for the same epoch and position.

Of a map-style DataLoader its samplers are asked here for indices, so that only this rank's samples are loaded, and none that
come before the position. Other loaders are read from their beginning.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.utils.data import DataLoader

from llm_trainer.data.loader_workers import WorkerLife, signals_held
from llm_trainer.data.order import (
    Order,
    Randomness,
    drawers_of,
    fingerprint,
    is_indexed,
    ranks_of,
    samplers_in,
    undealt,
)
from llm_trainer.data.stream import Batch, mix_seeds

PassedOver: TypeAlias = Callable[[int, int], None]  # takes a position and a fingerprint


class Drawn(NamedTuple):
    """A step as its loader gives it."""

    batches: list[Any]  # this rank's micro-batches, or their indices
    counts: bool  # False: this rank has none in this step, and `batches` keeps it in step with the others
    number: int  # of micro-batches, over the ranks among which the loader is dealt
    fingerprint: int  # of everything that was drawn in the epoch so far


class _Indices:
    """The sampler of a copy of a loader: it says what is to be loaded next.

    NOTE: no reference leads back from it. Workers whose iterator waits in a cycle for the garbage collector live on, and
    later workers, which are forked with it, try to end them.
    """

    def __init__(self) -> None:
        self.next: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.next


class Draws:
    """The steps of a loader, drawn in an order that follows from (seed, epoch).

    Args:
        loader: gives batches each time it is iterated.
        rank, world_size: whose micro-batches are loaded.
        seed: of the order.
        is_sharded: the loader deals to ranks by itself.
        deals: False: every rank gets all micro-batches of a step.

    Attributes:
        sampler: gives the indices of micro-batches; None: the loader has none, and is read.
        deals_itself: whether the loader deals to ranks by itself, as it says or as its samplers show.
        dealt_among: ranks to which each step is dealt here.
        order: who draws, and the seed of it.
    """

    def __init__(
        self, loader: Iterable[Batch], rank: int, world_size: int, seed: int, is_sharded: bool, deals: bool
    ) -> None:
        self.loader, self.rank, self.deals = loader, rank, deals
        drawers = drawers_of(loader)
        self.sampler: Any = None
        if is_indexed(loader):
            self.sampler = undealt(drawers[0], world_size)
            if self.sampler is not drawers[0]:
                drawers = samplers_in(self.sampler) + drawers
            is_sharded = is_sharded or any(ranks_of(drawer) > 1 for drawer in samplers_in(self.sampler))
        self.order = Order(drawers, seed)
        self.deals_itself = world_size > 1 and is_sharded
        self.dealt_among = 1 if self.deals_itself else world_size
        self._copy: DataLoader | None = None  # of the loader, loading `_indices`; kept while its workers are to be kept
        self._indices = _Indices()
        self._epochs_drawn = 0

    def steps(self, epoch: int, position: int, accumulation: int, passed_over: PassedOver) -> Iterator[Drawn]:
        """The steps of an epoch from a position on, with this rank's micro-batches.

        Args:
            accumulation: micro-batches per step and rank.
            passed_over: is told the position and the fingerprint of what comes before it, once that was drawn; may refuse it.
        """
        if self.sampler is not None and self.order.may_remember:
            for earlier in range(self._epochs_drawn, epoch):  # in this process the samplers have not seen them
                with self.order.begin(earlier).drawn_from():
                    deque(iter(self.sampler), maxlen=0)
        self._epochs_drawn = epoch + 1
        randomness = self.order.begin(epoch)
        per_step = accumulation * self.dealt_among
        if self.sampler is not None:
            return self._loaded(epoch, position, per_step, randomness, passed_over)
        return self._cut(self._readable(epoch), randomness, position, per_step, passed_over)

    def _cut(
        self, source: Iterable[Any], randomness: Randomness, position: int, per_step: int, passed_over: PassedOver
    ) -> Iterator[Drawn]:
        """Steps of what `source` gives from a position on: micro-batches, or their indices."""
        printed = 0
        # 1. what comes before the position
        starts_workers = isinstance(source, DataLoader)
        with randomness.drawn_from(), signals_held() if starts_workers else nullcontext():
            items = map(_itself, source)  # NOTE: `islice` would ask an iterator of the user to begin anew
        with randomness.drawn_from():
            for item in islice(items, position):
                printed = fingerprint(item, printed)
        passed_over(position, printed)
        # 2. one step after the other
        first = self.rank if self.dealt_among > 1 else 0
        while True:
            with randomness.drawn_from():
                step = list(islice(items, per_step))
            if not step:
                return
            for item in step:
                printed = fingerprint(item, printed)
            mine = step[first :: self.dealt_among] if self.deals else step
            yield Drawn(mine or step[:1], bool(mine), len(step), printed)

    def _loaded(
        self, epoch: int, position: int, per_step: int, randomness: Randomness, passed_over: PassedOver
    ) -> Iterator[Drawn]:
        """Steps of a map-style DataLoader: a copy of it loads what is drawn here, ahead and in its workers."""
        loader: Any = self.loader
        steps: deque[Drawn] = deque()

        def indices() -> Generator[Any, None, None]:
            for step in self._cut(self.sampler, randomness, position, per_step, passed_over):
                steps.append(step)
                yield from step.batches

        self._indices.next = drawn = indices()
        if self._copy is None or not loader.persistent_workers:
            how: dict[str, Any] = {"batch_sampler": self._indices}
            if loader.batch_sampler is None:
                how = {"batch_size": None, "sampler": self._indices}
            self._copy = self._copied(persistent_workers=loader.persistent_workers, **how)
        self._copy.generator.manual_seed(mix_seeds(self.order.seed, epoch, position, self.rank))
        nothing_more = object()
        try:
            with signals_held():
                batches = iter(self._copy)
            while True:
                # NOTE: what a dataset draws in this process, as for augmentation, must not depend on what else does.
                noise = Randomness(mix_seeds(self.order.seed, epoch, position, self.rank))
                with nullcontext() if loader.num_workers else noise.drawn_from():
                    first = next(batches, nothing_more)
                    if first is nothing_more:
                        return
                    step = steps.popleft()
                    rest = [next(batches) for _ in step.batches[1:]]
                position += step.number
                yield step._replace(batches=[first, *rest])
        finally:
            drawn.close()
            self._indices.next = iter(())

    def _readable(self, epoch: int) -> Iterable[Batch]:
        """What is read from its beginning to its end in every epoch.

        The workers of a loader of an IterableDataset are new in each, so that none remembers anything.
        """
        loader = self.loader
        if not isinstance(loader, DataLoader):
            return loader
        if type(loader).__iter__ is not DataLoader.__iter__:  # it does something of its own with its batches
            if not isinstance(loader.worker_init_fn, WorkerLife):
                loader.worker_init_fn = WorkerLife(loader.worker_init_fn)
            return loader
        copy = self._copied(batch_size=loader.batch_size, drop_last=loader.drop_last)
        copy.generator.manual_seed(mix_seeds(self.order.seed, epoch))
        return copy

    def _copied(self, **how: Any) -> DataLoader:
        """The user's loader with another order, a generator of its own, and workers that live as long as they should."""
        loader: Any = self.loader
        if loader.num_workers:
            how |= {"prefetch_factor": loader.prefetch_factor, "timeout": loader.timeout}
            how["multiprocessing_context"] = loader.multiprocessing_context
        return DataLoader(
            loader.dataset,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=WorkerLife(loader.worker_init_fn),
            generator=torch.Generator(),
            **how,
        )


def _itself(item: Any) -> Any:
    return item
