"""What a policy is compared with, and what that says about data."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.models.frozen import AdaptersOff, fingerprint, freeze, frozen_copy
from llm_trainer.models.inside import has_adapters
from llm_trainer.models.packing import packing_of
from llm_trainer.models.scored import ScoredModel, scored
from llm_trainer.trainers.answers import Batch, as_rows, score, share_prompts, to_device
from llm_trainer.trainers.said import check_vocabulary

if TYPE_CHECKING:
    from llm_trainer.trainers.building import Build


def default_reference(model: nn.Module) -> nn.Module:
    """What a policy is compared with if nobody says: itself where only its adapters learn, else a frozen copy."""
    return model if has_adapters(model) else frozen_copy(model)


def reference_of(model: nn.Module, trainer: Algorithm, policy: ScoredModel) -> ScoredModel | AdaptersOff:
    """`model` scored, frozen and on the device as the policy is: both must round alike.

    Where it is the trained model itself, it is that with its adapters off.
    """
    if model is trainer.base_model:
        return AdaptersOff(model, trainer.model, policy.knows_branches)
    check_vocabulary(trainer.base_model, ref_model=model)
    reference = scored(model)
    freeze(reference)
    trainer.machine.reads_rows(partial(packing_of, model, scored, trainer.machine.device))
    trainer.machine.place(reference)
    return reference


def precompute_reference(stream: Any, reference: nn.Module, build: "Build", wants_sharing: bool) -> None:
    """Give every pair the reference's summed log-probs, from a file beside the pairs' tokens or computed now.

    Args:
        stream: of pairs (`data.stream.SampleStream`).
        reference: whatever `scored` takes; it is moved to the device.
        build: shares the work among ranks and keeps the file.
        wants_sharing: run the prompt of a pair once, where attention can do it.
    """
    model = scored(reference)
    shares_prompts = wants_sharing and model.knows_branches(build.device)
    key = fingerprint(reference)

    def sums(batch: Batch) -> dict[str, Tensor]:
        """`[n]` of chosen and rejected."""
        if shares_prompts:
            batch = share_prompts(batch)
        batch = to_device(batch, build.device)
        logprobs = as_rows(score(model, batch).logprobs, batch)
        chosen, rejected = logprobs.sum(1).view(2, -1)  # all chosen come before all rejected
        return {"chosen": chosen, "rejected": rejected}

    for rows in stream.dataset.parts:
        cache = rows.store.folder / f"ref_logps-{key}-{rows.how.block_size}-{rows.how.truncation}.npy"
        rows.ref_logps = build.score(model, rows, stream.collate, sums, cache)


def different_ids(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """What is different about two vocabularies, token -> id, in words; empty: nothing."""
    here = {number: token for token, number in ours.items()}
    there = {number: token for token, number in theirs.items()}
    different = sorted(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    if not different:
        return ""
    examples = "; ".join(f"id {i} is {here.get(i)!r} here and {there.get(i)!r} there" for i in different[:3])
    return f"{len(different)} ids differ ({examples}; None: no such id)"
