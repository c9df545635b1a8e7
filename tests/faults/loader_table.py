"""A table of loaders that users write, stopped and gone on from: `python loader_table.py [OUT]` plays all cells.

Every cell must give each sample exactly as often as without the stop, epoch by epoch, or be refused by name. A process that
starts is played by new objects and by global generators in another state; ranks are played one after the other.
"""

import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

SIZE, BATCH, EPOCHS, PER_STEP = (
    23,
    2,
    3,
    2,
)  # samples, rows of a micro-batch, epochs, micro-batches of a step on all ranks


class Numbers(Dataset):
    """Sample i is the number i; loading it draws from everything that can be drawn from."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> torch.Tensor:
        disturb(1)
        return torch.tensor(index)


def disturb(times: int) -> None:
    """Draw from Python's, numpy's and torch's global generators."""
    for _ in range(times):
        random.random(), np.random.rand(), torch.rand(1)


@dataclass
class Shuffled(Sampler):
    """A permutation drawn by a function of the number of samples, at once or sample by sample."""

    draw: Callable[[], Any]

    def __iter__(self) -> Iterator[int]:
        left = list(range(SIZE))
        while left:  # lazily: other things are drawn between two samples
            yield left.pop(int(self.draw() * len(left)))

    def __len__(self) -> int:
        return SIZE


class OwnGenerator(Sampler):
    """Shuffles by a generator of its own, which goes on from epoch to epoch."""

    def __init__(self, generator: Any) -> None:
        self.rng = generator

    def __iter__(self) -> Iterator[int]:
        order = list(range(SIZE))
        self.rng.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return SIZE


class Counting(Sampler):
    """Begins each epoch where its own count of epochs says; nobody tells it the epoch."""

    def __init__(self) -> None:
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        self.count += 1
        first = 5 * self.count
        return iter([(first + i) % SIZE for i in range(SIZE - self.count)])


class Hidden(Sampler):
    """Shuffles by a generator that nobody can find, seeded by chance."""

    def __init__(self) -> None:
        rng = random.Random()
        self.shuffled = lambda: rng.sample(range(SIZE), SIZE)

    def __iter__(self) -> Iterator[int]:
        return iter(self.shuffled())

    def __len__(self) -> int:
        return SIZE


