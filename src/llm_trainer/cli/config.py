"""`llm-trainer config`: a configuration to start from."""

from typing import Annotated

import typer

from llm_trainer.config.load import example


def config(stage: Annotated[str, typer.Argument(help="pretrain, sft, ...")]) -> None:
    """Print a complete configuration to start from, each key with its meaning."""
    typer.echo(example(stage), nl=False)
