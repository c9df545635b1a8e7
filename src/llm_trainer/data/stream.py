"""The order of samples: a pure function of (seed, epoch) that can be evaluated at any position.

Position is one global count of samples. Step k consumes the same samples whatever the number of ranks, workers or
accumulation steps; resume is a seek, and a changed number of ranks loses and repeats nothing.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from llm_trainer.data.loader_workers import WorkerLife, signals_held
from llm_trainer.data.packing import SharedPrompts, cut_by_length, cut_by_tokens, cut_groups
from llm_trainer.data.read.errors import DataError
from llm_trainer.layout import Layout
from llm_trainer.position import Position
from llm_trainer.state import MicroBatch

Batch = Any
INTERLEAVED = 0x1A7E  # what tells the seed of the order of all files from those of single files
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of SplitMix64 (Steele et al. 2014)


def mix_seeds(*numbers: int) -> int:
    """One well-mixed 63-bit number out of several (SplitMix64, Steele et al. 2014): a seed per (seed, step, rank)."""
    state = 0
    for number in numbers:
        state = (state + number + _GOLDEN) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


class Permutation:
    """A shuffled order of `range(size)` that is evaluated at any index without a table.

    A Feistel network over the next even power of two, walked until it lands inside the range (Black & Rogaway 2002,
    "Ciphers with Arbitrary Finite Domains").
    """

    ROUNDS = 4

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._half = np.uint64(max(1, math.ceil(max(1, size - 1).bit_length() / 2)))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = [np.uint64(mix_seeds(seed, size, i)) for i in range(self.ROUNDS)]

    def _encrypt(self, x: np.ndarray) -> np.ndarray:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            noise = (right + key) * np.uint64(0xBF58476D1CE4E5B9)
            noise = (noise ^ (noise >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((noise >> np.uint64(32)) & self._mask)
        return (left << self._half) | right

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Samples at the positions `index` `[n]`, int64 `[n]`."""
        x = self._encrypt(index.astype(np.uint64))
        while (outside := x >= self.size).any():
            x[outside] = self._encrypt(x[outside])
        return x.astype(np.int64)


class RowOfStep(NamedTuple):
    """A row of a micro-batch, for messages and for whoever cuts it smaller.

    Attributes:
        tokens: that it costs.
        place: where it comes from, in words.
    """

    tokens: int
    place: str


@runtime_checkable
class StepSource(Protocol):
    """What the loop pulls optimizer steps from. `position` counts whatever the source counts, from 0 in every epoch.

    A source that stops because the process was asked to raises `state.Stopped`, on all ranks; one that ends has no more.

    Attributes:
        micro_batch_tokens: what the rows of a step are cut by; it may change between two calls of `steps`. None: they are
            as they come, and with auto too, until somebody sets a number.
    """

    micro_batch_tokens: int | Literal["auto"] | None

    def num_steps(self) -> int | None:
        """Optimizer steps of one epoch; None when unknown."""

    def size(self) -> int | None:
        """The position at the end of an epoch, whatever the number of ranks; None when unknown."""

    def steps(self, epoch: int, position: Any) -> Iterator[tuple[list[MicroBatch], Position]]:
        """Each step's micro-batches for this rank, and the position after it."""

    def rows_of_step(self, epoch: int, position: Any, micro_batches: list[MicroBatch]) -> list[list[RowOfStep]]:
        """The rows of each micro-batch of the step at a position; empty if they cannot be told apart."""

    def recut(self, micro_batches: list[MicroBatch]) -> list[MicroBatch] | None:
        """The rows of a step as `micro_batch_tokens` now says; None: open `steps` anew at its position."""

    def state_dict(self) -> dict[str, Any]:
        """What a position means something for, besides size and seed."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the source that gave `state`; a ValueError says why its positions mean nothing here."""


