"""Every configuration class under one import path."""

from llm_trainer.config.adapters import AdapterConfig
from llm_trainer.config.algorithms import (
    DPOConfig,
    KTOConfig,
    PretrainConfig,
    RewardConfig,
    SFTConfig,
)
from llm_trainer.config.deepspeed import (
    DsActivationCheckpointingConfig,
    DsBf16Config,
    DsConfig,
    DsFp16Config,
    DsOffloadConfig,
    DsZero0Config,
    DsZero1Config,
    DsZero2Config,
    DsZero3Config,
    DsZeROConfig,
)
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.files import FileDataset
from llm_trainer.config.model import ModelConfig, MoeConfig, VLMConfig, VocabularyConfig
from llm_trainer.config.options import FsdpConfig, KDConfig
from llm_trainer.config.ppo import PPOConfig
from llm_trainer.config.quantization import QuantizationConfig
from llm_trainer.config.reinforcement import GenerateConfig, GRPOConfig, ReinforceConfig, ReMaxConfig, RLOOConfig
from llm_trainer.config.schema import DataLoaderConfig, EvalConfig, LossConfig, OptimConfig, RunConfig, TrainConfig
from llm_trainer.config.vision import VisionConfig

__all__ = [
    "AdapterConfig",
    "ConfigError",
    "DPOConfig",
    "DataLoaderConfig",
    "DsActivationCheckpointingConfig",
    "DsBf16Config",
    "DsConfig",
    "DsFp16Config",
    "DsOffloadConfig",
    "DsZeROConfig",
    "DsZero0Config",
    "DsZero1Config",
    "DsZero2Config",
    "DsZero3Config",
    "EvalConfig",
    "FileDataset",
    "FsdpConfig",
    "GRPOConfig",
    "GenerateConfig",
    "KDConfig",
    "KTOConfig",
    "LossConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimConfig",
    "PPOConfig",
    "PretrainConfig",
    "QuantizationConfig",
    "RLOOConfig",
    "ReMaxConfig",
    "ReinforceConfig",
    "RewardConfig",
    "RunConfig",
    "SFTConfig",
    "TrainConfig",
    "VLMConfig",
    "VisionConfig",
    "VocabularyConfig",
]
