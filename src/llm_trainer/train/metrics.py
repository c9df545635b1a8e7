"""Metrics: accumulated on the device, summed over ranks and read when they are logged; and the places they go to."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor

from llm_trainer.config.env import set_default

_SLOTS = 2048  # rows of the table of names that ranks sum; a run has tens of names
_WORDS, _BYTES = 16, 5  # a name is 16 integers of 5 bytes: float64 adds 2^13 of them exactly


class Metrics:
    """Weighted means by name. `add` never waits for the device; `reduce` waits once and talks to other ranks once.

    Ranks may add different names (the loss of a dataset that one rank met and another did not): every name has a slot
    in a table of fixed size, by its hash, and carries its spelling along, so the sum of the tables says on every rank
    which names there are. If two names share a slot (2 % for ten), all ranks see it and repeat with a larger table.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        """`device`: where the collective runs; None: where the first added tensor is, else the CPU."""
        self._device = torch.device(device) if device is not None else None
        self._sums: dict[str, tuple[Tensor | float, Tensor | float]] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Adds `total` `[]`, a sum over `count` `[]` terms, to the metric `name`."""
        old_total, old_count = self._sums.get(name, (0.0, 0.0))
        self._sums[name] = (old_total + self._wide(total), old_count + self._wide(count))

    def include(self, other: Metrics) -> None:
        """Adds everything that was added to `other`, which keeps it."""
        for name, (total, count) in other._sums.items():
            self.add(name, total, count)

    def _wide(self, value: Tensor | float) -> Tensor | float:
        """Double precision, so that counts of tokens stay exact; Apple's GPUs have none."""
        if not isinstance(value, Tensor):
            return float(value)
        self._device = self._device or value.device
        return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)

    def state_dict(self, all_reduce: Callable[[Tensor], Tensor] = lambda table: table) -> dict[str, list[float]]:
        """What was added since the last `reduce`, `[total, count]` over all ranks, for a resumed run to go on from."""
        return {name: [total, count] for name, (total, count) in self._totals(all_reduce).items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]], share: float = 1.0) -> None:
        """Puts back what `state_dict` gave; each of several ranks takes its `share`, one over their number."""
        self._sums = {name: (total * share, count * share) for name, (total, count) in state.items()}

    def reduce(self, all_reduce: Callable[[Tensor], Tensor] = lambda table: table) -> dict[str, float]:
        """The means over all ranks since the last call, by name; a name without any terms is left out.

        Args:
            all_reduce: the sum of a tensor over ranks; all ranks must call `reduce` together.
        """
        totals = self._totals(all_reduce)
        self._sums = {}
        return {name: total / count for name, (total, count) in totals.items() if count}

    def _totals(self, all_reduce: Callable[[Tensor], Tensor]) -> dict[str, tuple[float, float]]:
        """Sums and counts over all ranks, in the order of their names."""
        device = self._device if self._device is not None and self._device.type != "mps" else torch.device("cpu")
        names, sums = list(self._sums), [value for pair in self._sums.values() for value in pair]
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in sums]
        scalars = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in moved]
        values = torch.stack(scalars).view(-1, 2) if scalars else torch.zeros(0, 2, dtype=torch.float64, device=device)
        codes = torch.tensor([_encode(name) for name in names], dtype=torch.float64).view(len(names), 2 + _WORDS)
        rows = torch.cat([values, codes.to(device)], dim=1)  # [names, 4 + _WORDS]
        for num_slots in (_SLOTS << doublings for doublings in itertools.count()):
            slots = torch.tensor([_slot(name, num_slots) for name in names], dtype=torch.int64, device=device)
            table = torch.zeros(num_slots, rows.shape[1], dtype=torch.float64, device=device).index_add_(0, slots, rows)
            table = all_reduce(table).cpu()  # the host waits for the device here
            found = {_decode(code): (total, count) for total, count, *code in table[table[:, 2] > 0].tolist()}
            if None not in found:
                break
        return {name: found[name] for name in sorted(name for name in found if name)}


def _slot(name: str, num_slots: int) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") % num_slots


