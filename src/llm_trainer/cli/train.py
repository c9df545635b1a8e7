"""`llm-trainer train`: a run from its YAML file, on all GPUs of this machine."""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import GenerationMixin
from transformers.utils.logging import disable_progress_bar

from llm_trainer.checkpoint import CheckpointError
from llm_trainer.cli import launch
from llm_trainer.cli.errors import RunFailed
from llm_trainer.config.env import environment
from llm_trainer.config.load import load_config
from llm_trainer.config.schema import TrainConfig
from llm_trainer.engine import dist
from llm_trainer.train.guards import NonFiniteError
from llm_trainer.train.signals import TrainingInterrupted
from llm_trainer.trainers import create_trainer
from llm_trainer.trainers.base import BaseTrainer

OUT_OF_MEMORY = (
    "the device is out of memory: lower batch_size, set data_loader_config.micro_batch_tokens, or "
    "run_config.gradient_checkpointing=true"
)


def train(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(metavar="RUN.YAML", help="the configuration of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="a.b=c...", help="changes to it")] = None,
) -> None:
    """Train on all GPUs of this machine, unless run_config.device or PARALLEL_TYPE=none says otherwise."""
    config = load_config(run, overrides or ())
    _start_once_per_gpu(config, context.obj)
    name = algorithm(config, str(run))

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
        raise RunFailed(f"{OUT_OF_MEMORY}. {error}") from error
    if dist.is_main():
        _say_goodbye(trainer)
    dist.stop()


def algorithm(config: TrainConfig, where: str) -> str:
    """The name of the trainer whose section the configuration has.

    Raises:
        ConfigError: there is no such section, or several.
    """
    from llm_trainer.config.errors import ConfigError
    from llm_trainer.trainers import TRAINERS, get_trainer_class

    sections: dict[str, str] = {}
    for name in TRAINERS:
        sections.setdefault(get_trainer_class(name).config_section, name)
    present = [section for section in sections if getattr(config, section) is not None]
    if len(present) != 1:
        found = " and ".join(present) or "none of them"
        raise ConfigError(
            f"{where}: expected exactly one of {', '.join(sections)}, which says how to train; found {found}; "
            + ("remove the others" if present else "add for example `sft_config: {}`")
        )
    return sections[present[0]]


def _start_once_per_gpu(config: TrainConfig, arguments: list[str]) -> None:
    """Start this command once per GPU and do not come back, if there are several and nobody has done so."""
    started = environment().launched or environment().parallel_type == "none"
    if started or config.run_config.device not in (None, "cuda"):
        return
    machine = launch.Machine.look()
    if machine.num_gpus > 1:
        target = ["-m", "llm_trainer.cli.main", *arguments]
        plan = launch.make_plan(target, machine, launch.Nodes(), engine=launch.engine_of(config))
        print(f"found {machine}: {launch.NAMES[plan.kind]}, because {plan.reason}", file=sys.stderr)
        launch.start(plan)


def _say_goodbye(trainer: BaseTrainer) -> None:
    """Where the model and the logs are, and what to do with them."""
    run = trainer.run
    model = run.save_dir / "model"
    if not model.exists():
        return
    print(f"model  {model} (of {model.resolve().parent.name})")
    print(f"logs   {run.log_dir} (llm-trainer plot {run.log_dir})")
    if isinstance(trainer.base_model, GenerationMixin):  # a reward model does not talk
        raw = ""
        if trainer.config_section == "pretrain_config":
            raw = " --raw"
        print(f"chat   llm-trainer chat {model}{raw}")
