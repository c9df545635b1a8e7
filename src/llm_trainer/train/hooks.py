"""What happens every n steps or epochs besides training. A hook is a function; a run calls it when it is due."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from llm_trainer.algorithm import Algorithm
from llm_trainer.state import Progress

BUILT_IN = ("log", "evaluate", "sample", "save")  # names of the hooks of every run


class RunView(Protocol):
    """What a hook may see and do, on every rank.

    Attributes:
        trainer: the algorithm, with `model`, `base_model` and `optimizer`.
        progress: where the run stands.
        values: the latest value of every metric that was logged.
        save_dir: folder of checkpoints and logs.
    """

    @property
    def trainer(self) -> Algorithm: ...

    @property
    def progress(self) -> Progress: ...

    @property
    def values(self) -> Mapping[str, float]: ...

    @property
    def save_dir(self) -> Path: ...

    def say(self, message: str) -> None:
        """Print on the main process, above any progress bar."""

    def write(self, values: dict[str, float]) -> None:
        """Give metrics to the console and all log files."""

    def evaluate(self) -> dict[str, float]:
        """Metrics of the validation data; all ranks must call it together."""

    def save(self) -> str:
        """Save a checkpoint, all ranks together; its path."""

    def stop(self, reason: str) -> None:
        """End the run after this hook, as if it had reached its last step; all ranks must say so."""


@dataclass(frozen=True)
class Hook:
    """A function that a run calls, at most once per step count unless `when` asks for more.

    It is called before the checkpoint of that step is written; one that needs the checkpoint asks for it, `run.save()`.

    Attributes:
        name: under which the run remembers when it was called last.
        call: what is called, on every rank.
        every_steps: after each n-th optimizer step; None: not by steps.
        every_epochs: after each n-th epoch; None: not by epochs.
        at_end: also after the last step.
        when: a further reason to call it, even again at the same step.
    """

    name: str
    call: Callable[[RunView], object]
    every_steps: int | None = None
    every_epochs: int | None = None
    at_end: bool = False
    when: Callable[[RunView], bool] | None = None

    def is_due(self, run: RunView, finished: bool) -> bool:
        """Whether it is to be called where the run stands now; `finished`: the last step has been done."""
        if self.when is not None and self.when(run):
            return True
        progress = run.progress
        if progress.hooks_done.get(self.name) == progress.step:
            return False
        by_steps = self.every_steps is not None and progress.step > 0 and progress.step % self.every_steps == 0
        by_epochs = (
            bool(self.every_epochs) and progress.is_between_epochs and progress.epoch % (self.every_epochs or 1) == 0
        )
        return by_steps or by_epochs or (self.at_end and finished)


def with_names_of_their_own(hooks: Sequence[Hook]) -> list[Hook]:
    """The user's hooks.

    Raises:
        ValueError: two have one name: a run remembers by name when a hook was called last, and would call only one of them.
    """
    names = Counter([*BUILT_IN, *(hook.name for hook in hooks)])
    for name, count in names.items():
        if count > 1:
            whose = " (the run's own)" if name in BUILT_IN else ""
            raise ValueError(
                f"hooks: {count} are called {name!r}{whose}, expected names that differ; taken are {', '.join(BUILT_IN)}"
            )
    return list(hooks)
