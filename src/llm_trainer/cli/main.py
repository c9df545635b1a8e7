"""`llm-trainer`: the table of its commands. A command's file is imported when the command is used, so `--help` is quick."""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import typer
from typer.core import TyperGroup

from llm_trainer.cli.collector import collector_waits
from llm_trainer.cli.errors import RunFailed
from llm_trainer.terminal import printable

TRACEBACK = "--traceback"


class Entry(NamedTuple):
    """Where a command is (`module:function`, or `module:app` of a group of commands), and its line of help."""

    target: str
    help: str


COMMANDS = {
    "train": Entry("llm_trainer.cli.train:train", "Train from a YAML file, on all GPUs of this machine."),
    "config": Entry("llm_trainer.cli.config:config", "Print a complete configuration to start from."),
    "plot": Entry("llm_trainer.cli.plot:plot", "Draw the curves of a run."),
    "chat": Entry("llm_trainer.cli.chat:chat", "Talk to a saved model."),
    "export": Entry("llm_trainer.cli.export:export", "Write a trained model for other tools, and prove it."),
    "plan": Entry("llm_trainer.cli.plan:plan", "Plan a run on GPUs that are not here."),
    "score": Entry("llm_trainer.cli.score:score", "Score answers or their steps with a reward model."),
    "rollouts": Entry("llm_trainer.cli.rollouts:rollouts", "Show what a policy has written, and what it was worth."),
    "rollout-server": Entry(
        "llm_trainer.cli.rollout_server:rollout_server", "Start a vLLM server that draws completions for a trainer."
    ),
    "compare": Entry("llm_trainer.cli.compare:compare", "Train one YAML file with several engines and compare."),
    "data": Entry("llm_trainer.cli.data:app", "Look at training data, and turn it into tokens."),
    "tokenizer": Entry("llm_trainer.cli.tokenizer:app", "Train tokenizers."),
}


class LazyCommands(TyperGroup):
    """The commands of `COMMANDS`; only the one that is called is imported."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import the command, or None where the table has no such name."""
        entry = COMMANDS.get(cmd_name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        with collector_waits():
            found = getattr(import_module(module), attribute)
        if isinstance(found, typer.Typer):
            return typer.main.get_group(found)
        # rich alone takes longer to import than everything else that --help needs
        one = typer.Typer(add_completion=False, rich_markup_mode=None)
        one.command(cmd_name)(found)
        return typer.main.get_command(one)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The lines of help come from the table: click would import every command for them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


commands = LazyCommands(
    name="llm-trainer",
    help="Train language models from one YAML file.",
    epilog=f"{TRACEBACK}, anywhere in a command, shows where in the code an error came from. "
    "Exit codes: 2 wrong configuration or data, 1 a run that failed, 75 a run that was interrupted and can go on.",
    rich_markup_mode=None,
    no_args_is_help=True,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. Errors that users can fix are one message, without a stack trace."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    wanted = [argument for argument in given if argument != TRACEBACK]
    try:
        commands.main(args=wanted, prog_name="llm-trainer", obj=given)
    except (ValueError, RunFailed, OSError) as error:
        if TRACEBACK in given:
            raise
        # A subclass of ValueError is ours and explains itself; a bare one may come from a library.
        hint = ""
        if type(error) is ValueError:
            hint = f"\n({TRACEBACK} shows where this came from)"
        print(printable(f"error: {error}{hint}"), file=sys.stderr)
        if isinstance(error, ValueError | FileNotFoundError | NotADirectoryError | PermissionError):
            sys.exit(2)
        sys.exit(1)


if __name__ == "__main__":
    main()
