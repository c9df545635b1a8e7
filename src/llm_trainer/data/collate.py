"""Samples of different lengths become one batch: padded on the right, or laid flat without any padding."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch

from llm_trainer.data.kinds import LanguageSample
from llm_trainer.data.vision import ImageFormat
from llm_trainer.image_batch import ImageBatch, of_images
from llm_trainer.layout import Layout

IGNORE = -100  # the label that no loss counts (torch's own convention)


class LanguageBatch(TypedDict):
    """A micro-batch of language modelling, padded `[B, T]` or laid flat `[1, N]`.

    `labels[t]` is the token AT t, -100 where it is not trained on; position 0 of a document never counts.
    `loss_weights[t]` is how much the loss of that token counts, from 0 up: the loss is the mean with these weights.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    attention_mask: NotRequired[torch.Tensor]  # [B, T] 1 on tokens and 0 on padding; absent when flat
    position_ids: NotRequired[torch.Tensor]  # [1, N] restarting at 0 in every document; only when flat
    document_lengths: NotRequired[torch.Tensor]  # [number of documents]; only when flat
    loss_weights: NotRequired[torch.Tensor]  # float32, shaped as labels; absent: every label counts 1
    images: NotRequired[ImageBatch]  # absent where no row has any


def collate_cheaper(
    samples: Sequence[LanguageSample], pad_id: int, pays: Callable[[Sequence[int]], bool]
) -> LanguageBatch:
    """Flat where that `pays` for rows of these lengths, else padded."""
    lengths = [len(sample["input_ids"]) for sample in samples]
    return collate_flat(samples) if pays(lengths) else collate_padded(samples, pad_id)


def laying(
    layout: Layout, pad_id: int, images: ImageFormat | None = None
) -> tuple[bool, Callable[[Sequence[LanguageSample]], LanguageBatch]]:
    """Whether a token budget need not count padding, and what lays out rows as `layout` says, with what they show."""
    need_not_count, lay = layout.flat, collate_flat if layout.flat else partial(collate_padded, pad_id=pad_id)
    if layout.flat and layout.dense_width:
        need_not_count, lay = False, partial(collate_cheaper, pad_id=pad_id, pays=layout.pays)
    if images is not None:
        lay = partial(lay_with_images, lay=lay, images=images)
    return need_not_count, lay


def pad_right(rows: Sequence[np.ndarray], value: int, dtype: type = np.int64) -> torch.Tensor:
    """Rows of `[T_i]` as one tensor `[B, max T_i]` of `dtype`, padded with `value` on the right."""
    out: np.ndarray = np.full((len(rows), max(len(row) for row in rows)), value, dtype=dtype)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(out)


def _labels(sample: LanguageSample) -> np.ndarray:
    """`[T]` labels: the ids where trained, -100 elsewhere and on the first token of every document."""
    labels = np.where(sample["trained"], sample["input_ids"].astype(np.int64), IGNORE)  # unsigned ids hold no -100
    starts = np.cumsum([0, *sample["document_lengths"][:-1]])
    labels[starts] = IGNORE
    return labels


def _weights(samples: Sequence[LanguageSample]) -> list[np.ndarray] | None:
    """One array `[T]` of weights per row; None where all tokens that are trained on weigh the same."""
    if not any("loss_weights" in sample for sample in samples):
        return None
    return [sample.get("loss_weights", np.ones(len(sample["input_ids"]))) for sample in samples]


def collate_padded(samples: Sequence[LanguageSample], pad_id: int = 0) -> LanguageBatch:
    """One row per sample, padded on the right to the longest; padding is masked by length, never by token id."""
    batch = LanguageBatch(
        input_ids=pad_right([s["input_ids"] for s in samples], pad_id),
        labels=pad_right([_labels(s) for s in samples], IGNORE),
        attention_mask=pad_right([np.ones(len(s["input_ids"]), dtype=np.int64) for s in samples], 0),
    )
    weights = _weights(samples)
    if weights is not None:
        batch["loss_weights"] = pad_right(weights, 0, np.float32)
    return batch


def collate_flat(samples: Sequence[LanguageSample]) -> LanguageBatch:
    """All samples end to end in one row `[1, N]`: no padding, attention inside documents only."""
    lengths = np.concatenate([np.asarray(s["document_lengths"], dtype=np.int64) for s in samples])
    batch = LanguageBatch(
        input_ids=torch.from_numpy(np.concatenate([s["input_ids"] for s in samples]).astype(np.int64))[None],
        labels=torch.from_numpy(np.concatenate([_labels(s) for s in samples]))[None],
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        document_lengths=torch.from_numpy(lengths),
    )
    weights = _weights(samples)
    if weights is not None:
        batch["loss_weights"] = torch.from_numpy(np.concatenate(weights).astype(np.float32))[None]
    return batch


def lay_with_images(
    samples: Sequence[LanguageSample], lay: Callable[[Sequence[LanguageSample]], LanguageBatch], images: ImageFormat
) -> LanguageBatch:
    """Rows as `lay` lays them out, and their images, each distinct one opened once.

    Raises:
        DataError: an image is gone, damaged, or another one than when it was counted.
        ValueError: ids have other placeholders than images need.
    """
    batch = lay(samples)
    opened = images.opened([(sample.get("images", ()), sample.get("place", "a row")) for sample in samples])
    expected = 0
    if opened is not None:
        batch["images"] = opened
        expected = opened.num_placeholders
    found = int((batch["input_ids"] == images.image_token_id).sum())
    if found != expected:
        raise ValueError(
            f"a micro-batch has {found:,} placeholders of images, and its images have {expected:,} tokens; expected as many: "
            f"token {images.image_token_id} pads no row, and ids that hold it name their images in image_tags_file_dataset"
        )
    return batch