class Amended:
    """The steps of another source, with something done to their micro-batches when each comes.

    Args:
        source: the other one.
        amend: changes the micro-batches of a step.
    """

    def __init__(self, source: StepSource, amend: Callable[[list[MicroBatch]], None]) -> None:
        self.source, self._amend = source, amend
        self.num_steps, self.size = source.num_steps, source.size

    @property
    def micro_batch_tokens(self) -> int | Literal["auto"] | None:
        """That of the other source."""
        return self.source.micro_batch_tokens

    @micro_batch_tokens.setter
    def micro_batch_tokens(self, tokens: int | Literal["auto"] | None) -> None:
        self.source.micro_batch_tokens = tokens

    def steps(self, epoch: int, position: Any) -> Iterator[tuple[list[MicroBatch], Position]]:
        """The other's steps, each amended when it is asked for."""
        for micro_batches, after in self.source.steps(epoch, position):
            self._amend(micro_batches)
            yield micro_batches, after

    def recut(self, micro_batches: list[MicroBatch]) -> list[MicroBatch] | None:
        """The rows of a step as they are cut now; they are amended already."""
        return self.source.recut(micro_batches)

    def rows_of_step(self, epoch: int, position: Any, micro_batches: list[MicroBatch]) -> list[list[RowOfStep]]:
        """Those of the other source."""
        return self.source.rows_of_step(epoch, position, micro_batches)

    def state_dict(self) -> dict[str, Any]:
        """That of the other source."""
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the other source go on."""
        self.source.load_state_dict(state)


def innermost(source: StepSource) -> StepSource:
    """The source that reads rows, behind those that amend them."""
    while isinstance(source, Amended):
        source = source.source
    return source


class SampleDataset(Protocol):
    """A map from index to sample with known lengths."""

    lengths: np.ndarray  # [number of samples], tokens
    file_sizes: list[int]  # samples of each file; files are visited one after another

    def __getitem__(self, index: int) -> Any: ...


class _Groups(torch.utils.data.Dataset):
    """Lets a DataLoader fetch micro-batches: its "index" is a list of sample indices."""

    def __init__(self, dataset: SampleDataset, collate: Callable[[list], Batch]) -> None:
        self.dataset, self.collate = dataset, collate

    def __getitem__(self, group: Sequence[int]) -> Batch | ValueError:
        """A micro-batch; of a worker also the error that its rows raised, which whoever waits for it raises in its words."""
        try:
            return self.collate([self.dataset[int(i)] for i in group])
        except ValueError as error:
            # NOTE: an exception of a user's own class may not survive the way out of a worker; torch prints it there.
            is_ours = isinstance(error, DataError) or type(error) is ValueError
            if get_worker_info() is None or not is_ours:
                raise
            return error


@dataclass(eq=False, repr=False)
class SampleStream:
    """Steps over a dataset of known lengths, cut into micro-batches by rows or by a token budget.

    `file_weights`: how often each file's samples are visited per epoch; 2.5 is twice all of them and then another half,
    which is another one in every epoch when shuffled. None: once.
    """

    dataset: SampleDataset
    collate: Callable[[list], Batch]  # samples of one micro-batch -> batch
    _: KW_ONLY
    rows_per_step: int  # of one optimizer step over all ranks (micro-batch x accumulation x ranks)
    batch_size: int  # rows of a micro-batch when there is no token budget
    rank: int = 0
    world_size: int = 1
    # Budget of a micro-batch instead of `batch_size`; counts padding unless `flat`. auto: whoever trains sets it.
    micro_batch_tokens: int | Literal["auto"] | None = "auto"
    flat: bool = False  # whether `collate` lays rows end to end
    shared: SharedPrompts | None = None  # what rows have in common that is run once, and counts once in the budget
    layout: Layout | None = None  # that `collate` follows, where somebody has looked what the models make of it
    shuffle: bool = True  # visit each file's samples in an order drawn from (seed, epoch)
    file_weights: Sequence[float] | None = None
    interleave: bool = False  # all files in one order drawn from (seed, epoch), instead of one after another
    easy_first: np.ndarray | None = None  # [number of samples], how hard each is: the easiest first; None: by the above
    easy_epochs: int = 1  # the first epochs, in which this is so
    seed: int = 0
    num_workers: int = 0
    pin_memory: bool = False

    def __post_init__(self) -> None:
        weights = [1.0] * len(self.dataset.file_sizes) if self.file_weights is None else self.file_weights
        pairs = zip(weights, self.dataset.file_sizes, strict=True)
        self.visits = [round(weight * size) or min(1, size) for weight, size in pairs]  # of each file, per epoch
        self._first_visits = np.cumsum([0, *self.visits])  # of each file, and the end
        self._first_samples = np.cumsum([0, *self.dataset.file_sizes])
        # What a token budget counts; a dataset without images need not say it.
        self.costs: np.ndarray = getattr(self.dataset, "costs", self.dataset.lengths)
        self._sorted: tuple[int, np.ndarray] | None = None  # an epoch, and its order from easy to hard

    def __len__(self) -> int:
        return sum(self.visits)

    size = __len__

    @property
    def knows_images(self) -> bool:
        """Whether its dataset says whether rows show images."""
        return getattr(self.dataset, "parts", None) is not None

    @property
    def shows_images(self) -> bool:
        """Whether rows may show images; of a dataset of the user nobody knows, so they may."""
        parts = getattr(self.dataset, "parts", None)
        if parts is None:
            return True
        return any(getattr(part, "tower_tokens", None) is not None for part in parts)

    def num_steps(self) -> int:
        return math.ceil(len(self) / self.rows_per_step)

    def state_dict(self) -> dict[str, Any]:
        """What the order depends on beside seed and epoch; samples are counted, so micro-batches may be cut otherwise."""
        facts: dict[str, Any] = {"shuffle": self.shuffle, "visits": self.visits, "interleave": self.interleave}
        facts["easy_epochs"] = 0
        if self.easy_first is not None:
            facts["easy_epochs"] = self.easy_epochs
            facts["easy_first"] = zlib.crc32(self.easy_first.astype(np.float64).tobytes())
        return facts

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore: an order is that of the seed and the epoch.

        Raises:
            ValueError: the same samples came in another order.
        """
        other = [name for name, value in self.state_dict().items() if state.get(name, value) != value]
        if other and sum(state.get("visits", [])) == len(self):
            raise ValueError(
                f"had its samples in another order ({', '.join(other)} differ), so its position in the data means nothing "
                "here. Restore data_loader_shuffle, file_weights, mixture, file_shares and curriculum, or start a new run in "
                "another save_dir from these weights (init_weights_path)"
            )

    def order(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Indices of the samples at the global positions `[start, stop)` of an epoch."""
        if self.easy_first is not None and epoch < self.easy_epochs:
            return self._from_easy_to_hard(epoch, self.easy_first)[start:stop]
        visits = np.arange(start, stop)
        if self.interleave:
            visits = Permutation(len(self), mix_seeds(self.seed, epoch, INTERLEAVED))(visits)
        return self._visited(epoch, visits)

    def _visited(self, epoch: int, visits: np.ndarray) -> np.ndarray:
        """The sample of each visit `[n]`, counted file after file: indices `[n]`."""
        samples = np.empty_like(visits)
        files = np.searchsorted(self._first_visits, visits, side="right") - 1
        for number in np.unique(files).tolist():
            size = self.dataset.file_sizes[number]
            here = (files == number).nonzero()[0]
            turns, local = np.divmod(visits[here] - self._first_visits[number], size)
            for turn in np.unique(turns).tolist():
                where = here[turns == turn]
                found = local[turns == turn]
                if self.shuffle:
                    found = self._permutation(size, epoch, number, turn)(found)
                samples[where] = self._first_samples[number] + found
        return samples

    def _from_easy_to_hard(self, epoch: int, hardness: np.ndarray) -> np.ndarray:
        """All samples of an epoch, the easiest first; equally easy ones in the order that they would have otherwise."""
        if self._sorted is None or self._sorted[0] != epoch:
            samples = self._visited(epoch, np.arange(len(self)))
            order = np.argsort(hardness[samples], kind="stable")
            self._sorted = epoch, samples[order]
        return self._sorted[1]

    def _permutation(self, size: int, epoch: int, number: int, turn: int) -> Permutation:
        """The order of a file's samples when they are visited for the `turn`-th time in an epoch."""
        again = [turn] if turn else []  # the first turn is the same whatever the weights
        return Permutation(size, mix_seeds(self.seed, epoch, number, *again))

    def _micro_batches(self, rows: np.ndarray) -> list[list[int]]:
        if not isinstance(self.micro_batch_tokens, int):
            starts = range(0, len(rows), self.batch_size)
            if self.layout is None or not self.layout.by_length:
                return [rows[start : start + self.batch_size].tolist() for start in starts]
            sizes = [min(self.batch_size, len(rows) - start) for start in starts]
            groups = cut_by_length(self.dataset.lengths[rows], sizes)
        elif self.shared is not None:
            groups = cut_groups(self.costs[rows], self.shared.of(rows), self.micro_batch_tokens)
        else:
            groups = cut_by_tokens(self.costs[rows].tolist(), self.micro_batch_tokens, self.flat)
        return [rows[group].tolist() for group in groups]

    def _plan(self, epoch: int, position: int) -> Iterator[tuple[list[list[int]], bool, int]]:
        """For each step: this rank's micro-batches as sample indices, whether they are filler, the position after it."""
        while position < len(self):
            stop = min(position + self.rows_per_step, len(self))
            rows = self.order(epoch, position, stop)
            mine = rows[self.rank :: self.world_size]
            is_filler = len(mine) == 0
            if is_filler:
                mine = rows[:1]
            yield self._micro_batches(mine), is_filler, stop
            position = stop

    def steps(self, epoch: int, position: int = 0) -> Iterator[tuple[list[MicroBatch], int]]:
        while position < len(self):
            budget = self.micro_batch_tokens
            for micro_batches, after in self._steps_of_one_budget(epoch, position):
                yield micro_batches, after
                position = after
                if self.micro_batch_tokens != budget:  # an evaluation has run out of memory, and workers are ahead
                    break

    def _steps_of_one_budget(self, epoch: int, position: int) -> Iterator[tuple[list[MicroBatch], int]]:
        groups = chain.from_iterable(step for step, _, _ in self._plan(epoch, position))
        loader: DataLoader = DataLoader(
            _Groups(self.dataset, self.collate),
            batch_size=None,
            sampler=groups,  # type: ignore[arg-type]  # any iterable of "indices" serves
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=WorkerLife(),
        )
        with signals_held():
            batches = iter(loader)
        for step, is_filler, stop in self._plan(epoch, position):
            micro_batches = []
            for _ in step:
                batch = next(batches)
                if isinstance(batch, ValueError):
                    raise batch
                micro_batches.append(MicroBatch(batch, counts=not is_filler))
            yield micro_batches, stop

    def rows_of_step(self, epoch: int, position: int, micro_batches: list[MicroBatch]) -> list[list[RowOfStep]]:
        groups, _, _ = next(self._plan(epoch, position))
        rows = []
        for group in groups:
            rows.append([RowOfStep(int(self.costs[sample]), self.place_of(sample)) for sample in group])
        return rows

    def place_of(self, sample: int) -> str:
        """Where a sample comes from, for messages."""
        place = getattr(self.dataset, "place", "sample {} of the dataset".format)  # a dataset need not know
        return str(place(sample))

    def recut(self, micro_batches: list[MicroBatch]) -> None:
        return None  # a seek is exact
