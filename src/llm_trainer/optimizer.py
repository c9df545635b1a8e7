"""The public import path of the optimizers; they live in `llm_trainer.optim.optimizers`."""

from llm_trainer.optim.optimizers import configure_optimizer, create_optimizer, get_parameter_groups

__all__ = ["configure_optimizer", "create_optimizer", "get_parameter_groups"]