# The keys of batches that can be taken apart: per token, with the parts that they may come in, and per row.
PARTS = ("", "prompt_", "chosen_", "rejected_", "completion_", "kl_")
PER_TOKEN = ("input_ids", "attention_mask", "labels", "loss_weights", "step_labels")
PER_ROW = ("desirable", "margin", "row_weights", "ref_chosen_logps", "ref_rejected_logps")
KNOWN = {*PER_ROW, *(part + name for part, name in product(PARTS, PER_TOKEN))}


def can_be_cut(batches: Sequence[Any]) -> bool:
    """Whether the rows of a step's batches can be put together anew without a loss that notices.

    They are padded tensors under names that are known here, the same in all of them; nothing is learned from padding; and
    where answers are compared with mismatched ones of their own batch (KTO), they bring these along.
    """
    for batch in batches:
        if not isinstance(batch, Mapping) or batch.keys() != batches[0].keys() or not batch.keys() <= KNOWN:
            return False
        if not all(isinstance(value, torch.Tensor) and value.dim() in (1, 2) for value in batch.values()):
            return False
        if "desirable" in batch and "kl_input_ids" not in batch:
            return False
        if "prompt_input_ids" in batch:
            parts = [name.removesuffix("input_ids") for name in batch if name.endswith("_input_ids")]
            if not all(f"{part}attention_mask" in batch for part in parts):
                return False  # whoever joins them says what is missing
            continue
        labels = batch.get("labels", batch.get("step_labels"))
        if "input_ids" not in batch or (labels is None and "attention_mask" not in batch):
            return False
        positions = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
        if labels is not None and (labels[positions >= _true_lengths(batch)[:, None]] != IGNORE).any():
            return False
    return True


def _true_lengths(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """`[rows]` up to the last attended token, or the full width without a mask."""
    ids = batch["input_ids"]
    if "attention_mask" not in batch:
        return torch.full((len(ids),), ids.shape[1], device=ids.device)
    ends = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    return (batch["attention_mask"].bool() * ends).amax(dim=1).clamp(min=1)


def row_lengths(batch: Mapping[str, torch.Tensor], sides: int = 1, flat: bool = False) -> tuple[list[int], list[int]]:
    """Tokens that each sample of a batch costs, and the true length of each row.

    Where prompt and answers come apart (`prompt_input_ids`, `chosen_input_ids`, ...) a sample is as many rows as there are
    answers, and one that holds them joined has the rows of the first answers before those of the second.

    Args:
        batch: padded.
        sides: answers of a sample where they are joined.
        flat: rows will be laid end to end; else all of a sample are as long as the longest.

    Raises:
        ValueError: the batch is laid flat, so that it is one row, or has images: it cannot be cut.
    """
    if "document_lengths" in batch:
        raise ValueError(
            "micro_batch_tokens: found a batch laid flat (document_lengths), which is one row and cannot be cut; expected "
            "padded batches. Lay fewer documents into each batch, or leave micro_batch_tokens out"
        )
    found = of_images(batch)
    if found:
        raise ValueError(
            f"micro_batch_tokens: found a batch with images ({', '.join(found)}), and only the model knows which rows they "
            "belong to; expected batches of text. Put fewer rows into each batch, or leave micro_batch_tokens out"
        )
    if "prompt_input_ids" in batch:
        masks = [name for name in batch if name.endswith("_attention_mask") and not name.startswith(("prompt_", "kl_"))]
        answers = torch.stack([batch[name].sum(1) for name in masks])  # [answers, B]
        lengths = batch["prompt_attention_mask"].sum(1) + answers
        rows = lengths[0]  # of which there is one per sample, in parts
    else:
        rows = _true_lengths(batch)
        if "step_labels" in batch:  # judged answers are compared with nothing
            sides = 1
        lengths = rows.view(sides, -1)
    costs = lengths.sum(0) if flat else len(lengths) * lengths.amax(0)
    return costs.tolist(), rows.tolist()


def take_rows(
    batches: Sequence[dict[str, torch.Tensor]], rows: Sequence[tuple[int, int, int]]
) -> dict[str, torch.Tensor]:
    """Build one padded batch from rows of several.

    Args:
        batches: padded batches with the same keys, every tensor `[B, T]` or `[B]`. What belongs to `input_ids` is padded
            on the right and cut to the longest row that is taken; what belongs to `<part>_input_ids`, on any side, keeps
            its width. What there is one of for several rows belongs to the first ones.
        rows: (batch, row in it, true length) of each wanted row.
    """
    longest = max(length for _, _, length in rows)
    first = batches[rows[0][0]]
    parts = tuple(key.removesuffix("input_ids") for key in first if key.endswith("_input_ids"))
    out: dict[str, torch.Tensor] = {}
    for key, like in first.items():
        pieces = [batches[b][key][r] for b, r, _ in rows if r < len(batches[b][key])]
        if like.dim() == 1:
            out[key] = torch.stack(pieces)
            continue
        width = max(map(len, pieces)) if parts and key.startswith(parts) else longest
        fill = IGNORE if key.endswith("labels") else 0
        table = like.new_full((len(pieces), width), fill)
        for target, piece in zip(table, pieces, strict=True):
            target[: min(width, len(piece))] = piece[:width]
        out[key] = table
    return out
