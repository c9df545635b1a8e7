"""Finds how many tokens a micro-batch may have, where the user leaves it to the machine: the fastest number that fits.

On CPUs the fastest number is a rule, out of `benchmarks/micro_batches.py`; memory bounds it. On other devices the largest
number that fits is the fastest, up to a size from which on nothing is gained. No stop-watch decides, so runs choose alike.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from llm_trainer.data.loaders import LoaderSteps
from llm_trainer.data.stream import SampleStream, StepSource, innermost
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.room import room_on
from llm_trainer.layout import takes_flat
from llm_trainer.train.budget import Budget, may_cut, size_below
from llm_trainer.train.preflight import human
from llm_trainer.train.size import Size
from llm_trainer.train.trial import bytes_per_token
from llm_trainer.train.work import Work

if TYPE_CHECKING:
    from llm_trainer.config.options import Settings

FASTEST, FASTEST_COMPILED = 2048, 4096  # tokens, on CPUs; the latter for rows laid flat, once layers are compiled
MOST = 65536  # tokens, on other devices: from here on a step's kernels are busy anyway
ENOUGH = 4096  # tokens of a step that need no trial
ON_GPUS = MOST, "more gains nothing"
SHARE = 0.8  # of the free memory that a step may take; the rest is for what no formula sees
BytesOf = Callable[[int], float]  # tokens of a micro-batch -> what it takes while it is computed


def describe_machine(engine: Engine, in_company: bool) -> str:
    """What memory there is and who shares it, in words that all ranks agree on: a budget holds for one such machine."""
    device = engine.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    total, processes = room_on(device).total, 1
    if in_company:
        ((total, _),) = dist.extremes([total])
        name, processes = dist.share_object(name, 0), dist.num_processes()
    return f"{name}, {human(total, 'B')}, {processes} x {engine.name}, {engine.precision_name}"


def settle(work: Work, size: Size, settings: "Settings") -> None:
    """Find the budget of a run that has none yet; all ranks together, between two steps.

    It is the smallest of what they find.
    """
    budget: Budget = work.budget
    if budget.is_settled:
        return
    if not may_cut(work.algorithm):
        kind = type(work.algorithm)
        why = "rows of one depend on each other in this model, or in its loss"
        if not takes_flat(kind):
            why = f"{kind.__name__} does not say that they may be cut anew"
        return budget.settle(None, why)
    plain, fastest, why = _fastest(work.engine.device, innermost(work.source))
    if work.algorithm.regulariser.costs_when_cut:
        plain, fastest, why = MOST, MOST, "a step that is cut is routed twice"
    cost = _cost(work, size, settings, fastest)
    room = room_on(work.engine.device)
    free = room.free - _still_to_come(work, size, settings)
    tokens = 0  # nobody knows
    if cost is not None:
        tokens, why = largest_that_fits(fastest, why, cost, free, room.limit)
    ((agreed, _),) = dist.extremes([tokens])
    if not agreed:
        return budget.settle(None, "what a token of this model takes is not known")
    if agreed < tokens:
        why = "what fits on every rank"
    budget.settle(min(agreed, plain), why, compiled=agreed)
    budget.compiled(work.compiling.is_on)


def _cost(work: Work, size: Size, settings: "Settings", fastest: int) -> BytesOf | None:
    """What a micro-batch takes: by the formula, or where a trial knows better by a trial; None: nobody knows."""
    engine, source = work.engine, innermost(work.source)
    formula = bytes_by_formula(engine, size, settings)
    if not isinstance(source, SampleStream) or not engine.takes_trials:  # nothing to try it with, or no way
        return formula
    if formula is not None and engine.device.type == "cpu":
        return formula
    rows = math.ceil(source.rows_per_step / source.world_size)
    if rows * int(source.costs.max()) <= min(fastest, ENOUGH):  # whatever is chosen, steps are no larger
        return formula or (lambda tokens: 0.0)
    per_token = bytes_per_token(work, source)
    if per_token is None:
        return formula
    return lambda tokens: per_token * tokens


def _fastest(device: torch.device, source: StepSource) -> tuple[int, int, str]:
    """Tokens from which on more gains nothing: while layers run plain, and once they are compiled; and why."""
    if device.type != "cpu":
        return MOST, *ON_GPUS
    why = "the fastest on CPUs"
    if isinstance(source, LoaderSteps):
        is_flat = not source.layout.counts_padding
        why += ", where the batches of a loader can be cut anew"
    else:
        is_flat = isinstance(source, SampleStream) and source.flat
    compiled = FASTEST_COMPILED if is_flat else FASTEST
    return FASTEST, compiled, why


def largest_that_fits(fastest: int, why: str, cost: BytesOf, free: float, limit: str) -> tuple[int, str]:
    """Tokens of the micro-batches of a run, and why; `llm-trainer plan` asks here too.

    Args:
        fastest: tokens from which on more gains nothing.
        why: the reason for these.
        cost: what a micro-batch takes.
        free: bytes that a step could take; `SHARE` of them are used.
        limit: what sets that, in words.
    """
    tokens = fastest
    while tokens > 1 and cost(tokens) > SHARE * free:
        tokens = size_below(tokens - 1)
    if tokens < fastest:
        why = f"what fits into {human(max(0.0, SHARE * free), 'B')}, of {limit}"
    return tokens, why


def bytes_by_formula(engine: Engine, size: Size, settings: "Settings") -> BytesOf | None:
    """What a micro-batch takes beside weights, gradients and optimizer; None for other models than those of `plan`."""
    from llm_trainer.plan.memory import ONE, Step, autocast_copies, moments
    from llm_trainer.plan.shapes import Job

    shape = size.shape
    if (
        shape is None or shape.tower is not None
    ):  # of what a budget counts as one, a token and a patch take different amounts
        return None
    offloads = settings.activation_offload
    job = Job(0, 0, 1, flops_per_token=0.0, state_bytes=0.0, precision=engine.precision_name, offloads=offloads)
    copies = 0.0
    if engine.precision_name != "fp32":
        copies = autocast_copies(shape, settings.gradient_checkpointing)

    def needed(tokens: int) -> float:
        on_gpu = engine.device.type != "cpu"
        step = Step(tokens, settings.gradient_checkpointing, accumulates=True, on_gpu=on_gpu)
        return copies + max(m.activations + m.head for m in moments(shape, job, ONE, 1, step))

    return needed


def _still_to_come(work: Work, size: Size, settings: "Settings") -> float:
    """Bytes of gradients and optimizer state that are not there yet, and of the copy that is saved in the background."""
    engine = work.engine
    _, gradients, states = engine.shard_fractions()
    to_come = size.trained_bytes * gradients
    if not work.algorithm.optimizer.state:
        to_come += size.optimizer_bytes * states
    if settings.save_in_background and engine.device.type == "cpu":
        to_come += engine.bytes_to_copy(size.saved_bytes, size.optimizer_bytes)
    return to_come
