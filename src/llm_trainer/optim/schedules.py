"""Learning-rate schedules: pure functions of the step, and the object that applies one to an optimizer.

`schedule(k)` is the rate that update number k uses, counted from 0. Nothing else is remembered (but for
`reduce_on_plateau`, which follows validation losses), so the state of a schedule is its step and resume is exact.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from llm_trainer.optim.multipliers import top_rate


@dataclass(frozen=True)
class Schedule:
    """A learning rate for every step: linear warm-up from `warmup_init_lr` to `lr`, then the shape called `name`.

    Calling it gives the rate of one step and needs no optimizer. `create_schedule` builds it from flat arguments.

    Attributes:
        name: a key of `SHAPES`.
        lr: the top rate.
        warmup_steps: updates before the top; update 0 uses `warmup_init_lr`, update `warmup_steps` uses `lr`.
        warmup_init_lr: `None`: 0, and `min_lr` for `wsd` (as in transformers).
        total_steps: updates of the whole run, warm-up included; shapes that end at a fixed step need it.
        min_lr: the lowest rate after warm-up.
        options: what only this shape understands; see the functions of `SHAPES`.
    """

    name: str
    lr: float
    warmup_steps: int = 0
    warmup_init_lr: float | None = None
    total_steps: int | None = None
    min_lr: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in SHAPES:
            raise ValueError(f"unknown schedule {self.name!r}; known schedules: {', '.join(SHAPES)}")
        _check_options(self.name, self.options)
        if not self.lr > 0:
            raise ValueError(f"schedule {self.name!r}: lr is {self.lr!r}, expected a number > 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"schedule {self.name!r}: min_lr is {self.min_lr!r}, expected 0 <= min_lr <= lr ({self.lr})"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"schedule {self.name!r}: warmup_steps is {self.warmup_steps}, expected >= 0")
        self(self.warmup_steps)  # a shape that lacks something says so now, not after the warm-up

    def __call__(self, step: int) -> float:
        """The learning rate of update number `step` (from 0)."""
        if step < self.warmup_steps:
            start = self.first_lr
            return start + (self.lr - start) * step / self.warmup_steps
        return SHAPES[self.name](self, step - self.warmup_steps, **self.options)

    @property
    def first_lr(self) -> float:
        """The rate from which the warm-up starts."""
        if self.warmup_init_lr is not None:
            return self.warmup_init_lr
        return self.min_lr if self.name == "wsd" else 0.0

    def progress(self, k: int) -> float:
        """The part of the run after warm-up that lies behind its step `k`: from 0 to 1, and 1 ever after."""
        if self.total_steps is None:
            raise ValueError(f"schedule {self.name!r} needs total_steps, the number of updates of the whole run")
        return min(1.0, k / max(1, self.total_steps - self.warmup_steps))

    def between(self, factor: float) -> float:
        """The rate at `factor` of the way from `min_lr` (0) to `lr` (1)."""
        return self.min_lr + (self.lr - self.min_lr) * factor

    def describe(self) -> str:
        """One line for people, such as `cosine: 0 -> 0.001 in 10 warm-up steps, 1e-05 at step 45`."""
        rates = f"{self.lr:g}"
        if self.warmup_steps:
            rates = f"{self.first_lr:g} -> {self.lr:g} in {self.warmup_steps} warm-up steps"
        parts = [f"{self.name}: {rates}"]
        if self.total_steps is not None:
            parts.append(f"{self(self.total_steps):g} at step {self.total_steps}")
        return ", ".join(parts + [f"{name}={value}" for name, value in self.options.items()])


# Shapes: functions of the schedule and of k, the number of updates since warm-up ended (k = 0 is at the top).


def _constant(s: Schedule, k: int) -> float:
    return s.lr


def _linear(s: Schedule, k: int) -> float:
    return s.between(1 - s.progress(k))


def _cosine(s: Schedule, k: int) -> float:
    """Half a cosine wave to `min_lr`, where it stays (Loshchilov & Hutter 2016, arXiv 1608.03983, without restarts)."""
    return s.between(_half_wave(s.progress(k)))


def _cosine_restarts(s: Schedule, k: int, period: int, period_mul: int = 0) -> float:
    """SGDR (arXiv 1608.03983): cosine waves of `period`, `period * period_mul`, ... steps, each from the top.

    `period_mul=1` repeats the period; `period_mul=0` never restarts: after one wave the rate stays at `min_lr`.
    """
    if period < 1 or period_mul < 0:
        raise ValueError(f"cosine_restarts: period {period} and period_mul {period_mul}, expected >= 1 and >= 0")
    if period_mul == 0:
        return s.between(_half_wave(min(1.0, k / period)))
    if period_mul == 1:
        k %= period
    while k >= period:
        k -= period
        period *= period_mul
    return s.between(_half_wave(k / period))


def _hard_restarts(s: Schedule, k: int, num_cycles: int = 1) -> float:
    """`num_cycles` equal cosine waves inside `total_steps`, as in transformers."""
    progress = s.progress(k)
    if progress == 1:
        return s.between(_half_wave(1.0))
    return s.between(_half_wave(num_cycles * progress % 1.0))


def _wsd(s: Schedule, k: int, decay_steps: int, stable_steps: int | None = None, decay_type: str = "linear") -> float:
    """Warm-up, stable, decay (Hu et al. 2024, arXiv 2404.06395): the top, then down to `min_lr` in `decay_steps`.

    `stable_steps=None`: the decay ends at `total_steps`. `decay_type`: `linear`, `cosine` or `1-sqrt` (Hägele et al.
    2024, arXiv 2405.18392).
    """
    if decay_type not in DECAYS:
        raise ValueError(f"wsd: unknown decay_type {decay_type!r}; known types: {', '.join(DECAYS)}")
    if stable_steps is None:
        if s.total_steps is None:
            raise ValueError("wsd needs stable_steps, or total_steps from which they follow")
        stable_steps = max(0, s.total_steps - s.warmup_steps - decay_steps)
    progress = min(1.0, max(0, k - stable_steps) / max(1, decay_steps))
    return s.between(DECAYS[decay_type](progress))


def _inverse_sqrt(s: Schedule, k: int, timescale: int | None = None) -> float:
    """`lr * sqrt(T / (T + k))`; `timescale=None`: T = the warm-up, or 10 000 without one (Vaswani et al. 2017)."""
    scale = timescale or s.warmup_steps or 10_000
    return max(s.min_lr, s.lr * math.sqrt(scale / (scale + k)))


def _polynomial(s: Schedule, k: int, power: float = 1.0) -> float:
    return s.between((1 - s.progress(k)) ** power)


def _reduce_on_plateau(s: Schedule, k: int, factor: float = 0.1, patience: int = 10, threshold: float = 1e-4) -> float:
    """The top, until `Scheduler.observe` multiplies it by `factor`: see `Plateau`."""
    return s.lr


def _half_wave(x: float) -> float:
    """Half a cosine wave: 1 at x = 0, 0 at x = 1."""
    return 0.5 * (1 + math.cos(math.pi * x))


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": _half_wave,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}

SHAPES: dict[str, Callable[..., float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_restarts": _cosine_restarts,
    "hard_restarts": _hard_restarts,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "polynomial": _polynomial,
    "reduce_on_plateau": _reduce_on_plateau,
}


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError unless `options` are what the shape takes after its first two parameters."""
    own = list(inspect.signature(SHAPES[name]).parameters.values())[2:]
    known = {parameter.name for parameter in own}
    required = {parameter.name for parameter in own if parameter.default is inspect.Parameter.empty}
    if unknown := options.keys() - known:
        known |= {"lr", "warmup_steps", "warmup_init_lr", "total_steps", "min_lr", "min_lr_ratio"}
        raise ValueError(
            f"schedule {name!r} has no option {', '.join(sorted(unknown))}; options: {', '.join(sorted(known))}"
        )
    if missing := required - options.keys():
        raise ValueError(f"schedule {name!r} needs {', '.join(sorted(missing))}")


