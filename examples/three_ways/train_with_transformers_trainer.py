"""The second of three ways to train a run.yaml: `transformers.Trainer` turns the wheel, for standard work.

    python examples/three_ways/train_with_transformers_trainer.py run.yaml [a.b=c ...]
    torchrun --nproc-per-node=2 examples/three_ways/train_with_transformers_trainer.py run.yaml
    smart_train examples/three_ways/train_with_transformers_trainer.py run.yaml     # whatever this machine has

Data, loss, schedule, logs and checkpoints are the run's, so losses are those of `llm-trainer train`; without a script the
same is `llm-trainer train run.yaml run_config.engine=hf`. With one, everything that is written for transformers fits in:
callbacks, as below, and fields of `TrainingArguments`, as further keywords.
"""

import sys

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_trainer.config.load import load_config
from llm_trainer.config.registry import algorithm
from llm_trainer.engine import dist
from llm_trainer.train import transformers_driver as huggingface
from llm_trainer.trainers import create_trainer


class StopAtLoss(TrainerCallback):
    """An example of a callback: ends the training when the loss is low enough."""

    def __init__(self, enough: float) -> None:
        self.enough = enough

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        control.should_training_stop |= (logs or {}).get("loss", self.enough) < self.enough


def main(path: str, *overrides: str) -> None:
    """Train what a YAML describes."""
    config = load_config(path, [*overrides, "run_config.engine=hf"])
    trainer = create_trainer(algorithm(config, path), train_config=config)
    huggingface.train(trainer, callbacks=[StopAtLoss(0.01)])
    dist.stop()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except ValueError as error:  # something that the user can mend
        sys.exit(f"error: {error}")
