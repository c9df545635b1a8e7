"""The table of algorithms: what each is called, which class trains it, and which section of the configuration steers it.

Everything else that knows algorithms by name follows from it: `create_trainer`, the keys of `TrainConfig`, and the commands
`config`, `plan` and `train`. Code from outside adds a line with `llm_trainer.register_algorithm`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from llm_trainer.config.algorithms import DPOConfig, KTOConfig, PretrainConfig, RewardConfig, SFTConfig
from llm_trainer.config.ppo import PPOConfig
from llm_trainer.config.reinforcement import GRPOConfig, ReinforceConfig, ReMaxConfig, RLOOConfig

_MODEL_OF_A_FOLDER = {"model_config": "path/to/model", "tokenizer": "path/to/model"}
_NEW_MODEL = {
    "model_config": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
    "tokenizer": "path/to/tokenizer",
}


@dataclass(frozen=True)
class AlgorithmEntry:
    """One line of the table.

    Attributes:
        trainer: `"module:Class"`, imported when it is asked for.
        section: the class of its section.
        example: the keys, beside its section, that `llm-trainer config` gives it to start from.
    """

    trainer: str
    section: type
    example: Mapping[str, Any] = field(default_factory=lambda: _MODEL_OF_A_FOLDER)

    @property
    def description(self) -> str:
        """What it does, in one line: the first of its section's docstring."""
        first, _, _ = (self.section.__doc__ or "").strip().partition("\n")
        return first.removesuffix(".")

    def load(self) -> Any:
        """The trainer class."""
        module, _, attribute = self.trainer.partition(":")
        return getattr(import_module(module), attribute)


ALGORITHMS: dict[str, AlgorithmEntry] = {
    "pretrain": AlgorithmEntry("llm_trainer.trainers.language:Trainer", PretrainConfig, _NEW_MODEL),
    "sft": AlgorithmEntry("llm_trainer.trainers.language:SFTTrainer", SFTConfig),
    "dpo": AlgorithmEntry("llm_trainer.trainers.preference:DPOTrainer", DPOConfig),
    "kto": AlgorithmEntry("llm_trainer.trainers.unpaired:KTOTrainer", KTOConfig),
    "reward": AlgorithmEntry("llm_trainer.trainers.reward:RewardTrainer", RewardConfig),
    "grpo": AlgorithmEntry("llm_trainer.trainers.grpo:GRPOTrainer", GRPOConfig),
    "rloo": AlgorithmEntry("llm_trainer.trainers.reinforce:RLOOTrainer", RLOOConfig),
    "reinforce": AlgorithmEntry("llm_trainer.trainers.reinforce:ReinforceTrainer", ReinforceConfig),
    "remax": AlgorithmEntry("llm_trainer.trainers.reinforce:ReMaxTrainer", ReMaxConfig),
    "ppo": AlgorithmEntry("llm_trainer.trainers.ppo:PPOTrainer", PPOConfig),
}


def key_of(name: str) -> str:
    """The key of the section of the algorithm called `name`."""
    return f"{name}_config"
