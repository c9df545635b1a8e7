"""The section of PPO: the critic, what its rewards are made of, and how a rollout is learned from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.optim import OptimConfig
from llm_trainer.config.options import ReferenceOptions
from llm_trainer.config.reinforcement import GenerateConfig, PtxOptions, RolloutOptions
from llm_trainer.config.section import config_section


@config_section
class PPOConfig(GenerateConfig, RolloutOptions, ReferenceOptions, PtxOptions):
    """Reinforcement learning with a critic, which says what each token is worth (PPO)."""

    ppo_epochs: StrictInt = Field(default=4, ge=1, description="passes over each rollout")
    ppo_batch_size: StrictInt | None = Field(
        default=None, ge=1, description="completions of an update, over all devices; null: a whole rollout"
    )
    completions_per_prompt: StrictInt = Field(default=1, ge=1, description="completions of each prompt")
    clip_eps: StrictFloat = Field(default=0.1, ge=0, description="how far the ratio of a token may move from 1")
    entropy_coef: StrictFloat = Field(default=0.0, ge=0, description="weight of the entropy, which is rewarded")
    gamma: StrictFloat = Field(default=1.0, ge=0, le=1, description="discount of what comes a token later")
    lam: StrictFloat = Field(
        default=0.95, ge=0, le=1, description="lambda of GAE: 0 trusts the critic, 1 the rewards alone"
    )
    whiten_advantages: StrictBool = Field(
        default=True, description="advantages have mean 0 and variance 1 over the tokens of a rollout"
    )
    vf_coef: StrictFloat = Field(default=0.5, ge=0, description="weight of the critic's loss beside the policy's")
    value_clip_eps: StrictFloat | None = Field(
        default=0.2,
        gt=0,
        description="how far a value may move from that of the rollout and still count; null: any way",
    )
    critic_warmup_steps: StrictInt = Field(
        default=0, ge=0, description="updates at the beginning in which the critic learns alone"
    )
    value_model_checkpoint: str | None = Field(
        default=None,
        description="folder of the critic's first weights: a reward model, or a language model, which gets a new head; null: "
        "the policy's",
    )
    critic_on_policy: StrictBool | None = Field(
        default=None,
        description="the critic is a head on the policy's own body, which learns from both; null: where only adapters learn",
    )
    value_optim_config: OptimConfig | None = Field(
        default=None,
        description="learning rate, weight decay, betas, eps and momentum of the critic; null: those of optim_config",
    )
    kl_beta: StrictFloat = Field(
        default=0.02, ge=0, description="what the KL from the reference costs per nat; 0: no reference is loaded"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(
        default="k1", description="how the KL of a token is estimated (Schulman 2020)"
    )
    kl_target: StrictFloat | None = Field(
        default=None, gt=0, description="nats per completion that kl_beta is adapted to; null: kl_beta stays"
    )
    kl_horizon: StrictFloat = Field(
        default=10_000.0, gt=0, description="completions over which an adaptive kl_beta follows"
    )
    missing_eos_penalty: StrictFloat | None = Field(
        default=None, ge=0, description="taken from the reward of a completion without an end; null: nothing"
    )
    normalize_rewards: StrictBool = Field(default=False, description="rewards have mean 0 and variance 1")
    normalize_method: Literal["RunningMeanStd", "BatchStd"] = Field(
        default="RunningMeanStd", description="over all rewards so far, or over those of a rollout"
    )
    whiten_rewards: StrictBool = Field(
        default=False, description="rewards of tokens, KL included, have variance 1 over a rollout; their mean stays"
    )
    gradient_accumulation_steps: StrictInt = Field(
        default=1, ge=1, description="a rollout has batch_size x this x devices prompts"
    )

    def __post_init__(self) -> None:
        PtxOptions.__post_init__(self)
        if self.value_optim_config is not None:
            _check_group(self.value_optim_config)
        if self.gen_repetition_penalty != 1 and (self.off_policy_correction or self.default_correction) == "none":
            raise ConfigError(
                f"gen_repetition_penalty: got {self.gen_repetition_penalty:g}: tokens are then drawn from another distribution "
                "than the policy's own, which learns; set off_policy_correction to truncate or mask, or leave it at 1"
            )
        if self.kl_target is not None and not self.kl_beta:
            raise ConfigError(
                "kl_target: kl_beta is 0, which stays 0 whatever it is multiplied by; give it a first value"
            )
        if self.critic_on_policy and self.value_model_checkpoint is not None:
            raise ConfigError(
                "critic_on_policy: value_model_checkpoint gives the critic a body of its own; remove one of them"
            )


# What a group of parameters can have of its own; the rest is the optimizer's, or its schedule's.
_OF_A_GROUP = {"initial_lr", "max_lr", "weight_decay", "betas", "eps", "momentum"}


def _check_group(section: OptimConfig) -> None:
    """
    Raises:
        ConfigError: the critic is to have something that all parameters have in common.
    """
    default = OptimConfig()
    for name in fields_of(OptimConfig):
        if name not in _OF_A_GROUP and getattr(section, name) != getattr(default, name):
            raise ConfigError(
                f"value_optim_config: {name} is of the whole run, whose optimizer and schedule serve policy and critic; set it "
                f"in optim_config. The critic may have its own {', '.join(sorted(_OF_A_GROUP))}"
            )