@dataclass
class Plateau:
    """Multiplies the rate by `factor` after more than `patience` losses in a row without a relative gain."""

    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4  # a loss is a gain if it is below best * (1 - threshold)
    scale: float = 1.0
    best: float = math.inf
    num_bad: int = 0

    def observe(self, loss: float) -> None:
        """Take in one validation loss (a NaN is no improvement)."""
        if loss < self.best * (1 - self.threshold):
            self.best, self.num_bad = loss, 0
            return
        self.num_bad += 1
        if self.num_bad > self.patience:
            self.scale, self.num_bad = self.scale * self.factor, 0


class Scheduler(LRScheduler):
    """Applies a `Schedule` to an optimizer; call `step()` once after every update.

    Groups keep the ratio of their own rates to the largest one that is no multiple (see `multipliers`), which follows the
    schedule. The state is the step (and what `reduce_on_plateau` has seen), so a state loaded into another schedule goes on
    from that step of the new one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule) -> None:
        self.schedule = schedule
        self.plateau = Plateau(**schedule.options) if schedule.name == "reduce_on_plateau" else None
        # Before other groups come, see `take_in`: it is what the schedule's top means.
        self._top = top_rate(optimizer)
        super().__init__(optimizer)  # ends in step(), which makes last_epoch 0

    def get_lr(self) -> list[float | torch.Tensor]:
        """The rate of every parameter group at the current step."""
        rate = self.schedule(self.last_epoch)
        if self.plateau is not None:
            rate = min(rate, max(rate * self.plateau.scale, self.schedule.min_lr))
        return [rate * (float(base) / self._top) for base in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next update; `epoch` (the next step's number) is there for torch's interface.

        Unlike torch's, it does not warn when the optimizer has not stepped: skipping a non-finite update is legitimate.
        """
        self._step_count += 1
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._apply()

    def observe(self, loss: float) -> None:
        """Give the schedule a validation loss; only `reduce_on_plateau` reads it."""
        if self.plateau is not None:
            self.plateau.observe(loss)
            self._apply()

    def state_dict(self) -> dict[str, Any]:
        """`{"step": int}`, and what `reduce_on_plateau` has seen."""
        state: dict[str, Any] = {"step": self.last_epoch}
        if self.plateau is not None:
            state["plateau"] = asdict(self.plateau)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the step of `state_dict` and set the optimizer's rates to it."""
        self.last_epoch = state_dict["step"]
        self._step_count = self.last_epoch + 1
        if self.plateau is not None and "plateau" in state_dict:
            seen = state_dict["plateau"]
            self.plateau = replace(self.plateau, scale=seen["scale"], best=seen["best"], num_bad=seen["num_bad"])
        self._apply()

    def describe(self) -> str:
        """One line for people; see `Schedule.describe`."""
        return self.schedule.describe()

    def take_in(self, group: dict[str, Any]) -> None:
        """Follow a parameter group that the optimizer has just been given, whose rate is that at the top."""
        group["initial_lr"] = group["lr"]
        self.base_lrs.append(group["lr"])
        self._apply()

    def _apply(self) -> None:
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate


