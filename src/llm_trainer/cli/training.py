"""A run that was read from a YAML file: train it, say why it failed, and what to do with what came of it."""

import torch
from transformers import GenerationMixin
from transformers.utils.logging import disable_progress_bar

from llm_trainer.checkpoint import CheckpointError
from llm_trainer.cli.errors import RunFailed
from llm_trainer.cli.executable import typed
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.rollout_unlearned import NothingLearned
from llm_trainer.engine import dist
from llm_trainer.engine.out_of_memory import OutOfMemoryError
from llm_trainer.generation.verify import WrongWeights
from llm_trainer.rewards.functions import RewardError
from llm_trainer.train.guards import NonFiniteError
from llm_trainer.train.learning import NothingCounts
from llm_trainer.train.signals import TrainingInterrupted
from llm_trainer.trainers import create_trainer
from llm_trainer.trainers.base import BaseTrainer

# They explain themselves.
FAILURES = (
    NonFiniteError,
    NothingCounts,
    NothingLearned,
    CheckpointError,
    OutOfMemoryError,
    RewardError,
    WrongWeights,
)
OUT_OF_MEMORY = (
    "the device is out of memory: lower batch_size, set data_loader_config.micro_batch_tokens, or "
    "run_config.gradient_checkpointing=true"
)


def run_training(config: TrainConfig, name: str) -> None:
    """Train with the trainer called `name`.

    Raises:
        RunFailed: the run started and could not go on.
    """
    disable_progress_bar()  # of loading and saving weights; the run has its own
    trainer = create_trainer(name, train_config=config)
    try:
        trainer.train()
    except TrainingInterrupted:
        dist.stop()
        raise
    except FAILURES as error:
        raise RunFailed(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise RunFailed(f"{OUT_OF_MEMORY}. {error}") from error
    if dist.is_main():
        _say_goodbye(trainer)
    dist.stop()


def _say_goodbye(trainer: BaseTrainer) -> None:
    """Where the model and the logs are, and what to do with them."""
    run = trainer.run
    model = run.save_dir / "model"
    if not model.exists():
        return
    print(f"model  {model} (of {model.resolve().parent.name})")
    print(f"logs   {run.log_dir} ({typed()} plot {run.log_dir})")
    if isinstance(trainer.base_model, GenerationMixin):  # a reward model does not talk
        raw = " --raw" if trainer.prompt_format == "text" else ""
        print(f"chat   {typed()} chat {model}{raw}")
