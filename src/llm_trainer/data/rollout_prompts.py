"""The prompts of a rollout, which every rank sees: from the rows of files, or from the batches of a user's loader."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_trainer.config.errors import counted
from llm_trainer.data.images import ImageRef
from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.order import fingerprint
from llm_trainer.data.read.errors import Location
from llm_trainer.data.read.messages import image_source
from llm_trainer.data.stream import SampleStream, StepSource
from llm_trainer.data.vision import ImageFormat
from llm_trainer.machine import Machine

IDS = ("prompts", "input_ids")  # a batch has one of them
MASKS = ("prompt_attention_mask", "attention_mask")
IMAGES = "images"  # of a batch: for each prompt those that it shows
OF_RESPONSES = ("responses", "response_attention_mask", "rewards", "old_logprobs", "sampled_logprobs")


@dataclass(frozen=True)
class Prompt:
    """One prompt: what a group of completions begins with.

    Attributes:
        number: in its rollout, from 0.
        ids: `[T]` up to where the policy begins to write.
        answer: the reference answer, if there is one.
        columns: every other column of its row.
        given: completions that came with it and are not to be sampled: for each, its columns of `OF_RESPONSES`, whichever
            there are.
        messages: the prompt before it became ids, for environments; None: not known.
        images: that it shows, in the order of their placeholders among the ids.
        place: where it comes from, for messages about its images.
    """

    number: int
    ids: np.ndarray
    answer: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    given: Sequence[Mapping[str, Any]] = ()
    messages: Sequence[Mapping[str, Any]] | None = None
    images: Sequence[ImageRef] = ()
    place: str = "a prompt"

    def fingerprint(self, before: int) -> int:
        """A number that tells it from others, and what came `before` it."""
        everything = [self.ids.astype(np.int64), str(self.answer), self.columns, list(self.given)]
        if self.images:
            everything.append([image.digest for image in self.images])
        return fingerprint(everything, before)


class Taken(NamedTuple):
    """The prompts of one rollout.

    Attributes:
        prompts: all of them, on every rank.
        after: the position behind them.
    """

    prompts: list[Prompt]
    after: int


class PromptSource:
    """Gives every rank all prompts of a rollout: those of one step of the source that it was given.

    Args:
        source: a `SampleStream` over prompts (`data.kinds.prompts.PromptRows`), or steps over a loader of the user.
        needs_ids: False: environments begin the conversations, and batches need not have prompts.
        images: what counts the images of a loader's batches; None: nothing makes anything of them.

    Attributes:
        source: that prompts are taken from.
        micro_batch_tokens: what the source it was given says of micro-batches.
    """

    def __init__(
        self, source: StepSource, machine: Machine, needs_ids: bool = True, images: ImageFormat | None = None
    ) -> None:
        self._images = images
        self._needs_ids, self.micro_batch_tokens = needs_ids, source.micro_batch_tokens
        if isinstance(source, LoaderSteps):
            source = replace(source, deals=False, micro_batch_tokens=None)
        self.source, self._machine = source, machine
        self._steps: Iterator[Any] = iter(())
        self._stands = (-1, -1)  # epoch and position at which `_steps` goes on

    def take(self, epoch: int, position: int, after: int | None = None) -> Taken | None:
        """The prompts from a position on; None at the end of the epoch. All ranks ask together.

        Args:
            after: where they end; None: as many as a step has.

        Raises:
            ValueError: a batch holds no prompts, or an empty one.
        """
        if isinstance(self.source, SampleStream):
            return self._from_rows(self.source, epoch, position, after)
        return self._from_batches(epoch, position)

    def _from_rows(self, stream: SampleStream, epoch: int, position: int, after: int | None) -> Taken | None:
        stop = min(after or position + stream.rows_per_step, len(stream))
        if position >= stop:
            return None
        prompts: list[Prompt] = []
        for row in stream.order(epoch, position, stop).tolist():
            sample = stream.dataset[row]
            columns = sample.get("row")
            if not isinstance(columns, Mapping):
                columns = {}
            own = Prompt(len(prompts), sample["input_ids"], sample.get("answer"), columns)
            if sample.get("images"):
                own = replace(own, images=tuple(sample["images"]), place=stream.place_of(row))
            prompts.append(replace(own, messages=sample.get("messages")))
        return Taken(prompts, stop)

    def _from_batches(self, epoch: int, position: int) -> Taken | None:
        if self._stands != (epoch, position):
            self._steps = self.source.steps(epoch, position)
        self._stands = (-1, -1)
        step = next(self._steps, None)
        if step is None:
            return None
        micro_batches, after = step
        rows = []
        for micro_batch in micro_batches:
            if micro_batch.counts:
                rows += rows_of(micro_batch.batch, self._needs_ids, self._images)
        if isinstance(self.source, LoaderSteps) and self.source.deals_itself:
            of_ranks = dict(self._machine.gather((self._machine.rank, rows)))
            rows = list(chain.from_iterable(of_ranks[rank] for rank in sorted(of_ranks)))
        self._stands = (epoch, after)
        return Taken(in_groups(rows, self._needs_ids), after)


def rows_of(
    batch: Mapping[str, Any], needs_ids: bool = True, images: ImageFormat | None = None
) -> list[dict[str, Any]]:
    """The rows of a batch of prompts, each with its `ids [T]`, and its element of every other column.

    Args:
        batch: `prompts [B, L]` or `input_ids [B, L]`, padded on either side as `prompt_attention_mask [B, L]` says (without
            it every token counts); and other columns of B elements, such as `answers`. `images`, where there are any: for
            each row those that its placeholders stand for, as paths, bytes, `{"bytes", "path"}` or Pillow's.
        needs_ids: False: it may have other columns alone.
        images: what counts images; None: nobody makes anything of them.

    Raises:
        ValueError: it has none of them, or images and nobody makes anything of them.
        DataError: an image is missing or damaged.
    """
    name = next((name for name in IDS if isinstance(batch, Mapping) and name in batch), None)
    if name is None and isinstance(batch, Mapping) and batch and not needs_ids:
        count = min(len(value) for value in batch.values())
        return rows_of({"prompts": torch.zeros(count, 0, dtype=torch.long), **batch}, images=images)
    if name is None:
        found = type(batch).__name__
        if isinstance(batch, Mapping):
            found = ", ".join(map(str, batch)) or "nothing in it"
        raise ValueError(
            f"a batch of prompts: found {found}; expected prompts [B, L] (or input_ids), with prompt_attention_mask [B, L] "
            "where they are padded; let the loader's collate_fn return them"
        )
    _require_files(batch)
    ids = _ids_of(name, batch[name])
    mask_name = next((mask for mask in MASKS if mask in batch), None)
    mask = torch.ones_like(ids) if mask_name is None else torch.as_tensor(batch[mask_name])
    if mask.shape != ids.shape:
        raise ValueError(
            f"{mask_name}: found the shape {tuple(mask.shape)}, expected that of {name}, {tuple(ids.shape)}: 1 on tokens "
            "and 0 on padding"
        )
    if not len(ids):
        raise ValueError(
            f"{name}: found {tuple(ids.shape)}, a batch without a row; expected at least one prompt: look at filters"
        )
    others = {key: value for key, value in batch.items() if key not in (name, mask_name)}
    for key, value in others.items():
        if len(value) != len(ids):
            raise ValueError(f"{key}: found {len(value)} elements, expected {len(ids)}, one for each row of {name}")
    rows = []
    for row in range(len(ids)):
        columns = {key: _plain(value[row]) for key, value in others.items()}
        made = {"ids": ids[row][mask[row].bool()].cpu().numpy().astype(np.int64), **columns}
        if IMAGES in others:
            made[IMAGES] = _counted(others[IMAGES][row], row, images)
        rows.append(made)
    return rows


def _ids_of(name: str, value: Any) -> Tensor:
    """`[B, L]`.

    Raises:
        ValueError: it is no table of ids.
    """
    try:
        ids = torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name}: found no table of ids ({error}); expected integers [B, L], shorter prompts padded on either side as "
            f"prompt_attention_mask [B, L] says"
        ) from error
    if ids.dim() != 2 or ids.is_floating_point() or ids.is_complex():
        raise ValueError(
            f"{name}: found {ids.dtype} of the shape {tuple(ids.shape)}; expected integers [B, L], a row of ids for each prompt"
        )
    return ids


def _require_files(batch: Mapping[str, Any]) -> None:
    pixels = [key for key in batch if str(key).startswith("pixel_")]
    if pixels:
        raise ValueError(
            f"a batch of prompts with {', '.join(pixels)}, which no rollout can keep; expected images, for each prompt a list "
            f"of paths, of bytes, or of Pillow's images"
        )


def _counted(given: Any, row: int, images: ImageFormat | None) -> tuple[ImageRef, ...]:
    """The images of a row of a batch: a list, or a single one, or None."""
    listed = given if isinstance(given, list | tuple) and not isinstance(given, ImageRef) else [given]
    listed = [image for image in listed if image is not None]
    if listed and images is None:
        raise ValueError(
            f"images: row {row} of a batch of prompts shows {counted(len(listed), 'image')}, and nothing makes tokens and "
            f"numbers of them; expected a vision-language model with its processor (tokenizer=processor), or prompts of text"
        )
    found = []
    for image in listed:
        if not isinstance(image, ImageRef):
            assert images is not None
            where = Location(f"row {row} of a batch of prompts")
            image = images.count(image_source(image, where.at(IMAGES)), None, where.at(IMAGES))
        found.append(image)
    return tuple(found)


def _plain(value: Any) -> Any:
    """A tensor as numbers, so that rows can be sent, compared and kept as text."""
    return value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


def in_groups(rows: Sequence[dict[str, Any]], needs_ids: bool = True) -> list[Prompt]:
    """Prompts, of rows of all ranks in their order; where completions are given, rows with equal prompts are one.

    Raises:
        ValueError: a prompt is empty.
    """
    prompts: list[Prompt] = []
    numbers: dict[bytes, int] = {}
    for row in rows:
        ids = row.pop("ids")
        given = {name: row.pop(name) for name in OF_RESPONSES if name in row}
        images = row.pop(IMAGES, ())
        key = ids.tobytes() + repr([image.digest for image in images]).encode()
        if "responses" in given and key in numbers:
            earlier = prompts[numbers[key]]
            prompts[earlier.number] = replace(earlier, given=[*earlier.given, given])
            continue
        if not len(ids) and needs_ids:
            raise ValueError(
                f"prompt {len(prompts)} of a rollout has no token; expected at least one: leave such rows out, or look at "
                "prompt_attention_mask, which is 1 on tokens"
            )
        numbers[key] = len(prompts)
        answer = row.pop("answers", row.pop("answer", None))
        completions: list[dict[str, Any]] = [given]
        if "responses" not in given:
            completions, row = [], row | given
        prompts.append(Prompt(len(prompts), ids, answer, row, completions, images=images))
    return prompts