class ByLength(Sampler):
    """Batches of similar numbers, in an order drawn from torch's global generator, before the first is asked for."""

    def __iter__(self) -> Iterator[list[int]]:
        starts = range(0, SIZE, BATCH)
        order = torch.randperm(len(starts)).tolist()
        return iter([list(range(starts[i], min(SIZE, starts[i] + BATCH))) for i in order])

    def __len__(self) -> int:
        return -(-SIZE // BATCH)


class OwnDistributed(DistributedSampler):
    """A user's sampler that deals to ranks by itself."""


class InOrder(IterableDataset):
    """All numbers, each from one of the workers."""

    def samples(self) -> list[int]:
        """The numbers of this process, in order."""
        worker = torch.utils.data.get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return list(range(first, SIZE, every))

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in self.samples():
            disturb(1)
            yield torch.tensor(number)


class ShuffledByPython(InOrder):
    """The same in an order drawn from Python's global generator."""

    def samples(self) -> list[int]:
        return random.sample(super().samples(), len(super().samples()))


class Epochs(InOrder):
    """The same in an order that set_epoch decides."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def samples(self) -> list[int]:
        return random.Random(self.epoch).sample(super().samples(), len(super().samples()))


class Batches:
    """Not a DataLoader: gives batches in an order drawn from a generator of its own, or a hidden one."""

    def __init__(self, generator: np.random.Generator | None) -> None:
        self.rng = generator

    def __iter__(self) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng() if self.rng is None else self.rng
        order = rng.permutation(SIZE)
        for start in range(0, SIZE, BATCH):
            yield torch.tensor(order[start : start + BATCH])


class DealsItself:
    """Batches of this rank's rows alone."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[torch.Tensor]:
        rows = list(range(SIZE - SIZE % self.ranks))[self.rank :: self.ranks]
        for start in range(0, len(rows), BATCH):
            yield torch.tensor(rows[start : start + BATCH])


def seeded(seed: int = 5) -> torch.Generator:
    """A generator that a script makes."""
    return torch.Generator().manual_seed(seed)


def dealt(rank: int, ranks: int, kind: type[DistributedSampler] = DistributedSampler) -> DistributedSampler:
    """torch's sampler of one rank."""
    return kind(Numbers(), num_replicas=ranks, rank=rank, shuffle=True)  # type: ignore[arg-type]


def batched(sampler: Any) -> dict[str, Any]:
    """A sampler given as `batch_sampler`."""
    return {"batch_sampler": BatchSampler(sampler, BATCH, False)}


# name -> (rank, ranks) -> the arguments of a DataLoader of `Numbers`
SAMPLERS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "in_order": lambda rank, ranks: {"batch_size": BATCH},
    "shuffle": lambda rank, ranks: {"batch_size": BATCH, "shuffle": True},
    "shuffle_generator": lambda rank, ranks: {"batch_size": BATCH, "shuffle": True, "generator": seeded()},
    "unseeded_generator": lambda rank, ranks: {
        "batch_size": BATCH,
        "sampler": RandomSampler(Numbers(), generator=seeded(random.SystemRandom().randrange(2**40))),  # type: ignore[arg-type]
    },
    "with_replacement": lambda rank, ranks: {
        "batch_size": BATCH,
        "sampler": RandomSampler(Numbers(), replacement=True, num_samples=70),  # type: ignore[arg-type]
    },
    "subset_random": lambda rank, ranks: {
        "batch_size": BATCH,
        "sampler": SubsetRandomSampler(range(3, SIZE), seeded()),
    },
    "weighted_random": lambda rank, ranks: {
        "batch_size": BATCH,
        "sampler": WeightedRandomSampler(range(1, SIZE + 1), SIZE, generator=seeded()),  # type: ignore[arg-type]
    },
    "batch_sampler": lambda rank, ranks: batched(RandomSampler(Numbers(), generator=seeded())),  # type: ignore[arg-type]
    "drop_last": lambda rank, ranks: {"batch_size": BATCH, "shuffle": True, "drop_last": True},
    "one_by_one": lambda rank, ranks: {"batch_size": None, "shuffle": True},
    "list_of_batches": lambda rank, ranks: {"batch_sampler": [[4, 1], [7, 7], [2, 0], [9, 8], [3, 5]]},
    "by_length": lambda rank, ranks: {"batch_sampler": ByLength()},
    "python_random": lambda rank, ranks: {"batch_size": BATCH, "sampler": Shuffled(random.random)},
    "numpy_random": lambda rank, ranks: {"batch_size": BATCH, "sampler": Shuffled(np.random.rand)},
    "torch_random": lambda rank, ranks: batched(Shuffled(lambda: float(torch.rand(())))),
    "own_python": lambda rank, ranks: {"batch_size": BATCH, "sampler": OwnGenerator(random.Random(1))},
    "own_numpy": lambda rank, ranks: batched(OwnGenerator(np.random.default_rng())),
    "counting": lambda rank, ranks: {"batch_size": BATCH, "sampler": Counting()},
    "distributed": lambda rank, ranks: {"batch_size": BATCH, "sampler": dealt(rank, ranks)},
    "batch_distributed": lambda rank, ranks: batched(dealt(rank, ranks)),
    # a script that deals only where there are several ranks
    "distributed_or_shuffle": lambda rank, ranks: (
        {"batch_size": BATCH, "sampler": dealt(rank, ranks)} if ranks > 1 else {"batch_size": BATCH, "shuffle": True}
    ),
    "own_distributed": lambda rank, ranks: batched(dealt(rank, ranks, OwnDistributed)),
    "hidden": lambda rank, ranks: {"batch_size": BATCH, "sampler": Hidden()},
}
ITERABLE_DATASETS: dict[str, Callable[[], Any]] = {
    "iterable_in_order": InOrder,
    "iterable_python_random": ShuffledByPython,
    "iterable_set_epoch": Epochs,
}
OTHERS: dict[str, Callable[[int, int], Any]] = {  # not DataLoaders
    "list": lambda rank, ranks: [torch.arange(i, min(SIZE, i + BATCH)) for i in range(0, SIZE, BATCH)],
    "own_batches": lambda rank, ranks: Batches(np.random.default_rng(3)),
    "hidden_batches": lambda rank, ranks: Batches(None),
    "deals_itself": DealsItself,
    "deals_itself_unsaid": DealsItself,
    "generator": lambda rank, ranks: iter(list(Batches(np.random.default_rng(3)))),
}
DEALING = ("own_distributed", "deals_itself")
WORKERS: dict[str, dict[str, Any]] = {
    "alone": {},
    "workers": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
RANKS = [(1, 1), (2, 2), (1, 2), (2, 1)]  # before the stop, after it
REFUSED: dict[str, tuple[str, list[tuple[int, int]]]] = {  # loader -> words of the refusal, where it must come
    "hidden": ("Hidden draws from something that", RANKS),
    "hidden_batches": ("Batches draws from something that", RANKS),
    "own_distributed": ("dealt to", [(1, 2), (2, 1)]),
    "deals_itself": ("dealt to", [(1, 2), (2, 1)]),
    "deals_itself_unsaid": ("loader_is_sharded=True", [(2, 2), (1, 2), (2, 1)]),
    "generator": ("can be read only once", RANKS),
}


@dataclass(frozen=True)
class Cell:
    """A loader, its workers, the epoch in which it is stopped, and the numbers of ranks before and after."""

    loader: str
    workers: str
    epoch: int
    ranks: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.loader}-{self.workers}-epoch{self.epoch}-{self.ranks[0]}to{self.ranks[1]}"


