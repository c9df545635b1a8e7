"""What a policy is compared with, and what that says about data."""

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.image_batch import moved, of_images
from llm_trainer.models.frozen import StartingPoint, fingerprint, freeze
from llm_trainer.models.packing import packing_of
from llm_trainer.models.scored import ScoredModel, scored
from llm_trainer.models.vision import SeenOnce
from llm_trainer.trainers.answers import Batch, as_rows, score, share_prompts
from llm_trainer.trainers.said import check_vocabulary

if TYPE_CHECKING:
    from llm_trainer.trainers.building import Build


def reference_of(
    model: nn.Module, trainer: Algorithm, policy: ScoredModel, which: str = "start"
) -> ScoredModel | StartingPoint:
    """What `models.frozen.choose_reference` gave, scored, frozen and on the device as the policy is: both must round alike."""
    if model is trainer.base_model:
        return StartingPoint(model, trainer.model, policy.knows_branches, which, trainer.machine.hold)
    check_vocabulary(trainer.base_model, ref_model=model)
    reference = scored(model)
    reference.with_images = policy.with_images
    freeze(reference)
    trainer.machine.reads_rows(partial(packing_of, model, scored, trainer.machine.device))
    trainer.machine.place(reference)
    return reference


def seen_once(rows: Batch) -> Batch:
    """Rows whose images the reference encodes, and the policy does not encode again."""
    if "images" not in rows and of_images(rows):  # ready-made: the model itself is given the pixels
        return rows
    seen: dict[str, Any] = dict(rows)
    return seen | {"images": SeenOnce(seen.get("images"))}


def describe_reference(reference: nn.Module | None) -> str:
    """What a policy is compared with, for the screen before training."""
    if reference is None:
        return "none"
    return reference.description if isinstance(reference, StartingPoint) else "a frozen model"


def precompute_reference(
    stream: Any, reference: nn.Module, build: "Build", wants_sharing: bool, which: str = "start"
) -> None:
    """Give every pair the reference's summed log-probs, from a file beside the pairs' tokens or computed now.

    Args:
        stream: of pairs (`data.stream.SampleStream`).
        reference: whatever `scored` takes; it is moved to the device.
        build: shares the work among ranks and keeps the file.
        wants_sharing: run the prompt of a pair once, where attention can do it.
        which: 'base': the reference with its adapters off.
    """
    model = scored(reference)
    shares_prompts = wants_sharing and model.knows_branches(build.device)
    key, as_it_was = fingerprint(reference), nullcontext
    if which == "base":
        key, as_it_was = f"{key}-base", reference.disable_adapter  # type: ignore[assignment]

    def sums(batch: Batch) -> dict[str, Tensor]:
        """`[n]` of chosen and rejected."""
        if shares_prompts and not of_images(batch):
            batch = share_prompts(batch)
        batch = moved(batch, build.device)
        with as_it_was():
            logprobs = as_rows(score(model, batch).logprobs, batch)
        chosen, rejected = logprobs.sum(1).view(2, -1)  # all chosen come before all rejected
        return {"chosen": chosen, "rejected": rejected}

    for rows in stream.dataset.parts:
        cache = rows.store.folder / f"ref_logps-{key}-{rows.how.block_size}-{rows.how.truncation}.npy"
        rows.ref_logps = build.score(model, rows, stream.collate, sums, cache)
