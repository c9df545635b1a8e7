"""What an algorithm may ask of the machinery that runs it. `train/machine.py` implements it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from llm_trainer.generation.service import GenerationService
    from llm_trainer.layout import Layout, Packing


class Machine(Protocol):
    """What an algorithm may ask of the machinery that runs it.

    Attributes:
        device: where this process computes.
        precision_name: 'fp32', 'bf16' or 'fp16'.
        dtype: of products in this precision; a copy of the weights that only decodes has it.
        seed: of the run; all noise follows from it.
        step: optimizer steps done.
        max_steps: after which the run ends; None: after its epochs.
        is_distributed: whether several processes train together.
        rank: which part of the data this process sees, from 0.
        world_size: number of these parts.
        process_number: of this process among all, from 0; several may see one part of the data.
        num_processes: that train together.
        is_main: true in the one process that prints and saves.
        save_dir: the folder of the run.
        begins_anew: whether the run has done no step, and is not to go on from anything that lies in `save_dir`.
        layout: whether `_prepare_batch` is to lay padded rows flat (`trainers.answers.lay_flat` does).
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def precision_name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def seed(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def max_steps(self) -> int | None: ...

    @property
    def is_distributed(self) -> bool: ...

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def process_number(self) -> int: ...

    @property
    def num_processes(self) -> int: ...

    @property
    def is_main(self) -> bool: ...

    @property
    def begins_anew(self) -> bool: ...

    @property
    def save_dir(self) -> "Path": ...

    @property
    def layout(self) -> "Layout": ...

    @property
    def shows_images(self) -> bool:
        """Whether rows of the training data may show images; of a user's loader nobody knows, so they may."""

    def stop_requested(self) -> bool:
        """Whether this process has been asked to stop, by a signal; other ranks may not have been yet."""

    def reads_rows(self, try_out: Callable[[], "Packing"]) -> None:
        """Say that a model sees the rows of micro-batches: they are laid flat only if all such models keep them apart.

        Args:
            try_out: finds that out (`models.packing.packing_of`); called in the main process, and only where it matters.
        """

    def place(self, frozen: nn.Module) -> None:
        """Place a frozen module (a reference, a teacher) as the trained one is: sharded and compiled where that is."""

    def follow(self, frozen: nn.Module, weight: float) -> None:
        """Move the weights of a module that was placed towards the trained ones: w <- weight * trained + (1 - weight) * w.

        All ranks call it together. It has the names and shapes of `base_model`; or it is that itself, whose held values move.
        """

    def hold(
        self, parameters: "Mapping[str, nn.Parameter]", caller: nn.Module
    ) -> "Callable[[], AbstractContextManager[None]]":
        """Keep the values that parameters of `base_model` have now: the context in which they have them again, for forwards.

        Checkpoints hold the values, so that a run that goes on has those of where it began.

        Args:
            parameters: by name.
            caller: calls `model` in that context, in its forward; all ranks run that together.
        """

    def generating(self) -> "AbstractContextManager[GenerationService]":
        """The context of a service that draws completions with the trained weights as they are now, on every rank others.

        All ranks enter it together. It has the weights in place where this process holds them, and where they are sharded a
        copy, in the precision of products, for as long as the context lasts.

        Raises:
            ValueError: they are sharded, and `base_model` is none of transformers'.
            WrongWeights: the copy is not what was sent (`generation.verify`).
        """

    def stream_weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The weights of `base_model` as they are now, by their names in its checkpoints, one whole tensor at a time.

        Every rank gets all of them, sharded or not, and all ranks go through them together, to the end. Parameters, frozen
        ones too, and persistent buffers; tied weights once, under their first name. A tensor may be the model's own memory:
        it is read, not written into, and copied by whoever keeps it.

        Args:
            dtype: of the tensors of floating-point numbers; None: the one that the model has.
        """

    def score(
        self, dataset: Any, collate: Callable[[list[Any]], Any], function: Callable[[Any], Mapping[str, Tensor]]
    ) -> "dict[str, list[np.ndarray]]":
        """Numbers of every row of a dataset, or of each of its tokens, by one pass without gradients; all ranks call it.

        Each rank has a share of the micro-batches. They are cut by the token budget of the run, and whatever the number of
        ranks, a row is in the same one. Nothing drops out, and what `function` records is not kept.

        Args:
            dataset: `lengths [rows]` in tokens, and `dataset[index]`; the same on every rank.
            collate: its rows -> a batch, padded on the right, or flat where `layout` is.
            function: a batch -> by name `[rows]`, or of every token what is laid out as the batch is: `[rows, T]` or
                `[1, tokens]`. It calls `model`, or what was placed.

        Returns:
            By name one array for each row, in the order of the dataset, the same on every rank: `[]`, or `[T]` without
            padding.

        Raises:
            Stopped: a rank has been asked to stop (`state.Stopped`); on all ranks.
            OutOfMemoryError: a single row does not fit into memory.
        """

    def weights_hash(self) -> str:
        """Tells the trained weights as they are now from others; all processes ask together, and get the same."""

    def gather(self, value: object) -> list[Any]:
        """The `value` of every process, by its number, however long one of them takes to come here; all must."""

    def checkpoint_steps(self) -> tuple[list[int], list[int]]:
        """Steps of the checkpoints in `save_dir`: of those that rotation leaves, and of the others, such as the best one."""

    def say(self, message: str) -> None:
        """Print, in the main process."""

    @property
    def is_recording(self) -> bool:
        """Whether what an algorithm adds up now counts: not in a filler, nor in a micro-batch that is only tried out."""

    def record(self, name: str, total: Tensor | float, count: Tensor | float = 1.0) -> None:
        """Add to a metric: its logged value is sum of totals / sum of counts, over steps and ranks."""
