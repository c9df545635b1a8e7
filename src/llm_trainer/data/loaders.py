"""Optimizer steps over a user's own loader: a DataLoader, a list, anything that gives ready micro-batches."""

import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from itertools import chain
from typing import Any, Literal

from torch.utils.data import BatchSampler, DataLoader, Subset

from llm_trainer.data.collate import can_be_cut, row_lengths, take_rows
from llm_trainer.data.draws import Drawn, Draws
from llm_trainer.data.order import fingerprint
from llm_trainer.data.packing import cut_by_length, cut_by_tokens
from llm_trainer.data.stream import Batch, RowOfStep, StepSource
from llm_trainer.layout import AS_IT_CAME, Layout
from llm_trainer.state import MicroBatch


@dataclass(eq=False, repr=False)
class LoaderSteps:
    """Steps over any iterable of ready micro-batches.

    Position counts micro-batches over all ranks. Rank r takes micro-batches r, r + world size, ... of each step, unless the
    loader deals to ranks by itself; then position counts those of each rank. Of a map-style DataLoader only this rank's
    micro-batches are loaded, and none that come before the position. Other iterables are read up to the position, and by
    every rank.

    The order is a function of (seed, epoch): samplers get generators of their own, and what draws from Python's, numpy's or
    torch's global ones sees them seeded. What was drawn has a fingerprint, which checkpoints hold: an order that does not
    come back is an error.

    Args:
        loader: gives batches each time it is iterated.
        accumulation: micro-batches per step and rank.
        is_sharded: the loader deals to ranks by itself. That a sampler with `num_replicas` does is seen without.
        read_once: it is only read once, so it may be a generator.
        name: for messages.
        in_step: every rank gets as many steps as the others, though its share of a loader that deals by itself be shorter.
        largest: the largest number that any rank passes.
        sides: answers of a sample, which a joined batch holds one after the other (`algorithm.Algorithm.sides`).
        layout: how the rows of a micro-batch will be laid out, by whoever takes them; it says by what they are cut.

    Raises:
        ValueError: the loader cannot be read as often as it must be.
    """

    loader: Iterable[Batch]
    _: KW_ONLY
    accumulation: int = 1
    rank: int = 0
    world_size: int = 1
    micro_batch_tokens: int | Literal["auto"] | None = "auto"
    seed: int = 0
    is_sharded: bool = False
    read_once: bool = False
    name: str = "train_loader"
    in_step: bool = True
    largest: Callable[[int], int] = lambda number: number
    sides: int = 1
    layout: Layout = AS_IT_CAME
    deals: bool = True  # False: every rank gets all micro-batches of a step

    def __post_init__(self) -> None:
        self._must_cut = isinstance(self.micro_batch_tokens, int)  # the user said so: what cannot be cut is an error
        if not self.read_once:
            _require_rereadable(self.loader, self.name)
        self._draws = Draws(self.loader, self.rank, self.world_size, self.seed, self.is_sharded, self.deals)
        self._order = self._draws.order
        self._order.seed = self.largest(self._order.seed)  # generators may be seeded otherwise on every rank
        self.deals_itself, self._ranks = self._draws.deals_itself, self._draws.dealt_among
        self._has_given = False
        self._drawn = (0, 0)  # position, and the fingerprint of what was drawn up to it
        # Of the checkpoint that this run goes on from: position, and the fingerprints of all ranks.
        self._expected = (0, 0, 0)

    def size(self) -> int | None:
        loader: Any = self.loader if self._draws.sampler is None else self._draws.sampler
        try:
            return len(loader)
        except TypeError:
            return None

    def num_steps(self) -> int | None:
        size = self.size()
        return None if size is None else math.ceil(size / (self.accumulation * self._ranks))

    def num_rows(self) -> tuple[int, int] | None:
        """Rows of an epoch, and of each of its steps over all ranks; None where the loader does not say."""
        batch_sampler = self._draws.sampler
        if not isinstance(batch_sampler, BatchSampler) or self.deals_itself:
            return None
        sampler: Any = batch_sampler.sampler
        try:
            rows = len(sampler)
        except TypeError:
            return None
        if batch_sampler.drop_last:
            rows -= rows % batch_sampler.batch_size
        return rows, batch_sampler.batch_size * self.accumulation * self._ranks

    # What a position means.

    def state_dict(self) -> dict[str, Any]:
        """What must be alike, or is taken over, where a run goes on from a position; all ranks ask together."""
        position, printed = self._drawn
        return {**self._facts(), "order": self._order.seed, "drawn": [position, *self._of_all_ranks(printed)]}

    def _facts(self) -> dict[str, int | None]:
        batch_sampler = self._draws.sampler
        rows = batch_sampler.batch_size if isinstance(batch_sampler, BatchSampler) else None
        return {"rows": rows, "ranks": self.world_size if self.deals_itself else None}

    def _of_all_ranks(self, printed: int) -> tuple[int, int]:
        """Fingerprints of a loader that gives every rank something else: the largest and the smallest."""
        return (self.largest(printed), -self.largest(-printed)) if self.deals_itself else (printed, printed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the run that gave `state_dict`.

        Raises:
            ValueError: its positions meant something else.
        """
        if "order" not in state:
            raise ValueError(
                f"was made by an earlier version, which drew the order of {self.name} otherwise, so its position means "
                f"nothing; expected one of this version. Finish the run with that version, or start a new one with these "
                f"weights (init_weights_path)"
            )
        now = self._facts()
        rows, ranks = state["rows"], state["ranks"]
        if rows != now["rows"]:
            raise ValueError(
                f"counts its position in micro-batches of {rows} rows, and those of {self.name} have {now['rows']} now; "
                f"expected the same batch_size, because other rows would be next. Set batch_size={rows}; "
                f"micro_batch_tokens cuts smaller micro-batches out of them"
            )
        if ranks != now["ranks"]:
            was, here = _dealing(ranks), _dealing(now["ranks"])
            raise ValueError(
                f"was made with a {self.name} that was {was}, and now it is {here}, so its position means nothing; expected "
                f"the same number of ranks. Only a loader that gives all ranks the same batches, or torch's "
                f"DistributedSampler, can go on with another number"
            )
        self._order.seed = state["order"]
        self._expected = tuple(state["drawn"])

    # Steps.

    def steps(self, epoch: int, position: int = 0) -> Iterator[tuple[list[MicroBatch], int]]:
        steps = self._draws.steps(epoch, position, self.accumulation, self._check_seek)
        try:
            drawn = next(steps, None)
            self._check_beginning(drawn, position)
            last: Batch = None
            while self._goes_on(drawn):
                if drawn is None:  # other ranks of a loader that deals by itself have more
                    last = self._any_batch() if last is None else last
                    drawn = Drawn([last], False, self.accumulation, self._drawn[1])
                last = drawn.batches[-1]
                position += self.accumulation if self.deals_itself else drawn.number
                self._drawn = (position, drawn.fingerprint)
                if drawn.counts:
                    yield [MicroBatch(batch) for batch in self._recut(drawn.batches)], position
                else:
                    yield [MicroBatch(last, counts=False)], position  # keeps this rank in step with the others
                drawn = next(steps, None)
        finally:
            self._order.end()

    def _goes_on(self, drawn: Drawn | None) -> bool:
        """Whether there is another step, for this rank or for others of a loader that deals by itself."""
        has_more = int(drawn is not None)
        if self.deals_itself and self.in_step:
            has_more = self.largest(has_more)
        return bool(has_more)

    def _any_batch(self) -> Batch:
        """A batch for a rank that has had none since it went on, while others have more."""
        for batch in self.loader:
            return batch
        raise ValueError(
            f"{self.name} deals to ranks by itself and gives rank {self.rank} no micro-batch at all; expected at least one "
            f"for each of {self.world_size} ranks. Use fewer ranks, or deal smaller pieces"
        )

    # What is refused.

    def _check_beginning(self, drawn: Drawn | None, position: int) -> None:
        """
        Raises:
            ValueError: there is nothing, or not the same for all ranks among which it is to be dealt.
        """
        printed = 0 if drawn is None else drawn.fingerprint
        if self._ranks > 1:
            seen = fingerprint(_some_rows_of(self.loader), printed)
            if self.largest(seen) != -self.largest(-seen):
                raise ValueError(
                    f"{self.name} gives other batches on rank {self.rank} than on others; expected the same on all "
                    f"{self.world_size} ranks, which each take their share of them. If it deals rows to ranks by itself, "
                    f"pass loader_is_sharded=True; otherwise {self._culprit} draws from something that is not seeded alike"
                )
        has_any = int(drawn is not None)
        if self.deals_itself:
            has_any = self.largest(has_any)
        if not has_any and not position:
            how = "an earlier pass over it gave some: it can be read only once" if self._has_given else "it is empty"
            raise ValueError(
                f"{self.name} gave no micro-batch, {how}; expected at least one each time it is read. Give a DataLoader, a "
                f"list, or an object whose __iter__ begins anew, and look at drop_last and at filters"
            )
        self._has_given = True

    def _check_seek(self, position: int, printed: int) -> None:
        """
        Raises:
            ValueError: what comes before the position is not what the run was trained on.
        """
        then, *expected = self._expected
        self._expected = (0, 0, 0)
        if not position or then != position or tuple(expected) == self._of_all_ranks(printed):
            return
        dealing = " or it deals rows to ranks by itself, which loader_is_sharded=True says;" if self._ranks > 1 else ""
        raise ValueError(
            f"{self.name} does not give again what the checkpoint was trained on: its first {position} micro-batches are "
            f"others now, so that samples would be lost and repeated. Expected an order that follows from the seed and the "
            f"epoch. Likely causes: other data or another batch size;{dealing} or {self._culprit} draws from something that "
            f"is not seeded: let it draw from an attribute `generator`, from Python's, numpy's or torch's global generator, "
            f"or write set_epoch(epoch). For a new run with these weights set init_weights_path to the checkpoint"
        )

    @property
    def _culprit(self) -> str:
        """Who has the last word about the order."""
        return type(self._order.drawers[-1]).__name__

    def rows_of_step(self, epoch: int, position: int, micro_batches: list[MicroBatch]) -> list[list[RowOfStep]]:
        batches = [micro_batch.batch for micro_batch in micro_batches]
        if not can_be_cut(batches) and not self._must_cut:
            return []
        rows = []
        for number, batch in enumerate(batches, start=1):
            costs, _ = row_lengths(batch, self.sides, flat=not self.layout.counts_padding)
            place = f"of micro-batch {number} of {self.name} after position {position}, in epoch {epoch + 1}"
            rows.append([RowOfStep(cost, f"row {row} {place}") for row, cost in enumerate(costs, start=1)])
        return rows

    def recut(self, micro_batches: list[MicroBatch]) -> list[MicroBatch]:
        if not micro_batches[0].counts:
            return micro_batches
        # NOTE: what was loaded ahead is cut when its step comes, so nothing has to be read again.
        batches = self._recut([micro_batch.batch for micro_batch in micro_batches])
        return [MicroBatch(batch) for batch in batches]

    def _recut(self, batches: list[Batch]) -> list[Batch]:
        """The rows of a step cut anew; the optimisation does not notice.

        Into micro-batches of at most `micro_batch_tokens`; or, where the layout says so, into as many as came, with rows of
        similar length together. What was not asked for leaves batches that it does not know as they came.
        """
        budget = self.micro_batch_tokens if isinstance(self.micro_batch_tokens, int) else None
        regroups = self.layout.by_length and len(batches) > 1
        if budget is None and not regroups:
            return batches
        if not self._must_cut and not can_be_cut(batches):
            return batches

        # 1. what there is: samples, what each costs, and the rows of each
        costs, sizes, rows = list[int](), list[int](), []
        for number, batch in enumerate(batches):
            found, lengths = row_lengths(batch, self.sides, flat=not self.layout.counts_padding)
            costs += found
            sizes.append(len(found))
            for sample in range(len(found)):
                rows.append([(number, row, lengths[row]) for row in range(sample, len(lengths), len(found))])

        # 2. which samples come together, and their rows: all first answers before all second ones
        if budget is None:
            groups = cut_by_length(costs, sizes)
        else:
            groups = cut_by_tokens(costs, budget, not self.layout.counts_padding)
        if not self._must_cut and len(batches) == len(groups) == 1:
            return batches  # it fits as it came
        recut = []
        for group in groups:
            by_side = zip(*(rows[sample] for sample in group), strict=True)
            recut.append(take_rows(batches, list(chain.from_iterable(by_side))))
        return recut


def _dealing(ranks: int | None) -> str:
    return "dealt out by position" if ranks is None else f"dealt to {ranks} ranks by itself"


def _some_rows_of(loader: Any) -> list[Any]:
    """What a loader's indices are indices of, as far as it says: a part of a dataset may be another on every rank."""
    if not isinstance(loader, DataLoader) or not isinstance(loader.dataset, Subset):
        return []
    rows = loader.dataset.indices
    return [len(rows), *rows[:: max(1, len(rows) // 1000)]]


def _require_rereadable(loader: Any, name: str) -> None:
    """
    Raises:
        ValueError: the loader is an iterator of Python's own, such as a generator, which can be read only once.
    """
    begins_anew = isinstance(getattr(type(loader), "__iter__", None), types.FunctionType)
    if isinstance(loader, Iterator) and not begins_anew:
        raise ValueError(
            f"{name} is a {type(loader).__name__}, which can be read only once, and it is read again in every epoch and "
            f"evaluation. Give a list, a DataLoader, or an object whose __iter__ begins anew; a {type(loader).__name__} "
            f"can train with max_epochs=1 or with max_steps"
        )


def as_step_source(loader: Any, **options: Any) -> StepSource:
    """`loader` itself when it already yields steps, else steps over its micro-batches (options of `LoaderSteps`).

    Raises:
        ValueError: it cannot be read as it must be.
    """
    if not isinstance(loader, StepSource):
        name = options.get("name", "train_loader")
        if not hasattr(type(loader), "__iter__") and not hasattr(type(loader), "__getitem__"):
            raise TypeError(
                f"{name}: got {type(loader).__name__}, expected an iterable of micro-batches, such as a DataLoader or a list"
            )
        return LoaderSteps(loader, **options)
    if options.get("is_sharded"):
        raise ValueError(
            f"loader_is_sharded=True: found a {type(loader).__name__}, which deals by its own `rank` and `world_size`; "
            "expected a loader of yours. Leave loader_is_sharded out"
        )
    return loader
