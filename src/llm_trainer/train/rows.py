"""How a run lays out the rows of its micro-batches: as the user says, or as the models that see them allow."""

from collections.abc import Callable

from llm_trainer.algorithm import Algorithm
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.rollout_source import RolloutSource
from llm_trainer.data.stream import SampleStream, StepSource, innermost
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.layout import AS_IT_CAME, Layout, Packing, choose_layout, given_layout, takes_flat

KEY = "data_loader_config.packing: none"


class LaidOut:
    """The layout of a run, which the models that see its rows have a say in.

    Args:
        wanted: 'auto', 'none' or 'flat', as the user says.
        source: of training data; a stream lays out its own rows.
        trainer: the algorithm.
        engine: whose precision models are tried out in.
        together: whether several processes train together; the main one decides for all.

    Attributes:
        layout: so far.
        shows_images: rows may show images; of a user's loader nobody knows, so they may.

    Raises:
        ValueError: flat rows are asked for, and the algorithm does not take them.
    """

    def __init__(self, wanted: str, source: StepSource, trainer: Algorithm, engine: Engine, together: bool) -> None:
        source = innermost(source)
        self._source, self._engine, self._together = source, engine, together
        self._trainer, self._takes_flat = type(trainer).__name__, takes_flat(type(trainer))
        self._packings: list[Packing] = []
        self.shows_images = True
        if isinstance(source, SampleStream | RolloutSource):
            self.shows_images = source.shows_images
        self.layout: Layout = AS_IT_CAME
        self._is_known = False  # whether the trained model, which comes first, has been tried out before
        self._wanted = wanted
        if wanted == "flat" and not self._takes_flat:
            raise ValueError(
                f"packing='flat': {self._trainer} does not say that it takes flat batches; expected `takes_flat = True` in "
                f"the class that writes its methods. Say it there, or leave packing out"
            )
        if isinstance(source, SampleStream) and wanted != "flat":  # it lays out its rows itself
            is_flat = source.flat
            if source.layout is not None:
                self.layout, self._is_known = source.layout, True
                is_flat = source.layout.flat
            self._wanted = "checked" if is_flat else "none"
        self._settle()

    def reads_rows(self, try_out: Callable[[], Packing]) -> None:
        """Try a model out that sees the rows, if that can change anything; all ranks call it together.

        Raises:
            ValueError: rows are laid flat because the user says so, and this model does not keep them apart.
        """
        is_known, self._is_known = self._is_known, False
        if is_known or self._wanted == "none" or not self._takes_flat:
            return
        packing = None
        if dist.is_main() or not self._together:  # elsewhere there may be no weights
            with self._engine.precision():
                packing = try_out()
        if self._together:
            packing = dist.broadcast_object(packing)
        assert packing is not None
        self._packings.append(packing)
        self._settle()

    def _settle(self) -> None:
        if self._wanted == "checked":
            given_layout(self._packings, "rows laid flat")
        elif self._wanted == "flat":
            self.layout = given_layout(self._packings, "packing='flat'")
        elif self._wanted == "auto":
            are_loaded = isinstance(self._source, LoaderSteps)
            self.layout = choose_layout(self._packings, self._takes_flat, self._trainer, KEY, are_loaded)
        if isinstance(self._source, LoaderSteps):
            self._source.layout = self.layout
