"""Where a run stands."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a run stands; all of it is in every checkpoint.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        position: position of the next sample in the current epoch, in the units of the step source.
        tokens: tokens seen on all ranks.
        train_seconds: time spent in steps.
        best_loss: lowest validation loss, and the step it was measured at.
        evals_without_progress: evaluations since then.
        stopped_early: early stopping ended the run.
        bad_steps: steps in a row that were not finite.
        skipped_steps: all steps that were not finite.
        learning_rate: of the last step.
        hooks_done: step at which each hook was called last.
        lines: the metrics written since the last step; a resumed run writes them again, so that no line is lost or double.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    evals_without_progress: int = 0
    stopped_early: bool = False
    bad_steps: int = 0
    skipped_steps: int = 0
    learning_rate: float = 0.0
    hooks_done: dict[str, int] = field(default_factory=dict)
    lines: list[dict[str, float]] = field(default_factory=list)
