"""Lesson 3: the learning rate of each step: small while the optimizer's averages mean little, large, then small."""

import math


def warmup_cosine(
    step: int, peak_lr: float, warmup_steps: int = 0, total_steps: int | None = None, min_lr: float = 0.0
) -> float:
    """The learning rate of update number `step`, counted from 0.

    Args:
        step: which update.
        peak_lr: the rate at the end of the warm-up.
        warmup_steps: updates of the warm-up.
        total_steps: the update at which `min_lr` is reached, for good; `None`: the rate stays at the peak.
        min_lr: the last rate.
    """
    if step < warmup_steps:
        # lr = peak * step / warmup: a straight line from 0
        return peak_lr * step / warmup_steps
    if total_steps is None:
        return peak_lr
    # x goes from 0 at the end of the warm-up to 1 at total_steps, and no further: a cosine would rise again
    x = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    # lr = min + (peak - min) (1 + cos(pi x)) / 2     (Loshchilov & Hutter 2016, arXiv 1608.03983)
    return min_lr + (peak_lr - min_lr) * (1 + math.cos(math.pi * x)) / 2
