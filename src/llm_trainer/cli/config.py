"""`llm-trainer config`: a configuration to start from."""

from typing import Annotated

import typer

from llm_trainer.config.load import example


def config(
    stage: Annotated[str, typer.Argument(help="pretrain, sft, ...")],
    plugin: Annotated[list[str] | None, typer.Option(help="a module or .py file with an algorithm of your own")] = None,
) -> None:
    """Print a complete configuration to start from, each key with its meaning."""
    typer.echo(example(stage, plugin or ()), nl=False)
