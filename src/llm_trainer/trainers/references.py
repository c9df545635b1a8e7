"""What a policy is compared with, and what that says about data."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.models.frozen import (
    StartingPoint,
    drops_out,
    fingerprint,
    freeze,
    frozen_copy,
    learns_little,
    same_weights,
    trained_parameters,
    why_not_base,
)
from llm_trainer.models.packing import packing_of
from llm_trainer.models.scored import ScoredModel, scored
from llm_trainer.trainers.answers import Batch, as_rows, score, share_prompts, to_device
from llm_trainer.trainers.said import check_vocabulary

if TYPE_CHECKING:
    from llm_trainer.trainers.building import Build


def choose_reference(model: nn.Module, ref_model: nn.Module | None, which: str) -> tuple[nn.Module, bool]:
    """What a policy is compared with, and whether it is the same at the start, so that both must then say the same.

    `model` itself stands for what it was (`StartingPoint`): where so few of its parameters are trained that copies of these
    say it, or where its adapters can be switched off. Else a frozen copy is made, of the model as it is now.

    Args:
        model: the policy.
        ref_model: what the user names; None: nothing.
        which: 'start', or 'base', the policy without its adapters (`config.options.ReferenceOptions`).

    Raises:
        ValueError: the user names the policy itself, or two references, or there is no such base.
    """
    if ref_model is model:
        raise ValueError(
            "ref_model is the policy itself, which changes while it learns; expected another model, or None for the policy as "
            "it is now"
        )
    check_which(which, model, has_model=ref_model is not None)
    if ref_model is not None:
        return ref_model, same_weights(model, ref_model)
    if which == "base":
        return model, False  # adapters may have learned before
    if learns_little(model):
        return model, not drops_out(model)
    return frozen_copy(model), True


def check_which(which: str, model: nn.Module, has_model: bool) -> None:
    """
    Raises:
        ValueError: the reference is to be the policy with its adapters off, and another model, or that is no base.
    """
    if which != "base":
        return
    if has_model:
        raise ValueError(
            "reference: got 'base', the policy with its adapters off, and a model to compare with (ref_model, "
            "ref_model_checkpoint); leave one of the two out"
        )
    why = why_not_base(model)
    if why:
        raise ValueError(
            f"reference: got 'base', the policy with its adapters off, but {why}. Expected reference: start, the policy as it "
            f"is where the run begins, or a model to compare with (ref_model, ref_model_checkpoint)"
        )


def reference_of(
    model: nn.Module, trainer: Algorithm, policy: ScoredModel, which: str = "start"
) -> ScoredModel | StartingPoint:
    """`model`, as `choose_reference` gave it, scored, frozen and on the device as the policy is: both must round alike."""
    if model is trainer.base_model:
        return _starting_point(trainer, policy, which)
    check_vocabulary(trainer.base_model, ref_model=model)
    reference = scored(model)
    freeze(reference)
    trainer.machine.reads_rows(partial(packing_of, model, scored, trainer.machine.device))
    trainer.machine.place(reference)
    return reference


def _starting_point(trainer: Algorithm, policy: ScoredModel, which: str) -> StartingPoint:
    """The policy as it is now, or with its adapters off."""
    model = trainer.base_model
    start = StartingPoint(model, trainer.model, policy.knows_branches)
    if which == "base":
        trainer.machine.hold({}, start)  # nothing to keep, but all ranks call it together
        start.as_it_was = model.disable_adapter  # type: ignore[assignment]
        start.description = "the policy with its adapters off"
        return start
    start.as_it_was = trainer.machine.hold(trained_parameters(model), start)
    start.description = "the policy where the run began"
    return start


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
        if shares_prompts:
            batch = share_prompts(batch)
        batch = to_device(batch, build.device)
        with as_it_was():
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
