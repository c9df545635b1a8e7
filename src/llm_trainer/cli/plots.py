"""`vis_log` and `vis_lr`: the curves of one or several runs as small multiples, in a window, a PNG or an SVG."""

import argparse
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Curves = dict[str, tuple[list[int], list[float]]]
"""Steps and values of each metric."""

_COLORS = ("#3b6fb6", "#d9722e", "#3f9b6c", "#b0476b", "#7a62b8", "#8a7a3d", "#2f9aa8", "#6b6f76")
_INK, _GRID = "#33373d", "#e3e6ea"
_FIRST = ("loss", "reward", "mean_token_accuracy", "learning_rate", "grad_norm", "aux_loss", "entropy", "kl")
_NO_CURVES = (
    "step",
    "time",
    "epoch",
    "num_tokens",
    "choices",
    "adapters",
)  # they say when and by what means, not how well
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
    if not isinstance(found, dict):
        return {}
    return found


def _number(value: object) -> float:
    """A number, or NaN (a gap in the curve) for null and for text."""
    if not isinstance(value, str | int | float):
        return math.nan
    try:
        return float(value)
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
    for line in lines:
        numbers = _numbers(line)
        step = _number(numbers.get("step"))
        if math.isnan(step):
            continue
        for name, value in numbers.items():
            if name not in _NO_CURVES:
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
    mean, mass = 0.0, 0.0
    result = []
    for value in values:
        if not math.isnan(value):
            mean = weight * mean + (1 - weight) * value
            mass = weight * mass + (1 - weight)
        unbiased = mean / mass if mass else math.nan
        result.append(unbiased)
    return result


def _num_shared(paths: Sequence[Sequence[str]]) -> int:
    """How many first components are the same in all paths."""
    count = 0
    for column in zip(*paths, strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def _labels(files: Sequence[Path]) -> list[str]:
    """Names that tell files apart: what is left of their paths without the components that all share."""
    paths = [file.absolute().parts for file in files]
    if len(set(paths)) < 2:
        return [file.name for file in files]
    head = _num_shared(paths)
    tail = _num_shared([path[head:][::-1] for path in paths])
    labels = []
    for path, file in zip(paths, files, strict=True):
        own = path[head : len(path) - tail]
        labels.append("/".join(own) or file.name)
    return labels


def _panels(runs: Mapping[str, Curves]) -> list[str]:
    """One panel per metric, the well-known ones first; `eval_loss` shares the panel of `loss`."""
    names: set[str] = set()
    for curves in runs.values():
        names |= {name.removeprefix("eval_") for name in curves}
    known = [name for name in _FIRST if name in names]
    return known + sorted(names - set(known))


def draw(figure: Figure, runs: Mapping[str, Curves], smooth: float = 0.0) -> None:
    """Draws the curves of all runs, by label, into a figure: one panel per metric, one colour per run."""
    panels = _panels(runs)
    widest = 2 if len(panels) in (2, 4) else 3
    columns = min(len(panels), widest)
    rows = math.ceil(len(panels) / columns)
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
    weight = 0.0 if name == "learning_rate" else smooth  # a schedule has no noise
    for number, (color, curves) in enumerate(zip(_colors(len(runs)), runs.values(), strict=True)):
        width = 1.6 + (1 - (number + 1) / len(runs)) * 2  # equal curves show as stripes
        if name in curves:
            _draw_training(axes, curves[name], weight, color, width)
        if f"eval_{name}" in curves:
            own = color if len(runs) > 1 else _COLORS[1]
            _draw_evaluation(axes, curves[f"eval_{name}"], own, width)

    handles, labels = axes.get_legend_handles_labels()
    kinds = dict(zip(labels, handles, strict=True))
    if len(kinds) > 1:
        axes.legend(kinds.values(), kinds.keys(), frameon=False, fontsize=8, labelcolor=_INK)
    title = name if "train" in kinds else f"eval_{name}"
    axes.set_title(title.replace("_", " "), loc="left", fontsize=10.5, fontweight="bold", color=_INK)
    _style(axes)


def _draw_training(axes: Axes, curve: tuple[list[int], list[float]], weight: float, color: str, width: float) -> None:
    """A curve, and where it is smoothed the noisy one behind it."""
    steps, values = curve
    if weight:
        axes.plot(steps, values, color=color, lw=0.8, alpha=0.3)
    marker = "o" if len(steps) == 1 else ""
    axes.plot(steps, smoothed(values, weight), color=color, lw=width, marker=marker, label="train")


def _draw_evaluation(axes: Axes, curve: tuple[list[int], list[float]], color: str, width: float) -> None:
    """Dashed, with a dot per evaluation."""
    steps, values = curve
    dots: dict[str, Any] = {"marker": "o", "ms": 3.4 + width, "mec": "white", "mew": 0.8}
    axes.plot(steps, values, label="eval", color=color, lw=width - 0.4, ls=(0, (4, 2)), **dots)


def _style(axes: Axes) -> None:
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
    folder = Path(log_dir)
    curves = read_curves(folder / "metrics.jsonl")
    return save({folder.name: curves}, output, smooth)


def _show(runs: Mapping[str, Curves], smooth: float) -> bool:
    """Opens a window and waits for it to be closed; False where there is no display."""
    from matplotlib import pyplot  # NOTE: here, because it looks for a display and chooses a backend when imported

    if pyplot.get_backend().lower() == "agg":  # what matplotlib falls back to without a display
        return False
    draw(pyplot.figure(), runs, smooth)
    pyplot.show()
    return True


def _read_runs(files: Sequence[Path], only: str | None) -> dict[str, Curves]:
    """The curves of each file by its label; of all metrics, or `only` of one."""
    runs: dict[str, Curves] = {}
    for label, file in zip(_labels(files), files, strict=True):
        curves = read_curves(file)
        if only is not None:
            curves = {name: curve for name, curve in curves.items() if name == only}
        runs[label] = curves
    missing = [label for label, curves in runs.items() if not curves]
    if missing:
        raise LogError(f"{', '.join(missing)}: no {only} in it")
    return runs


def _command(name: str, only: str | None, arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(prog=name, description=f"Plot {only or 'every metric'} of one or several runs.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="log.txt, lr.txt or metrics.jsonl")
    parser.add_argument("-o", "--output", type=Path, help="a .png, .svg or .pdf to write instead of opening a window")
    parser.add_argument("--smooth", type=float, default=0.0, metavar="W", help="weight of the past, 0 (none) to 0.99")
    given = parser.parse_args(arguments)
    if not 0 <= given.smooth < 1:
        parser.error(f"--smooth: got {given.smooth}, expected at least 0 and below 1")
    try:
        runs = _read_runs(given.files, only)
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
