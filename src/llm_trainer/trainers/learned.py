"""What of a rollout's micro-batch is learned from, and the ids that its tokens were drawn from."""

from collections.abc import Sequence

import torch

from llm_trainer.losses.drawn_from import DrawnFrom
from llm_trainer.trainers.answers import OF_TOKENS, Batch
from llm_trainer.trainers.routes import ROUTES

# What a micro-batch is learned from; it may have more.
_LAID = (
    "input_ids",
    "labels",
    "attention_mask",
    "position_ids",
    "document_lengths",
    "document_order",
    "repeats",
    "images",
)
LEARNED = (*_LAID, *OF_TOKENS, "has_sums", "kept_counts", "kept")


def of_learning(batch: Batch) -> Batch:
    """The tensors of a micro-batch that are learned from; `kept [M]`, what its rows have of it end to end."""
    routes = [name for name in batch if name.startswith(ROUTES)]
    return {name: batch[name] for name in (*LEARNED, *routes) if name in batch}


def with_cuts(batch: Batch) -> Batch:
    """A micro-batch of a rollout with what its rows were drawn from as one list: `kept [M]`."""
    if "kept_counts" not in batch:
        return batch
    kept = [ids.flatten().long() for ids in batch["kept"]]
    return batch | {"kept": torch.cat(kept)}


def drawn_from_of(rows: Batch, suppressed: Sequence[int]) -> DrawnFrom | None:
    """The ids that tokens were drawn from, where these were not all."""
    if "sampled_logprobs" not in rows or not ("kept" in rows or suppressed):
        return None
    device = rows["input_ids"].device
    kept = rows.get("kept", torch.zeros(0, dtype=torch.long, device=device))
    counts = rows.get("kept_counts", torch.zeros_like(rows["input_ids"]))
    never = torch.tensor(list(suppressed), device=device) if suppressed else None
    return DrawnFrom(kept, counts, never)
