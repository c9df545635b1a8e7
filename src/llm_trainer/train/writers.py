"""Where metrics and messages go: the console, the files of `log_files`, TensorBoard, Weights & Biases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from llm_trainer.config.env import set_default
from llm_trainer.disk import FULL_OR_BROKEN, storage_failure
from llm_trainer.train.log_files import FullDisk, JsonLines, TextLog


class Writer(Protocol):
    """A place for metrics. Only the main process has writers."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the metrics of a step, by TRL's names; those of an evaluation begin with `eval_`."""

    def close(self) -> None:
        """Finishes what is open."""


_HEADLINE = {
    "loss": "loss {:.4f}",
    "reward": "reward {:.3f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.3f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.1%}",
}
_TIMES = ("eval_seconds/", "eval_tokens_per_second/")  # of an evaluation; the files have them


@contextmanager
def even_on_a_full_disk() -> Iterator[None]:
    """The screen may be a file; what does not fit on its disk now stays in Python's buffer."""
    try:
        yield
    except OSError as error:
        if storage_failure(error, FULL_OR_BROKEN) is None:
            raise


class ConsoleWriter:
    """One live line in a terminal, plain lines elsewhere; results of evaluations stay on the screen."""

    def __init__(self, total_steps: int | None, first_step: int = 0, live: bool = True, console: Console | None = None):
        """Counts time and steps from now and `first_step` for the estimated time of arrival."""
        self.total_steps = total_steps
        self.console = console or Console()
        self._start = (time.monotonic(), first_step)
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, console=self.console) if live and self.console.is_terminal else None
        if self._progress:
            self._task = self._progress.add_task("step", total=total_steps, completed=first_step, text="")
            self._progress.start()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Shows the headline metrics of a training step, or all metrics of an evaluation but its times."""
        label = f"step {step:,}" + (f"/{self.total_steps:,}" if self.total_steps else "")
        shown = [name for name in values if name.startswith("eval_") and not name.startswith(_TIMES)]
        evaluated = [f"{name} {values[name]:.4f}" for name in shown]
        if evaluated:
            self.say("  ".join([label, *evaluated]))
        trained = [text.format(values[name]) for name, text in _HEADLINE.items() if name in values]
        if not trained:
            return
        text = "  ".join([*trained, *self._remaining(step)])
        if self._progress:
            self._progress.update(self._task, description=label, completed=step, text=text)
        else:
            self.say(f"{label}  {text}")

    def _remaining(self, step: int) -> list[str]:
        started, first_step = self._start
        if not self.total_steps or step <= first_step:
            return []
        seconds = int((time.monotonic() - started) / (step - first_step) * (self.total_steps - step))
        return [f"ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"]

    def say(self, line: str) -> None:
        """Prints a line above the live one."""
        with even_on_a_full_disk():
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last line on the screen."""
        if self._progress:
            self._progress.stop()


class TensorBoard:
    """Event files in the folder `tensorboard`."""

    def __init__(self, folder: str | Path, last_step: int = -1) -> None:
        """Continues the curves in `folder` after `last_step`; -1 hides older ones."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(f"writer tensorboard: {error}; `pip install tensorboard` or remove it") from None
        self._events: Any = SummaryWriter(str(Path(folder) / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandB:
    """A run of Weights & Biases: offline unless the environment variable WANDB_MODE says otherwise."""

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None) -> None:
        """Starts the run, with its files in `folder`/wandb and `config` as its settings."""
        try:
            import wandb
        except ImportError as error:
            raise ValueError(f"writer wandb: {error}; `pip install wandb` or remove it") from None
        set_default("WANDB_MODE", "offline")
        set_default("WANDB_SILENT", "true")
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._run: Any = wandb.init(project="llm_trainer", dir=str(folder), config=dict(config or {}))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


def open_writers(
    folder: str | Path,
    *,
    is_main: bool,
    total_steps: int | None = None,
    last_step: int = -1,
    extra: Sequence[str] = (),
    live: bool = True,
    config: Mapping[str, Any] | None = None,
    trouble: FullDisk | None = None,
) -> list[Writer]:
    """The writers of this process: the console, the log files and `extra` on the main one, none on others.

    Args:
        folder: the folder of log.txt and metrics.jsonl.
        is_main: whether this process is the one that writes.
        total_steps: the run's length, for the estimated time of arrival.
        last_step: the step that a resumed run goes on from; -1 for a new run, which begins the files anew.
        extra: `tensorboard`, `wandb`.
        live: a progress bar where the output is a terminal.
        config: the run's settings, for `wandb`.
        trouble: hears about a full disk.

    Raises:
        ValueError: when a writer is not known or not installed.
    """
    known: dict[str, Callable[[], Writer]] = {
        "tensorboard": lambda: TensorBoard(folder, last_step),
        "wandb": lambda: WandB(folder, config),
    }
    if unknown := sorted(set(extra) - set(known)):
        raise ValueError(f"writers: got {', '.join(unknown)}, expected {' or '.join(known)}")
    if not is_main:
        return []
    extras = [known[name]() for name in extra]  # first, as one that is not installed must leave no open files
    files: list[Writer] = [TextLog(folder, last_step, trouble), JsonLines(folder, last_step, trouble)]
    return [ConsoleWriter(total_steps, max(last_step, 0), live), *files, *extras]