def create_schedule(
    name: str,
    lr: float,
    *,
    warmup_steps: int = 0,
    warmup_init_lr: float | None = None,
    total_steps: int | None = None,
    min_lr: float | None = None,
    min_lr_ratio: float = 0.0,
    **options: Any,
) -> Schedule:
    """Build a `Schedule` from flat arguments; `min_lr_ratio` is `min_lr` as a part of `lr`, used when `min_lr` is None.

    Options: `cosine_restarts` needs `period` and takes `period_mul`; `hard_restarts` takes `num_cycles`; `wsd` needs
    `decay_steps` and takes `stable_steps`, `decay_type`; `inverse_sqrt` takes `timescale`; `polynomial` takes `power`;
    `reduce_on_plateau` takes `factor`, `patience`, `threshold`. All shapes take the named arguments.

    Raises:
        ValueError: for an unknown name or option, a missing one, or a number out of its range.
    """
    lowest = lr * min_lr_ratio if min_lr is None else min_lr
    return Schedule(name.lower(), lr, warmup_steps, warmup_init_lr, total_steps, lowest, options)


def create_scheduler(optimizer: torch.optim.Optimizer, name: str = "constant", **hyper: Any) -> Scheduler:
    """Build the schedule called `name` for `optimizer` with its largest rate as the top; see `create_schedule`."""
    return Scheduler(optimizer, create_schedule(name, top_rate(optimizer), **hyper))


# What a run tells any scheduler, ours or another.


def check(scheduler: Any, is_evaluated: bool) -> None:
    """Look at whether a run can give `scheduler` (None: there is none) what it follows.

    Raises:
        ValueError: it follows a validation loss and there is none, or it waits for one that rises.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return
    if not is_evaluated:
        raise ValueError(
            "scheduler: ReduceLROnPlateau follows eval_loss, and the run has no validation data; give a val_loader, or "
            "another scheduler"
        )
    if scheduler.mode != "min":
        raise ValueError(f"scheduler: got ReduceLROnPlateau with mode={scheduler.mode!r}, expected 'min': a loss falls")


def after_update(scheduler: Any) -> None:
    """Let `scheduler` go on to the next update; torch's ReduceLROnPlateau follows evaluations instead."""
    if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()


def after_evaluation(scheduler: Any, loss: float) -> None:
    """Give a validation loss to a `scheduler` that follows it."""
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(loss)
    elif isinstance(scheduler, Scheduler):
        scheduler.observe(loss)
