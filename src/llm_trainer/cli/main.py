"""`llm-trainer`: train from a YAML file, and what comes before and after it. Heavy imports wait inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_trainer.cli import data
from llm_trainer.cli.chat import chat
from llm_trainer.cli.compare import compare
from llm_trainer.cli.plan import plan
from llm_trainer.cli.score import score

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.base import BaseTrainer

TRACEBACK = "--traceback"

app = typer.Typer(
    help="Train language models from one YAML file.",
    epilog=f"{TRACEBACK}, anywhere in a command, shows where in the code an error came from. "
    "Exit codes: 2 wrong configuration or data, 1 a run that failed, 75 a run that was interrupted and can go on.",
    rich_markup_mode=None,  # rich alone takes longer to import than everything else that --help needs
    pretty_exceptions_enable=False,
    add_completion=False,
    no_args_is_help=True,
)
tokenizers = typer.Typer(help="Make tokenizers.", rich_markup_mode=None, no_args_is_help=True)


class RunFailed(Exception):
    """A run that started and could not go on; the message says why."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; errors that users can mend are one message, without a stack trace."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    wanted = [argument for argument in given if argument != TRACEBACK]
    try:
        app(args=wanted, prog_name="llm-trainer", obj=given)
    except (ValueError, RunFailed, OSError) as error:
        if TRACEBACK in given:
            raise
        is_users = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | PermissionError)
        hint = f"\n({TRACEBACK} shows where this came from)" if type(error) is ValueError else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(2 if is_users else 1)


@app.command()
def train(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="the configuration of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c...", help="changes to it")] = None,
) -> None:
    """Train; on all GPUs of this machine, unless run_config.device or PARALLEL_TYPE=none says otherwise."""
    from llm_trainer.config.load import load_config
    from llm_trainer.config.registry import algorithm

    config = load_config(run, overrides or ())
    _spread_out(config, context.obj)
    name = algorithm(config, str(run))

    import torch
    from transformers.utils.logging import disable_progress_bar

    from llm_trainer.checkpoint import CheckpointError
    from llm_trainer.engine import dist
    from llm_trainer.train.guards import NonFiniteError
    from llm_trainer.train.loop import TrainingInterrupted
    from llm_trainer.trainers import create_trainer

    disable_progress_bar()  # of loading and saving weights; the run has its own
    trainer = create_trainer(name, train_config=config)
    try:
        trainer.train()
    except TrainingInterrupted:
        dist.stop()
        raise
    except (NonFiniteError, CheckpointError) as error:
        raise RunFailed(str(error)) from error
    except torch.OutOfMemoryError as error:
        advice = (
            "lower batch_size, set data_loader_config.micro_batch_tokens, or run_config.gradient_checkpointing=true"
        )
        raise RunFailed(f"the device is out of memory: {advice}. {error}") from error
    if dist.is_main():
        _say_goodbye(trainer)
    dist.stop()


def _spread_out(config: TrainConfig, arguments: list[str]) -> None:
    """Start this command once per GPU, if there are several and nobody has done so."""
    from llm_trainer.config.env import environment

    wanted = config.run_config.device
    if environment().launched or environment().parallel_type == "none" or wanted not in (None, "cuda"):
        return
    from llm_trainer.cli import launch

    machine = launch.Machine.look()
    if machine.num_gpus > 1:
        target = ["-m", "llm_trainer.cli.main", *arguments]
        plan = launch.make_plan(target, machine, launch.Nodes(), engine=launch.engine_of(config))
        print(f"found {machine}: {launch.NAMES[plan.kind]}, because {plan.reason}", file=sys.stderr)
        launch.start(plan)


def _say_goodbye(trainer: BaseTrainer) -> None:
    from transformers import GenerationMixin

    run = trainer.run
    model = run.save_dir / "model"
    if not model.exists():
        return
    print(f"model  {model} (of {model.resolve().parent.name})")
    print(f"logs   {run.log_dir} (llm-trainer plot {run.log_dir})")
    if isinstance(trainer.base_model, GenerationMixin):  # a reward model does not talk
        print(f"chat   llm-trainer chat {model}{' --raw' if trainer.section == 'pretrain_config' else ''}")


@app.command()
def config(
    stage: Annotated[str, typer.Argument(help="pretrain, sft, ...")],
    plugin: Annotated[list[str] | None, typer.Option(help="a module or .py file with an algorithm of your own")] = None,
) -> None:
    """Print a complete configuration to start from, each key with its meaning."""
    from llm_trainer.config.load import example

    typer.echo(example(stage, plugin or ()), nl=False)


@app.command()
def plot(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="the save_dir of a run, or its log folder")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="a .png, .svg or .pdf")] = None,
    smooth: Annotated[float, typer.Option(min=0, max=0.99, help="weight of the past")] = 0.0,
) -> None:
    """Draw the curves of a run."""
    from llm_trainer.cli.plots import plot_run

    logs = run / "log" if (run / "log").is_dir() else run
    typer.echo(plot_run(logs, output or run / "plot.png", smooth))


app.command()(chat)
app.command()(plan)
app.command()(score)
app.command()(compare)
app.add_typer(data.app, name="data")
app.add_typer(tokenizers, name="tokenizer")


@tokenizers.command("train")
def train_tokenizer(
    files: data.Files,
    vocab_size: Annotated[int, typer.Option(min=1, help="number of tokens")],
    out: Annotated[Path, typer.Option(help="folder of the tokenizer")],
) -> None:
    """Train a byte-level BPE tokenizer, with a chat template, on the text of files of any known schema."""
    from llm_trainer.data.check import read_texts
    from llm_trainer.data.encode.tokenizer import train_tokenizer

    tokenizer = train_tokenizer((text for path in files for text in read_texts(path)), vocab_size)
    tokenizer.save_pretrained(out)
    typer.echo(f"{len(tokenizer):,} tokens in {out}")


if __name__ == "__main__":
    main()
