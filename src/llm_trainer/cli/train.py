"""`llm-trainer train`, as far as it is quick: read the YAML file, and start once per GPU. `training.py` does the rest."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from llm_trainer.cli.collector import collector_waits
from llm_trainer.config.env import environment
from llm_trainer.config.load import load_config
from llm_trainer.config.registry import algorithm
from llm_trainer.config.schema import TrainConfig
from llm_trainer.terminal import waiting


def train(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="the configuration of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c...", help="changes to it")] = None,
) -> None:
    """Train on all GPUs of this machine, unless run_config.device or PARALLEL_TYPE=none says otherwise."""
    config = load_config(run, overrides or ())
    name = algorithm(config, str(run))

    # A mistake in the file has been said by now: the libraries that train take seconds to import.
    _start_once_per_gpu(config, context.obj)
    with waiting("importing torch and transformers", speaks=environment().rank == 0), collector_waits():
        from llm_trainer.cli.training import run_training

    run_training(config, name)


def _start_once_per_gpu(config: TrainConfig, arguments: list[str]) -> None:
    """Start this command once per GPU and do not come back, if there are several and nobody has done so."""
    started = environment().launched or environment().parallel_type == "none"
    if started or config.run_config.device not in (None, "cuda"):
        return
    from llm_trainer.cli import launch  # which asks torch for GPUs

    machine = launch.Machine.look()
    if machine.num_gpus > 1:
        target = ["-m", "llm_trainer.cli.main", *arguments]
        plan = launch.make_plan(target, machine, launch.Nodes(), engine=launch.engine_of(config))
        print(f"found {machine}: {launch.NAMES[plan.kind]}, because {plan.reason}", file=sys.stderr)
        launch.start(plan)
