"""What keeps numbers that are not finite, and batches that hold nothing, from spoiling a run."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from llm_trainer.disk import whole_file
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.models.quantize import stored_numbers
from llm_trainer.state import MicroBatch


class NonFiniteError(ArithmeticError):
    """The weights the run starts from are not finite, or too many steps in a row had a loss or gradient that is not finite."""


def broken_tensor(engine: Engine, model: nn.Module) -> str | None:
    """The first parameter that holds a NaN or an infinity, and how many of them; all ranks look at their shards together."""
    shards = []
    for name, parameter in model.named_parameters():
        numbers = stored_numbers(parameter)
        if numbers is parameter:  # else the scales of one in 4 bits, which no engine shards
            numbers = engine.local_shard(parameter)
        shards.append((name, numbers))
    # A sum is not finite if a term is not. It needs one pass, and `isfinite` copies; the host waits for the device once.
    sums, found = torch.stack([shard.sum(dtype=torch.float32) for _, shard in shards]), None
    for index in (~sums.isfinite()).nonzero().flatten().flip(0).tolist():
        name, shard = shards[index]
        count = int((~shard.isfinite()).sum())
        if count:  # not only a sum that is too large
            found = f"{name.removeprefix('module.')} ({count} of {shard.numel():,} values are not finite)"
    return next(filter(None, dist.gather_objects(found)), None)


def check_weights(engine: Engine, model: nn.Module) -> None:
    """Look at what a run starts from.

    Raises:
        NonFiniteError: a weight is not finite.
    """
    broken = broken_tensor(engine, model)
    if broken is not None:
        raise NonFiniteError(
            f"the weights are broken before the first step: {broken}. Expected finite numbers: load other weights, or "
            f"mend what made these"
        )


def keep_batches(batches: Sequence[MicroBatch], step: int, save_dir: Path) -> str:
    """Write the micro-batches of a step that was not finite, for inspection; says where they are."""
    path = save_dir / "bad_steps" / f"step-{step}-rank-{dist.process_number()}.pt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial, partial.open("wb") as file:  # whose errors say why, unlike torch's own
            torch.save([batch.batch for batch in batches if batch.counts], file)
    except OSError as error:
        return f"its batch could not be kept ({error})"
    return f"its batch is kept in {path}"


def likely_cause(loss: float, broken: str | None) -> str:
    """Why steps are not finite.

    Args:
        loss: of the step, over all ranks.
        broken: what `broken_tensor` found.
    """
    if broken is not None:
        return f"the weights are broken, by an update before: {broken}; lower the learning rate or add warm-up"
    if not math.isfinite(loss):
        return "the weights are finite and the loss is not: look for broken rows in the kept batches"
    return "the loss is finite and its gradient is not: lower the learning rate, or use bf16 or fp32"
