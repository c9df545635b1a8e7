"""Every configuration class under one import path."""

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.files import FileDataset
from llm_trainer.config.schema import (
    DataLoaderConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
)

__all__ = [
    "ConfigError",
    "DataLoaderConfig",
    "EvalConfig",
    "FileDataset",
    "LossConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimConfig",
    "PretrainConfig",
    "RunConfig",
    "SFTConfig",
    "TrainConfig",
]
