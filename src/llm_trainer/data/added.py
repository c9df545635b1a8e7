"""Steps of one source, to each of which a step of another is added: rows with a loss of their own."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

from llm_trainer.data.stream import Amended, RowOfStep, StepSource
from llm_trainer.machine import Machine
from llm_trainer.state import MicroBatch


class Added(Amended):
    """The steps of a source, each with the next step of further rows before it; these begin anew when they end.

    A position is that of the first source. Where the further rows stand follows from the number of optimizer steps, and is
    in every checkpoint, so a step that is taken again, or by other ranks, has the same rows.

    Args:
        source: of the steps.
        added: of the further rows.
        loss: what learns from them (`Algorithm._further_losses`).
        machine: of the run.
    """

    def __init__(self, source: StepSource, added: StepSource, loss: str, machine: Machine) -> None:
        super().__init__(source, self._add)
        self.added, self._loss, self._machine = added, loss, machine
        # Optimizer steps done: epoch and position of the rows that come next.
        self._places: dict[int, tuple[int, Any]] = {}
        self._steps: Iterator[tuple[list[MicroBatch], Any]] = iter(())
        self._stands: tuple[int, Any] | None = None  # where `_steps` goes on

    @property
    def micro_batch_tokens(self) -> int | Literal["auto"] | None:
        """That of both sources."""
        return self.source.micro_batch_tokens

    @micro_batch_tokens.setter
    def micro_batch_tokens(self, tokens: int | Literal["auto"] | None) -> None:
        self.source.micro_batch_tokens = self.added.micro_batch_tokens = tokens

    def _place(self) -> tuple[int, Any]:
        """Epoch and position of the rows that the next optimizer step gets."""
        assert not self._places or self._machine.step in self._places
        return self._places.get(self._machine.step, (0, 0))

    def _add(self, micro_batches: list[MicroBatch]) -> None:
        """Put the further rows of the step that comes before its own."""
        step, place = self._machine.step, self._place()
        if self._stands != place:  # the run has begun, or a step is taken again
            self._steps = self.added.steps(*place)
        epoch, _ = place
        found = next(self._steps, None)
        if found is None:
            epoch += 1
            self._steps = self.added.steps(epoch, 0)
            found = next(self._steps, None)
        if found is None:
            raise ValueError(
                f"{self._loss}: the further rows gave no micro-batch in epoch {epoch + 1}; expected at least one"
            )
        added, after = found
        self._stands = following = epoch, after
        self._places = {step: place, step + 1: following}
        micro_batches[:0] = [replace(micro_batch, loss=self._loss) for micro_batch in added]

    # A step that is taken again.

    def _parted(self, micro_batches: list[MicroBatch]) -> tuple[list[MicroBatch], list[MicroBatch]]:
        """Those of the source, and those that were added."""
        own = [micro_batch for micro_batch in micro_batches if not micro_batch.loss]
        return own, [micro_batch for micro_batch in micro_batches if micro_batch.loss]

    def recut(self, micro_batches: list[MicroBatch]) -> list[MicroBatch] | None:
        own, added = self._parted(micro_batches)
        recut, recut_added = self.source.recut(own), self.added.recut(added)
        if recut is None or recut_added is None:
            return None
        return [*(replace(micro_batch, loss=self._loss) for micro_batch in recut_added), *recut]

    def rows_of_step(self, epoch: int, position: Any, micro_batches: list[MicroBatch]) -> list[list[RowOfStep]]:
        own, added = self._parted(micro_batches)
        rows = self.source.rows_of_step(epoch, position, own)
        rows_added = self.added.rows_of_step(*self._place(), added)
        return [*rows_added, *rows] if rows and rows_added else []

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        added = {"step": self._machine.step, "place": self._place(), "size": self.added.size()}
        return {**self.source.state_dict(), self._loss: {**added, "source": self.added.state_dict()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the run stood that gave `state`; from the first of the further rows if it had none.

        Raises:
            ValueError: its positions mean nothing here.
        """
        self.source.load_state_dict(state)
        self._stands, self._places = None, {}
        added = state.get(self._loss)
        if added is None:
            return
        size = self.added.size()
        if added["size"] != size:
            raise ValueError(
                f"had {added['size']} further rows ({self._loss}), and now there are {size}, so their position means nothing "
                "here. Restore them, or start a new run in another save_dir from these weights (init_weights_path)"
            )
        self.added.load_state_dict(added["source"])
        epoch, position = added["place"]
        self._places = {added["step"]: (epoch, position)}
