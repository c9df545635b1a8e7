"""llm_trainer: the LLM training framework that a learner can read, an engineer can trust and a cluster can run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trainer.config.registry import register_algorithm
    from llm_trainer.config.section import config_section
    from llm_trainer.optim.optimizers import configure_optimizer, create_optimizer, get_parameter_groups
    from llm_trainer.train.hooks import Hook
    from llm_trainer.trainers import create_trainer, get_trainer_class
    from llm_trainer.trainers.base import BaseTrainer
    from llm_trainer.trainers.distill import Distillation
    from llm_trainer.trainers.language import PretrainTrainer, SFTTrainer, Trainer
    from llm_trainer.trainers.preference import DPOTrainer
    from llm_trainer.trainers.reward import RewardTrainer
    from llm_trainer.trainers.unpaired import KTOTrainer

__version__ = "0.1.0"

_WHERE = {  # public name -> its module; imported on first use (PEP 562), so that `import llm_trainer` costs nothing
    "BaseTrainer": "llm_trainer.trainers.base",
    "Trainer": "llm_trainer.trainers.language",
    "SFTTrainer": "llm_trainer.trainers.language",
    "PretrainTrainer": "llm_trainer.trainers.language",
    "Distillation": "llm_trainer.trainers.distill",
    "DPOTrainer": "llm_trainer.trainers.preference",
    "Hook": "llm_trainer.train.hooks",
    "KTOTrainer": "llm_trainer.trainers.unpaired",
    "RewardTrainer": "llm_trainer.trainers.reward",
    "configure_optimizer": "llm_trainer.optim.optimizers",
    "create_optimizer": "llm_trainer.optim.optimizers",
    "get_parameter_groups": "llm_trainer.optim.optimizers",
    "get_trainer_class": "llm_trainer.trainers",
    "create_trainer": "llm_trainer.trainers",
    "register_algorithm": "llm_trainer.config.registry",
    "config_section": "llm_trainer.config.section",
}

__all__ = [
    "BaseTrainer",
    "DPOTrainer",
    "Distillation",
    "Hook",
    "KTOTrainer",
    "PretrainTrainer",
    "RewardTrainer",
    "SFTTrainer",
    "Trainer",
    "config_section",
    "configure_optimizer",
    "create_optimizer",
    "create_trainer",
    "get_parameter_groups",
    "get_trainer_class",
    "register_algorithm",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'llm_trainer' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
