"""REINFORCE with three baselines: GRPO's trainer with other defaults."""

from llm_trainer.config.reinforcement import ReinforceConfig, ReMaxConfig, RLOOConfig
from llm_trainer.trainers.grpo import GRPOTrainer


class RLOOTrainer(GRPOTrainer):
    """A completion is compared with the mean of the others of its group (Ahmadian et al. 2024, arXiv:2402.14740)."""

    section = "rloo_config"
    options = RLOOConfig


class ReinforceTrainer(GRPOTrainer):
    """A completion is compared with all others of the rollout: REINFORCE++ (Hu 2025, arXiv:2501.03262)."""

    section = "reinforce_config"
    options = ReinforceConfig
    default_samples = 1


class ReMaxTrainer(GRPOTrainer):
    """A completion is compared with the greedy one of its prompt, which is drawn as well (Li et al. 2023, arXiv:2310.10505)."""

    section = "remax_config"
    options = ReMaxConfig
    default_samples = 1
