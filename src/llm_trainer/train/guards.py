"""What keeps numbers that are not finite, and batches that hold nothing, from spoiling a run."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trainer.data.stream import Batch
from llm_trainer.engine import dist

if TYPE_CHECKING:
    from llm_trainer.train.run import Run


class NonFiniteError(ArithmeticError):
    """The weights the run starts from are not finite, or too many steps in a row had a loss or gradient that is not finite."""


def broken_tensor(run: "Run") -> str | None:
    """Which parameter holds a NaN or an infinity on any rank, and how many of them; None: all are finite."""
    named = [(name, run.engine.part_of(p)) for name, p in run.trainer.base_model.named_parameters()]
    found = None
    finite = torch.stack([p.isfinite().all() for _, p in named])  # the host waits for the device once
    for name, p in (named[i] for i in (~finite).nonzero().flatten().tolist()):
        found = f"{name.removeprefix('module.')} ({int((~p.isfinite()).sum())} of {p.numel():,} values are not finite)"
        break
    return next(filter(None, dist.gather_objects(found)), None)


def share_of_nothing(outputs: Any, module: nn.Module) -> Tensor:
    """The share of a batch without terms: 0, with a gradient of 0 that goes the way of every other batch's.

    Its loss may be 0 / 0, and NaN * 0 is NaN. Sharded layers exchange gradients on the way, so no rank may leave it out.
    """
    pieces = [t for t in _tensors_of(outputs) if t.requires_grad] or [p for p in module.parameters() if p.requires_grad]
    return torch.stack([(t.nan_to_num(0.0, 0.0, 0.0) * 0).sum().float() for t in pieces]).sum()


def _tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors_of(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors_of([getattr(value, f.name) for f in fields(value)])


def refuse(run: "Run", micro_batches: list[Batch], loss: float) -> None:
    """Count a step whose gradient was not finite, keep its batches for inspection, stop after too many in a row."""
    run.progress.bad_steps += 1
    run.progress.skipped_steps += 1
    kept = run.keep_batches(micro_batches)
    message = f"step {run.progress.step + 1}: loss {loss:g}, gradient not finite; the update was skipped, {kept}"
    run.warn(message)
    limit = run.settings.max_bad_steps + (20 if run.engine.state_dict()["scaler"] else 0)  # fp16 finds its scale so
    if run.progress.bad_steps >= limit:
        broken = broken_tensor(run)
        if broken is not None:
            cause = f"the weights are broken, by an update before: {broken}; lower the learning rate or add warm-up"
        elif not math.isfinite(loss):
            cause = "the weights are finite and the loss is not: look for broken rows in the kept batches"
        else:
            cause = "the loss is finite and its gradient is not: lower the learning rate, or use bf16 or fp32"
        raise NonFiniteError(
            f"{message}. {run.progress.bad_steps} steps in a row were not finite, so the run stops; nothing was updated "
            f"by them. Likely cause: {cause}. Last valid checkpoint: {run.last_checkpoint()}"
        )