def cells() -> list[Cell]:
    """The whole table; with workers, which take their time to start, half of the stops."""
    table = []
    for loader, workers in itertools.product([*SAMPLERS, *ITERABLE_DATASETS, *OTHERS], WORKERS):
        if workers == "alone":
            table += [Cell(loader, workers, epoch, ranks) for epoch in range(1, EPOCHS + 1) for ranks in RANKS]
        elif loader not in OTHERS:
            table += [Cell(loader, workers, epoch, ranks) for epoch in (2, 3) for ranks in ((1, 1), (2, 1))]
    return table


def make_loader(cell: Cell, rank: int, ranks: int) -> Any:
    """What a user's script makes in every process."""
    how = WORKERS[cell.workers]
    if cell.loader in SAMPLERS:
        return DataLoader(Numbers(), **SAMPLERS[cell.loader](rank, ranks), **how)
    if cell.loader in ITERABLE_DATASETS:
        return DataLoader(ITERABLE_DATASETS[cell.loader](), batch_size=BATCH, **how)
    return OTHERS[cell.loader](rank, ranks)


def start(cell: Cell, ranks: int, agreed: list[int] | None = None, asked: list[list[int]] | None = None) -> list[Any]:
    """The sources of all ranks of processes that have just started.

    Args:
        agreed: what the ranks have agreed on so far; None: they agree now.
        asked: takes what each rank has passed when they were to agree.
    """
    from llm_trainer.data.loaders import LoaderSteps

    if agreed is None:
        agreed = agree(cell, ranks)
    random.seed()
    np.random.seed()
    torch.seed()
    sources = []
    for rank in range(ranks):
        values: list[int] = []

        def largest(number: int, values: list[int] = values) -> int:
            values.append(number)
            return agreed[len(values) - 1] if len(values) <= len(agreed) else number

        how = {"accumulation": PER_STEP // ranks, "rank": rank, "world_size": ranks, "seed": 11, "largest": largest}
        loader = make_loader(cell, rank, ranks)
        sources.append(LoaderSteps(loader, is_sharded=cell.loader == "deals_itself", **how))
        if asked is not None:
            asked.append(values)
    return sources


def agree(cell: Cell, ranks: int) -> list[int]:
    """What ranks find out together up to their first step: they are asked again and again, one answer more each time."""
    agreed: list[int] = []
    answers = (
        1 if cell.loader in DEALING else 3
    )  # the seed; whether they draw the same, by the largest and the smallest
    for _ in range(answers if ranks > 1 else 0):
        asked: list[list[int]] = []
        for source in start(replace(cell, workers="alone"), ranks, agreed, asked):
            with suppress(ValueError):
                next(source.steps(0, 0), None)
        agreed.append(max(values[len(agreed)] for values in asked))
    return agreed


Seen = list[Counter]  # of every epoch: how often each sample came


def train(
    sources: list[Any], epoch: int, position: int, seen: Seen, stop: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Train on to the end, or to a number of steps in an epoch; the epoch and position where that is."""
    for number in range(epoch, EPOCHS):
        steps = zip(*[source.steps(number, position) for source in sources], strict=True)
        for count, step in enumerate(steps, start=1):
            assert len({after for _, after in step}) == 1, "ranks stand at different positions"
            for micro_batches, after in step:
                position = after
                for micro_batch in micro_batches:
                    if micro_batch.counts:
                        seen[number].update(micro_batch.batch.flatten().tolist())
            disturb(3)
            if (number, count) == stop:
                return number, position
        position = 0
    return EPOCHS, 0


def whole(cell: Cell) -> Seen:
    """What is seen without a stop."""
    seen: Seen = [Counter() for _ in range(EPOCHS)]
    train(start(cell, cell.ranks[0]), 0, 0, seen)
    return seen


def play(cell: Cell) -> tuple[Seen, str]:
    """What is seen with a stop, and why it was refused."""
    seen: Seen = [Counter() for _ in range(EPOCHS)]
    try:
        sources = start(cell, cell.ranks[0])
        epoch, position = train(sources, 0, 0, seen, stop=(cell.epoch - 1, 2))
        states = [json.loads(json.dumps(source.state_dict())) for source in sources]
        resumed = start(cell, cell.ranks[1])
        for rank, source in enumerate(resumed):  # really they all get one state, and agree about it
            source.load_state_dict(states[rank if cell.ranks == (2, 2) else 0])
        train(resumed, epoch, position, seen)
    except ValueError as error:
        return seen, str(error)
    return seen, ""


def verdict(cell: Cell, seen: Seen, refusal: str, expected: Seen) -> str:
    """What is wrong with a cell in which this was seen, or that was refused so; nothing where it is right."""
    if is_refused(cell):
        words = REFUSED[cell.loader][0]
        return "" if re.search(words, refusal) else f"not refused, or in other words: {refusal!r}"
    if refusal:
        return f"refused: {refusal}"
    return "" if seen == expected else f"epochs seen alike: {[a == b for a, b in zip(seen, expected, strict=True)]}"


def is_refused(cell: Cell) -> bool:
    """Whether a cell is to be refused by name."""
    return cell.ranks in REFUSED.get(cell.loader, ("", []))[1]


def play_all(wanted: list[Cell]) -> dict[str, str]:
    """What is wrong, by cell."""
    wholes: dict[tuple, Seen] = {}
    wrong = {}
    for cell in wanted:
        key = cell.loader, cell.workers, cell.ranks[0], is_refused(cell)
        if key not in wholes:
            wholes[key] = [] if is_refused(cell) else whole(cell)
        found = verdict(cell, *play(cell), wholes[key])
        if found:
            wrong[str(cell)] = found
    return wrong


def main(loader: str = "", workers: str = "") -> None:
    """Without arguments: start a process for each kind of loader, which must end by itself, and report all of them."""
    if loader:
        torch.set_num_threads(1)
        wanted = [cell for cell in cells() if (cell.loader, cell.workers) == (loader, workers)]
        print(json.dumps(play_all(wanted)))
        return
    began, wrong, ended = time.monotonic(), dict[str, str](), 0
    for kind in dict.fromkeys((cell.loader, cell.workers) for cell in cells()):
        command = [sys.executable, __file__, *kind]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        ended += 1
        wrong |= json.loads(done.stdout) if done.returncode == 0 else {str(kind): done.stderr[-2000:]}
        assert set(done.stderr.split()) == set() or done.returncode, done.stderr
    refused = sum(map(is_refused, cells()))
    report = {"cells": len(cells()), "refused": refused, "processes": ended, "wrong": wrong}
    print(json.dumps(report | {"minutes": round((time.monotonic() - began) / 60, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
