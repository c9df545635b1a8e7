"""`vis_log` and `vis_lr`: the curves of one or several runs as small multiples, in a window, a PNG or an SVG."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = dict[str, tuple[list[int], list[float]]]
"""Steps and values of each metric."""

_COLORS = ("#3b6fb6", "#d9722e", "#3f9b6c", "#b0476b", "#7a62b8", "#8a7a3d", "#2f9aa8", "#6b6f76")
_INK, _GRID = "#33373d", "#e3e6ea"
_FIRST = ("loss", "reward", "mean_token_accuracy", "learning_rate", "grad_norm", "aux_loss", "entropy", "kl")
_CLOCKS = ("step", "time", "epoch", "num_tokens")  # they say when, not how well
_PAIR = re.compile(r"(\S+?)=(\S+)")


class LogError(ValueError):
    """A file that holds no curves; the message says which and why."""


def _numbers(line: str) -> Mapping[str, object]:
    """The names and values of a line of log.txt, lr.txt or metrics.jsonl; empty for any other line."""
    if not line.startswith("{"):
        return dict(_PAIR.findall(line))
    try:
        found = json.loads(line)
    except json.JSONDecodeError:  # the run may be writing this line just now
        return {}
    return found if isinstance(found, dict) else {}


def _number(value: object) -> float:
    """A number, or NaN (a gap in the curve) for null and for text."""
    try:
        return float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        return math.nan


def read_curves(path: str | Path) -> Curves:
    """The curves in a `log.txt`, `lr.txt` or `metrics.jsonl`.

    Raises:
        LogError: when the file is missing, empty, or none of the three.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"{path}: cannot be read as a text file: {error}") from None
    if not any(lines):
        raise LogError(f"{path}: the file is empty; has the run logged its first step?")
    curves: Curves = {}
    for numbers in map(_numbers, lines):
        step = _number(numbers.get("step"))
        if math.isnan(step):
            continue
        for name, value in numbers.items():
            if name not in _CLOCKS:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(int(step))
                values.append(_number(value))
    if not curves:
        raise LogError(
            f"{path}: no line with a step and a metric; expected a log.txt, lr.txt or metrics.jsonl of a run"
        )
    return curves


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average with bias correction (Kingma & Ba 2015, https://arxiv.org/abs/1412.6980, section 3).

    `m_t = weight * m_(t-1) + (1 - weight) * x_t`, divided by `1 - weight^t`; NaN is passed over.
    """
    mean, mass, result = 0.0, 0.0, []
    for value in values:
        if not math.isnan(value):
            mean, mass = weight * mean + (1 - weight) * value, weight * mass + (1 - weight)
        result.append(mean / mass if mass else math.nan)
    return result


def _num_shared(parts: Sequence[Sequence[str]]) -> int:
    """How many first parts are the same everywhere."""
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*parts, strict=False)))


def _labels(paths: Sequence[Path]) -> list[str]:
    """Names that tell files apart: what is left of their paths without the parts that all share."""
    parts = [path.absolute().parts for path in paths]
    if len(set(parts)) < 2:
        return [path.name for path in paths]
    head = _num_shared(parts)
    tail = _num_shared([part[head:][::-1] for part in parts])
    return ["/".join(part[head : len(part) - tail]) or path.name for part, path in zip(parts, paths, strict=True)]


def _panels(runs: Mapping[str, Curves]) -> list[str]:
    """One panel per metric, the well-known ones first; `eval_loss` shares the panel of `loss`."""
    names = {name for curves in runs.values() for name in curves}
    bases = {name.removeprefix("eval_") for name in names}
    return sorted(bases, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))


def draw(figure: Figure, runs: Mapping[str, Curves], smooth: float = 0.0) -> None:
    """Draws the curves of all runs, by label, into a figure: one panel per metric, one colour per run."""
    panels = _panels(runs)
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    rows = -(-len(panels) // columns)
    figure.set_size_inches(max(4.4 * columns, 7.0), max(2.9 * rows, 3.6))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    for number, name in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        _draw_panel(axes, name, runs, smooth)
        if number > len(panels) - columns:
            axes.set_xlabel("step", color=_INK, fontsize=9)
    if len(runs) > 1:
        handles = [figure.axes[0].plot([], [], color=color, lw=2)[0] for color in _colors(len(runs))]
        figure.legend(handles, list(runs), loc="outside upper left", ncols=4, frameon=False, labelcolor=_INK)


def _colors(number: int) -> Iterator[str]:
    return (_COLORS[index % len(_COLORS)] for index in range(number))


def _draw_panel(axes: Axes, name: str, runs: Mapping[str, Curves], smooth: float) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    weight = 0.0 if name == "learning_rate" else smooth  # a schedule has no noise
    for number, (color, curves) in enumerate(zip(_colors(len(runs)), runs.values(), strict=True)):
        width = 1.6 + (1 - (number + 1) / len(runs)) * 2  # equal curves show as stripes
        if name in curves:
            steps, values = curves[name]
            if weight:
                axes.plot(steps, values, color=color, lw=0.8, alpha=0.3)
            marker = "o" if len(steps) == 1 else ""
            axes.plot(steps, smoothed(values, weight), color=color, lw=width, marker=marker, label="train")
        if f"eval_{name}" in curves:
            own = color if len(runs) > 1 else _COLORS[1]
            style = {"color": own, "lw": width - 0.4, "ls": (0, (4, 2)), "marker": "o", "mec": "white", "mew": 0.8}
            axes.plot(*curves[f"eval_{name}"], label="eval", ms=3.4 + width, **style)  # type: ignore[arg-type]
    handles, labels = axes.get_legend_handles_labels()
    kinds = dict(zip(labels, handles, strict=True))
    if len(kinds) > 1:
        axes.legend(kinds.values(), kinds.keys(), frameon=False, fontsize=8, labelcolor=_INK)
    title = name if "train" in kinds else f"eval_{name}"
    axes.set_title(title.replace("_", " "), loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    axes.grid(color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b9bec6")
    axes.tick_params(colors="#6a7079", labelsize=8.5, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.02, y=0.08)


def save(runs: Mapping[str, Curves], output: str | Path, smooth: float = 0.0) -> Path:
    """Writes the curves as PNG, SVG or PDF, by the suffix of `output`.

    Raises:
        LogError: when the suffix is none of them.
    """
    from matplotlib.figure import Figure

    output = Path(output)
    if output.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise LogError(f"{output}: expected a name that ends in .png, .svg or .pdf")
    figure = Figure()
    draw(figure, runs, smooth)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=160, facecolor="white")
    return output


def plot_run(log_dir: str | Path, output: str | Path, smooth: float = 0.0) -> Path:
    """Draws all metrics of the run that logged to `log_dir` into the file `output`, and returns its path."""
    return save({Path(log_dir).name: read_curves(Path(log_dir) / "metrics.jsonl")}, output, smooth)


def _show(runs: Mapping[str, Curves], smooth: float) -> bool:
    """Opens a window and waits for it to be closed; False where there is no display."""
    from matplotlib import pyplot

    if pyplot.get_backend().lower() == "agg":  # what matplotlib falls back to without a display
        return False
    draw(pyplot.figure(), runs, smooth)
    pyplot.show()
    return True


def _command(name: str, only: str | None, arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog=name, description=f"Plot {only or 'every metric'} of one or several runs.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="log.txt, lr.txt or metrics.jsonl")
    parser.add_argument("-o", "--output", type=Path, help="a .png, .svg or .pdf to write instead of opening a window")
    parser.add_argument("--smooth", type=float, default=0.0, metavar="W", help="weight of the past, 0 (none) to 0.99")
    given = parser.parse_args(arguments)
    if not 0 <= given.smooth < 1:
        parser.error(f"--smooth: got {given.smooth}, expected at least 0 and below 1")
    try:
        runs = {label: read_curves(path) for label, path in zip(_labels(given.files), given.files, strict=True)}
        if only is not None:
            runs = {label: {n: c for n, c in curves.items() if n == only} for label, curves in runs.items()}
            if missing := [label for label, curves in runs.items() if not curves]:
                raise LogError(f"{', '.join(missing)}: no {only} in it")
        if given.output is None and _show(runs, given.smooth):
            return
        print(save(runs, given.output or given.files[0].with_suffix(".png"), given.smooth))
    except LogError as error:
        parser.error(str(error))


def vis_log(arguments: Sequence[str] | None = None) -> None:
    """Plots every metric of `log.txt` files."""
    _command("vis_log", None, arguments)


def vis_lr(arguments: Sequence[str] | None = None) -> None:
    """Plots the learning rate of `lr.txt` files."""
    _command("vis_lr", "learning_rate", arguments)
