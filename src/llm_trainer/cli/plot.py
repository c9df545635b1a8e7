"""`llm-trainer plot`: the curves of one run as a picture."""

from pathlib import Path
from typing import Annotated

import typer

from llm_trainer.cli.plots import LogError, plot_run


def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the save_dir of a run, or its log folder")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="a .png, .svg or .pdf")] = None,
    smooth: Annotated[float, typer.Option(min=0, max=0.99, help="weight of the past")] = 0.0,
) -> None:
    """Draw the curves of a run."""
    logs = run / "log"
    if not logs.is_dir():
        logs = run
    if not (logs / "metrics.jsonl").exists():
        raise LogError(
            f"{run}: found no metrics.jsonl; expected the save_dir of a run that has begun, or its folder of logs"
        )
    typer.echo(plot_run(logs, output or run / "plot.png", smooth))
