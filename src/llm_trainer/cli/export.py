"""`llm-trainer export`: a trained model in the formats of other tools, proved before it is there."""

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils.logging import disable_progress_bar

from llm_trainer.cli.errors import RunFailed
from llm_trainer.engine.device import DTYPES
from llm_trainer.export.door import export as export_model
from llm_trainer.export.formats import FORMATS
from llm_trainer.export.gate import Refused
from llm_trainer.models.adapter_sums import COMBINATIONS, SUM


def export(
    folder: Annotated[Path, typer.Argument(help="the save_dir of a run, a checkpoint, or a model", metavar="DIR")],
    to: Annotated[str, typer.Option(help="; ".join(f"{name}: {entry.help}" for name, entry in FORMATS.items()))],
    out: Annotated[Path | None, typer.Option(help="the folder to be; default: beside DIR, as DIR-FORMAT")] = None,
    dtype: Annotated[str | None, typer.Option(help=f"of the weights: {', '.join(DTYPES)}; default: as trained")] = None,
    quantize: Annotated[str | None, typer.Option(help="keep weights in fewer bits, where the format has them")] = None,
    weights: Annotated[
        str | None, typer.Option(help="of several adapters, by name: default=0.7,second=0.3", metavar="NAME=W,...")
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option("--with", help="add the adapters of another run on the same base too", metavar="DIR:W"),
    ] = None,
    combine: Annotated[
        str, typer.Option(help=f"several adapters become one by: {', '.join(COMBINATIONS)}; sum is exact")
    ] = SUM,
) -> None:
    """Write a trained model for other tools. It is opened again and compared before it is there; exit code 1: it differs."""
    disable_progress_bar()
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"got {dtype!r}, expected one of {', '.join(DTYPES)}", param_hint="--dtype")
    target = out
    if target is None:
        whole = folder.resolve()
        target = whole.with_name(f"{whole.name}-{to}")
    wanted = None
    if dtype is not None:
        wanted = DTYPES[dtype]
    try:
        made = export_model(
            folder,
            to,
            target,
            dtype=wanted,
            quantize=quantize,
            weights=_weights(weights),
            others=_others(others or []),
            combine=combine,
            say=typer.echo,
        )
    except Refused as refused:
        raise RunFailed(f"{refused}\nNothing was left at {target}") from refused
    typer.echo(f"exported: {made}")


def _others(given: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in given:
        folder, _, number = item.rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            folder = ""
        if not folder:
            raise typer.BadParameter(
                f"got {item!r}, expected DIR:WEIGHT, such as runs/other:0.5", param_hint="--with"
            ) from None
        _refuse_again(folder, found, "--with")
        found[folder] = weight
    return found


def _weights(given: str | None) -> dict[str, float]:
    found: dict[str, float] = {}
    for item in (given or "").split(","):
        if not item.strip():
            continue
        name, _, number = item.partition("=")
        name = name.strip()
        _refuse_again(name, found, "--weights")
        try:
            found[name] = float(number)
        except ValueError:
            raise typer.BadParameter(
                f"got {item!r}, expected NAME=WEIGHT, such as default=0.7", param_hint="--weights"
            ) from None
    return found


def _refuse_again(name: str, found: dict[str, float], option: str) -> None:
    if name in found:
        raise typer.BadParameter(f"got {name!r} twice, expected one weight for each", param_hint=option)