def _encode(name: str) -> list[float]:
    """`[presence, checksum, spelling ...]`; rows of equal names add up to a multiple of it."""
    raw = name.encode()
    if not name or len(raw) > _WORDS * _BYTES:
        raise ValueError(f"metric name {name!r}: expected 1 to {_WORDS * _BYTES} bytes, got {len(raw)}")
    padded = raw.ljust(_WORDS * _BYTES, b"\0")
    words = (int.from_bytes(padded[i : i + _BYTES], "big") for i in range(0, len(padded), _BYTES))
    return [1.0, float(zlib.crc32(raw)), *map(float, words)]


def _decode(row: Sequence[float]) -> str | None:
    """The name that `row`, a sum of equal codes, spells; None when different names met."""
    presence, checksum, *words = row
    if any(word % presence for word in words):
        return None
    raw = b"".join(int(word // presence).to_bytes(_BYTES, "big") for word in words).rstrip(b"\0")
    return raw.decode() if zlib.crc32(raw) * presence == checksum else None


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
        """Shows the headline metrics of a training step, or all metrics of an evaluation."""
        label = f"step {step:,}" + (f"/{self.total_steps:,}" if self.total_steps else "")
        evaluated = [f"{name} {value:.4f}" for name, value in values.items() if name.startswith("eval_")]
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
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leaves the last line on the screen."""
        if self._progress:
            self._progress.stop()


class _LineFile:
    """Lines that are on disk as soon as they are written; a resumed run goes on after the step it resumes from."""

    _STEP = re.compile(r'\bstep(?:=|": )(\d+)\b.*\n')

    def __init__(self, path: Path, last_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._rewind(path, last_step)
        self._file = path.open("a", encoding="utf-8")

    def _rewind(self, path: Path, last_step: int) -> None:
        """Drops lines of steps that will be run again, and a line that was torn when the process died."""
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if (found := self._STEP.search(line)) and int(found[1]) <= last_step]
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text("".join(kept), encoding="utf-8")
        os.replace(partial, path)

    def append(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TextLog:
    """`log.txt`, lines like `2026-01-31 12:00:00 step=10 loss=2.345 ...`, and `lr.txt` with the learning rate alone."""

    def __init__(self, folder: str | Path, last_step: int = -1) -> None:
        """Continues the files in `folder` after `last_step`; -1 begins them anew."""
        self._log = _LineFile(Path(folder) / "log.txt", last_step)
        self._lr = _LineFile(Path(folder) / "lr.txt", last_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; spaces in names become `_`."""
        names = [re.sub(r"[\s=]", "_", name) for name in values]
        pairs = [f"{name}={value:.8g}" for name, value in zip(names, values.values(), strict=True)]
        self._log.append(" ".join([time.strftime("%Y-%m-%d %H:%M:%S"), f"step={step}", *pairs]))
        if "learning_rate" in values:
            self._lr.append(f"step={step} learning_rate={values['learning_rate']:.8g}")

    def close(self) -> None:
        """Closes both files."""
        self._log.close()
        self._lr.close()


class JsonLines:
    """`metrics.jsonl`: an object per line with `step`, `time` (seconds since 1970) and all metrics."""

    def __init__(self, folder: str | Path, last_step: int = -1) -> None:
        """Continues the file in `folder` after `last_step`; -1 begins it anew."""
        self._file = _LineFile(Path(folder) / "metrics.jsonl", last_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Appends a line; JSON has no NaN and no infinity, so both become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.append(json.dumps({"step": step, "time": round(time.time(), 3), **finite}, ensure_ascii=False))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


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
        """Adds one scalar per metric."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
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
        """Logs the metrics of a step."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run."""
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
) -> list[Writer]:
    """The writers of this process: the console, the log files and `extra` on the main one, none on others.

    Args:
        folder: the folder of log.txt, lr.txt and metrics.jsonl.
        is_main: whether this process is the one that writes.
        total_steps: the run's length, for the estimated time of arrival.
        last_step: the step that a resumed run goes on from; -1 for a new run, which begins the files anew.
        extra: `tensorboard`, `wandb`.
        live: a progress bar where the output is a terminal.
        config: the run's settings, for `wandb`.

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
    files: list[Writer] = [TextLog(folder, last_step), JsonLines(folder, last_step)]
    return [ConsoleWriter(total_steps, max(last_step, 0), live), *files, *extras]
