"""The sections of the algorithms: one class each, whose field of `TrainConfig` says which trainer runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.files import Files
from llm_trainer.config.options import KDConfig, ReferenceOptions
from llm_trainer.config.section import config_section


@config_section
class PretrainConfig:
    """Plain language modelling."""

    kd_config: KDConfig | None = Field(default=None, description="knowledge distillation")
    gradient_accumulation_steps: StrictInt = Field(default=1, ge=1, description="micro-batches per optimizer step")

    def __post_init__(self) -> None:
        if self.kd_config is not None and self.kd_config.on_policy_fraction:
            raise ConfigError(
                f"kd_config: on_policy_fraction is {self.kd_config.on_policy_fraction:g}, but pretraining has no prompts "
                "that could be answered; expected 0, or sft_config"
            )


@config_section
class SFTConfig:
    """Supervised fine-tuning on conversations."""

    mask_prompt: StrictBool = Field(
        default=True, description="false: also train on what the user wrote, as train_on: all"
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        default="assistant", description="every answer, the last answer, or everything"
    )
    thinking: Literal["template", "last", "all", "none"] = Field(
        default="template", description="turns that keep their reasoning; template: as the chat template decides"
    )
    freeze_llm_model: StrictBool = Field(
        default=False, description="a vision-language model trains its projector alone, as freeze: [language, vision]"
    )
    image_tags_file_dataset: Files | None = Field(
        default=None,
        description="for each path of file_dataset a csv of its images: a line per row, a column per image, empty: none; null: "
        "the rows name their images",
    )
    pixel_values_provider: Callable[..., Any] | None = Field(
        default=None,
        description="a function of the tags in these files, tags -> pixel_values (Python only); null: they are paths of images",
    )
    kd_config: KDConfig | None = Field(default=None, description="knowledge distillation")
    gradient_accumulation_steps: StrictInt = Field(default=1, ge=1, description="micro-batches per optimizer step")

    def __post_init__(self) -> None:
        if not self.mask_prompt and self.train_on == "last":
            raise ConfigError("mask_prompt: false trains on everything, but train_on is last; remove one of them")
        if self.pixel_values_provider is not None and self.image_tags_file_dataset is None:
            raise ConfigError("pixel_values_provider: without image_tags_file_dataset there are no tags to give it")
        self.train_on = self.train_on if self.mask_prompt else "all"
        self.mask_prompt = self.train_on != "all"


@config_section
class DPOConfig(ReferenceOptions):
    """Preference optimisation on pairs of answers: DPO and its relatives, ORPO, SimPO, CPO."""

    loss_type: str | dict[str, StrictFloat] = Field(
        default="dpo", description="dpo, ipo, orpo, simpo, cpo, ...; or several with weights, {dpo: 0.8, bco_pair: 0.2}"
    )
    loss_beta: StrictFloat = Field(default=0.1, gt=0, description="how strongly the policy is held to the reference")
    loss_label_smoothing: StrictFloat = Field(
        default=0.0, ge=0, lt=0.5, description="share of the labels that are believed to be flipped"
    )
    loss_ipo: StrictBool = Field(default=False, description="older spelling of loss_type: ipo")
    loss_simpo_gamma: StrictFloat = Field(default=0.5, description="target margin of simpo")
    nll_loss_coef: StrictFloat | None = Field(
        default=None, ge=0, description="weight of the chosen answer's NLL; null: 1 for orpo and cpo, else 0"
    )
    nll_norm: Literal["token", "sequence"] = Field(default="token", description="what the NLL is a mean over")
    mask_prompt: StrictBool = Field(default=True, description="false: the NLL counts the prompt's tokens too")
    f_divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = Field(
        default="reverse_kl", description="how the distance from the reference is measured"
    )
    f_alpha: StrictFloat = Field(
        default=0.5,
        gt=0,
        description="alpha of alpha_divergence, as in u^-alpha (Wang et al. 2023); TRL's is 1 - alpha",
    )
    discopop_tau: StrictFloat = Field(default=0.05, gt=0, description="temperature of discopop")
    ld_alpha: StrictFloat = Field(default=0.5, ge=0, le=1, description="weight of ld_dpo's surplus tokens")
    share_prompts: StrictBool = Field(
        default=True, description="run the prompt of a pair once, where attention: blocked can do it"
    )
    precompute_ref_log_probs: StrictBool = Field(
        default=False, description="score the data with the reference once, keep the numbers on disk, free the model"
    )
    gradient_accumulation_steps: StrictInt = Field(default=1, ge=1, description="micro-batches per optimizer step")


@config_section
class KTOConfig(ReferenceOptions):
    """Preference optimisation on single answers that are called good or bad."""

    loss_type: Literal["kto", "apo_zero_unpaired"] = Field(default="kto", description="the loss")
    loss_beta: StrictFloat = Field(default=0.1, gt=0, description="how strongly the policy is held to the reference")
    desirable_weight: StrictFloat = Field(default=1.0, ge=0, description="weight of the good answers")
    undesirable_weight: StrictFloat = Field(default=1.0, ge=0, description="weight of the bad answers")
    gradient_accumulation_steps: StrictInt = Field(default=1, ge=1, description="micro-batches per optimizer step")


@config_section
class RewardConfig:
    """A reward model from pairs of answers, or from answers judged step by step."""

    center_coef: StrictFloat = Field(default=0.0, ge=0, description="weight of the term that keeps rewards around 0")
    use_margin: StrictBool = Field(default=True, description="ask for the margins that the data states")
    share_prompts: StrictBool = Field(
        default=True, description="run the prompt of a pair once, where attention: blocked can do it"
    )
    gradient_accumulation_steps: StrictInt = Field(default=1, ge=1, description="micro-batches per optimizer step")
