"""llm_trainer: the LLM training framework that a learner can read, an engineer can trust and a cluster can run."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_trainer.config.adapters import AdapterConfig as AdapterConfig
    from llm_trainer.config.files import FileDataset as FileDataset
    from llm_trainer.config.registry import register_algorithm as register_algorithm
    from llm_trainer.config.section import config_section as config_section
    from llm_trainer.models.adapters import adapt as adapt
    from llm_trainer.optim.groups import get_parameter_groups as get_parameter_groups
    from llm_trainer.optim.optimizers import configure_optimizer as configure_optimizer
    from llm_trainer.optim.optimizers import create_optimizer as create_optimizer
    from llm_trainer.train.hooks import Hook as Hook
    from llm_trainer.trainers import create_trainer as create_trainer
    from llm_trainer.trainers import get_trainer_class as get_trainer_class
    from llm_trainer.trainers.base import BaseTrainer as BaseTrainer
    from llm_trainer.trainers.distill import Distillation as Distillation
    from llm_trainer.trainers.grpo import GRPOTrainer as GRPOTrainer
    from llm_trainer.trainers.language import PretrainTrainer as PretrainTrainer
    from llm_trainer.trainers.language import SFTTrainer as SFTTrainer
    from llm_trainer.trainers.language import Trainer as Trainer
    from llm_trainer.trainers.ppo import PPOTrainer as PPOTrainer
    from llm_trainer.trainers.preference import DPOTrainer as DPOTrainer
    from llm_trainer.trainers.reinforce import ReinforceTrainer as ReinforceTrainer
    from llm_trainer.trainers.reinforce import ReMaxTrainer as ReMaxTrainer
    from llm_trainer.trainers.reinforce import RLOOTrainer as RLOOTrainer
    from llm_trainer.trainers.reward import RewardTrainer as RewardTrainer
    from llm_trainer.trainers.unpaired import KTOTrainer as KTOTrainer

__version__ = "0.1.0"

_WHERE = {  # public name -> its module; imported on first use (PEP 562), so that `import llm_trainer` costs nothing
    "AdapterConfig": "llm_trainer.config.adapters",
    "BaseTrainer": "llm_trainer.trainers.base",
    "Trainer": "llm_trainer.trainers.language",
    "SFTTrainer": "llm_trainer.trainers.language",
    "PretrainTrainer": "llm_trainer.trainers.language",
    "Distillation": "llm_trainer.trainers.distill",
    "DPOTrainer": "llm_trainer.trainers.preference",
    "GRPOTrainer": "llm_trainer.trainers.grpo",
    "PPOTrainer": "llm_trainer.trainers.ppo",
    "FileDataset": "llm_trainer.config.files",
    "Hook": "llm_trainer.train.hooks",
    "KTOTrainer": "llm_trainer.trainers.unpaired",
    "ReMaxTrainer": "llm_trainer.trainers.reinforce",
    "RLOOTrainer": "llm_trainer.trainers.reinforce",
    "ReinforceTrainer": "llm_trainer.trainers.reinforce",
    "RewardTrainer": "llm_trainer.trainers.reward",
    "adapt": "llm_trainer.models.adapters",
    "configure_optimizer": "llm_trainer.optim.optimizers",
    "create_optimizer": "llm_trainer.optim.optimizers",
    "get_parameter_groups": "llm_trainer.optim.groups",
    "get_trainer_class": "llm_trainer.trainers",
    "create_trainer": "llm_trainer.trainers",
    "register_algorithm": "llm_trainer.config.registry",
    "config_section": "llm_trainer.config.section",
}

__all__ = [*_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'llm_trainer' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
