"""One pass without gradients over a dataset: numbers of every row, or of each of its tokens, on any engine, for every rank."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.config.errors import counted
from llm_trainer.data.packing import cut_by_tokens
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.out_of_memory import OutOfMemoryError, is_out_of_memory, let_go, release
from llm_trainer.state import Stopped

TOKENS = 4096  # of a micro-batch where nobody says; without gradients it holds the activations of one layer at a time

Columns = dict[str, list[np.ndarray]]
Collate = Callable[[list[Any]], Any]  # rows -> batch
Function = Callable[[Any], Mapping[str, Tensor]]  # batch -> numbers by name


class RowsOfKnownLengths(Protocol):
    """A map from index to row."""

    # [rows], tokens; and `costs`, what a budget counts, where that is more; and `place(index)`, for messages, where it has one
    lengths: Any

    def __getitem__(self, index: int) -> Any: ...


class _Failure(NamedTuple):
    """A micro-batch that did not fit into a rank's memory."""

    rows: int
    tokens: int  # with padding
    said: str
    place: str = ""  # where a single row comes from, as far as its dataset says

    def __str__(self) -> str:
        rows = self.place or counted(self.rows, "row")
        return f"{rows} of {self.tokens:,} tokens with padding ({self.said})"


class Scoring:
    """Runs a function over the rows of a dataset, each rank its share of them.

    Micro-batches are cut of the whole dataset, rows of similar length together, and then dealt to the ranks: what a row is
    scored together with depends on the budget, and not on the number of ranks.

    Args:
        engine: in whose precision, and in lockstep with the other ranks where it needs that.
        module: that is called, in evaluation mode.
        tokens: of a micro-batch, counted with padding; None: `TOKENS`. Where they do not fit, half of them.
        say: called with a line in that case.
        stop_requested: whether this process has been asked to stop.
    """

    def __init__(
        self,
        engine: Engine,
        module: nn.Module,
        tokens: int | None = None,
        say: Callable[[str], None] = lambda line: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine, self._module = engine, module
        self._tokens = tokens or TOKENS
        self._say, self._stop_requested = say, stop_requested

    @torch.no_grad()
    def __call__(self, dataset: RowsOfKnownLengths, collate: Collate, function: Function) -> Columns:
        """See `machine.Machine.score`."""
        lengths = np.asarray(dataset.lengths)
        if not len(lengths):
            return {}
        with in_evaluation(self._module):
            while True:
                costs = getattr(dataset, "costs", lengths)  # images are seen too
                groups = cut_by_tokens(costs.tolist(), self._tokens, flat=False)
                found, failure = self._own_share(groups, dataset, collate, function)
                if not self._is_cut_smaller(failure):
                    return _joined(dist.gather_patiently(found), groups, len(lengths))

    def _own_share(
        self, groups: list[list[int]], dataset: RowsOfKnownLengths, collate: Collate, function: Function
    ) -> tuple[list[Columns], _Failure | None]:
        """The numbers of this rank's micro-batches, or of those before one that did not fit.

        Raises:
            Stopped: a rank has been asked to stop; on all ranks.
            OutOfMemoryError: one did not fit, and the other ranks wait inside of it.
        """
        engine, lengths = self._engine, np.asarray(dataset.lengths)
        found: list[Columns] = []
        failure = None
        stop = False
        for first in range(0, len(groups), dist.world_size()):
            number = first + dist.rank()
            is_filler = number >= len(groups)
            stop = self._stop_requested()
            if engine.in_lockstep:
                stop = bool(dist.largest(int(stop), engine.device))
            if stop or (is_filler and not engine.in_lockstep):
                break
            group = groups[min(number, len(groups) - 1)]
            dist.reached(f"scoring {len(lengths)} rows, micro-batch {number + 1} of {len(groups)}")
            values, failure = self._values_of(group, dataset, collate, function)
            if failure is not None:
                break
            if not is_filler:
                found.append(by_row(values, lengths[group].tolist()))
        if any(dist.gather_patiently(stop)):
            raise Stopped
        return found, failure

    def _values_of(
        self, group: list[int], dataset: RowsOfKnownLengths, collate: Collate, function: Function
    ) -> tuple[Mapping[str, Tensor], _Failure | None]:
        engine, said = self._engine, ""
        try:
            batch = collate([dataset[row] for row in group])
            with engine.precision(), engine.together():
                return function(batch), None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            said = let_go(error)
        tokens = len(group) * int(np.asarray(dataset.lengths)[group].max())
        failure = _Failure(len(group), tokens, said, _place_of(group, dataset))
        if engine.in_lockstep:
            raise OutOfMemoryError(
                f"scoring ran out of memory: {failure}. With engine {engine.name} the ranks cannot try again; expected a "
                f"micro-batch that fits: set data_loader_config.micro_batch_tokens to {max(1, tokens // 2)} or less, or "
                f"truncate long rows"
            )
        release(engine.device)
        return {}, failure

    def _is_cut_smaller(self, failure: _Failure | None) -> bool:
        """Whether all ranks go again, with fewer tokens, because one of them has failed.

        Raises:
            OutOfMemoryError: a single row did not fit; on all ranks.
        """
        failures = [found for found in dist.gather_patiently(failure) if found is not None]
        if not failures:
            return False
        said = "; ".join(map(str, failures))
        if min(found.rows for found in failures) == 1:
            raise OutOfMemoryError(
                f"scoring ran out of memory: {said}. A single row cannot be cut; expected rows that fit: a smaller "
                f"dataset_block_size with truncation, or engine: fsdp, which divides the weights among processes"
            )
        self._tokens = max(1, min(found.tokens for found in failures) // 2)
        self._say(
            f"scoring ran out of memory: {said}. It is done again with at most {self._tokens:,} tokens in a micro-batch"
        )
        return True


@contextmanager
def in_evaluation(module: nn.Module) -> Iterator[None]:
    """The context in which nothing in `module` drops out; after it each part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, was_training in modes:
            part.training = was_training


def by_row(values: Mapping[str, Tensor], lengths: Sequence[int]) -> Columns:
    """Numbers of a micro-batch, apart for each of its rows.

    Args:
        values: by name, `[rows]`; or of every token, `[rows, T]` with padding on the right or `[1, tokens]` laid flat.
        lengths: tokens of each row.

    Raises:
        ValueError: they have another shape.
    """
    bounds = np.cumsum(lengths)[:-1]
    columns: Columns = {}
    for name, value in values.items():
        if value.is_floating_point() and value.dtype != torch.float64:
            value = value.float()  # numpy has no bfloat16
        array = value.cpu().numpy()
        if array.shape == (len(lengths),):
            columns[name] = [np.asarray(number) for number in array]
        elif array.shape == (1, sum(lengths)):
            columns[name] = np.split(array[0], bounds)
        elif array.ndim == 2 and len(array) == len(lengths) and array.shape[1] >= max(lengths):
            columns[name] = [row[:length] for row, length in zip(array, lengths, strict=True)]
        else:
            raise ValueError(
                f"score: '{name}' has the shape {list(array.shape)}, of {len(lengths)} rows with {sum(lengths)} tokens, the "
                f"longest {max(lengths)}; expected [rows], [rows, T] with padding on the right, or [1, tokens]"
            )
    return columns


def _place_of(group: list[int], dataset: RowsOfKnownLengths) -> str:
    """Where the row of a micro-batch of one comes from, for messages; empty if there are several, or nobody knows."""
    place = getattr(dataset, "place", None)
    return str(place(group[0])) if place is not None and len(group) == 1 else ""


def _joined(everywhere: list[list[Columns]], groups: list[list[int]], num_rows: int) -> Columns:
    """What the processes have found, each of the micro-batches that were dealt to it, in the order of the dataset."""
    neighbours = len(everywhere) // dist.world_size()  # processes that have scored the same rows
    columns: Columns = {}
    for rank, found in enumerate(everywhere[::neighbours]):
        for group, values in zip(groups[rank :: dist.world_size()], found, strict=True):
            for name, arrays in values.items():
                column = columns.setdefault(name, [np.empty(0)] * num_rows)
                for row, array in zip(group, arrays, strict=True):
                    column[row] = array
    return columns
