"""Answers that are given: prompt and answer joined into rows for the model, and its scores back as one row per answer.

A joined batch is what the language trainers use, `input_ids`, `labels` (-100 on prompt and padding) and either
`attention_mask` or, laid flat, `position_ids` and `document_lengths`. Pairs put all chosen rows before all rejected.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from llm_trainer.losses.language import IGNORE
from llm_trainer.models.frozen import freeze
from llm_trainer.models.scored import scored

if TYPE_CHECKING:
    from llm_trainer.models.scored import TokenScores
    from llm_trainer.trainers.base import BaseTrainer

Batch = dict[str, Tensor]
_INPUTS = ("input_ids", "labels", "attention_mask", "position_ids", "document_lengths")
_PADDING = {"input_ids": 0, "labels": IGNORE, "attention_mask": 0}


def join(batch: Batch, answers: Sequence[str]) -> Batch:
    """Join prompts and answers by their true lengths, whatever side they were padded on.

    Args:
        batch: `prompt_input_ids [B, P]`, and `<answer>_input_ids [B, L]` for each answer, each with its
            `..._attention_mask`; or a batch that is joined already.
        answers: 'chosen' and 'rejected', or 'completion'.

    Returns:
        `input_ids`, `labels`, `attention_mask`, all `[len(answers) * B, T]`, padded on the right, one answer's rows
        after the other's; and every other key of the batch.

    Raises:
        ValueError: a key is missing, or an answer is empty.
    """
    if "labels" in batch:
        rows = batch
    else:
        parts = [f"{part}_{kind}" for part in ("prompt", *answers) for kind in ("input_ids", "attention_mask")]
        if missing := [name for name in parts if name not in batch]:
            raise ValueError(
                f"a batch with the keys {', '.join(batch)} lacks {', '.join(missing)}; expected {', '.join(parts)}, or "
                f"input_ids, attention_mask and labels of prompt and answer already joined"
            )
        sides = [_join_side(batch, answer) for answer in answers]
        width = max(side["input_ids"].shape[1] for side in sides)
        rows = {
            name: torch.cat([F.pad(side[name], (0, width - side[name].shape[1]), value=value) for side in sides])
            for name, value in _PADDING.items()
        } | {name: value for name, value in batch.items() if name not in parts}
    _require_answers(rows, answers)
    return rows


def _join_side(batch: Batch, answer: str) -> Batch:
    prompt, ids = batch["prompt_input_ids"], batch[f"{answer}_input_ids"]
    mask = torch.cat([batch["prompt_attention_mask"], batch[f"{answer}_attention_mask"]], 1).bool()  # [B, P + L]
    order = (~mask).byte().argsort(dim=1, stable=True)[:, : int(mask.sum(1).max())]  # the tokens first, in their order
    present = mask.gather(1, order)
    pieces = {"input_ids": torch.cat([prompt, ids], 1), "labels": torch.cat([torch.full_like(prompt, IGNORE), ids], 1)}
    rows = {name: value.gather(1, order).where(present, _PADDING[name]) for name, value in pieces.items()}
    return rows | {"attention_mask": present.long()}


def _require_answers(rows: Batch, answers: Sequence[str]) -> None:
    empty = (supervised(rows).sum(1) == 0).nonzero().flatten().tolist()
    if empty:
        num_rows = num_answers(rows) // len(answers)
        where = ", ".join(f"{answers[i // num_rows]} of row {i % num_rows}" for i in empty[:3])
        raise ValueError(
            f"a batch holds {len(empty)} answers without a token to learn from ({where}); expected at least one token "
            f"each, after the first of the row. Drop such rows, or cut long prompts instead of the answers behind them"
        )


def num_answers(rows: Batch) -> int:
    """Rows of a joined batch, documents of a flat one."""
    return len(rows["document_lengths"]) if "document_lengths" in rows else len(rows["input_ids"])


def as_rows(values: Tensor, rows: Batch) -> Tensor:
    """`values [1, N]` of a flat batch as `[answers, T]`, 0 behind each row's end; `[B, T]` of a padded one as it is."""
    if "document_lengths" not in rows:
        return values
    return pad_sequence(values[0].split(rows["document_lengths"].tolist()), batch_first=True)


def supervised(rows: Batch) -> Tensor:
    """`[answers, T]` bool: the tokens that are predicted from one before them and whose label is set."""
    mask = as_rows(rows["labels"] != IGNORE, rows)
    return mask & (torch.arange(mask.shape[1], device=mask.device) > 0)


def with_prompts(rows: Batch, chosen: int) -> Batch:
    """The batch whose first `chosen` rows have their prompts as labels too; padding and first tokens still have none."""
    ids = rows["input_ids"]
    if "document_lengths" in rows:
        split = int(rows["document_lengths"][:chosen].sum())
        wanted = (torch.arange(ids.shape[1], device=ids.device) < split)[None] & (rows["position_ids"] > 0)
    else:
        wanted = rows["attention_mask"].bool() & (torch.arange(len(ids), device=ids.device) < chosen)[:, None]
    return rows | {"labels": torch.where(wanted, ids, rows["labels"])}


def placed(rows: Batch, device: torch.device) -> Batch:
    """The batch on `device`; `document_lengths` stays on the host, which reads it."""
    moved = {name: value.to(device, non_blocking=True) for name, value in rows.items()}
    return moved | {name: rows[name] for name in ("document_lengths",) if name in rows}


def score(model: nn.Module, rows: Batch, differentiable: bool = False) -> "TokenScores":
    """The model's scores of a joined batch: log-probs of its labels, with gradients if `differentiable`."""
    device = rows["input_ids"].device
    inputs = {name: rows[name].to(device, non_blocking=True) for name in _INPUTS if name in rows}
    return model(**inputs, differentiable_logprobs=differentiable)


def count_tokens(batch: Batch) -> int:
    """Tokens of a joined batch, or of its parts, without padding."""
    masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
    return sum(int(mask.sum()) for mask in masks) if masks else batch["input_ids"].numel()


def reference_of(model: nn.Module, trainer: "BaseTrainer") -> nn.Module:
    """`model` scored and frozen on the trainer's device, and compiled where the policy is: both must round alike."""
    reference = scored(model).to(trainer.device)
    if trainer.run.settings.compile:
        reference.compile_backbone()
    return freeze(reference)
