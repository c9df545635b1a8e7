"""The sections of reinforcement learning: how completions are drawn, rewarded and learned from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.files import Files
from llm_trainer.config.options import ReferenceOptions
from llm_trainer.config.section import config_section

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "luspo", "sapo", "vespo"]
Advantage = Literal["group", "dr_grpo", "batch", "rloo", "reinforce++", "reinforce++_baseline", "remax", "gdpo"]

WITH_JUDGE = (
    "max_resamplings: got {}, but a reward model judges completions when all of them are there, and then none can be drawn "
    "again; expected 0, or reward functions alone"
)


@config_section
class GenerateConfig:
    """How the policy's completions are drawn."""

    gen_max_seq_len: StrictInt = Field(default=256, ge=1, description="most new tokens of a completion")
    gen_temperature: StrictFloat = Field(
        default=1.0, gt=0, description="divides the logits, in sampling and in learning alike"
    )
    gen_k: StrictInt = Field(default=0, ge=0, description="sample from this many likeliest tokens; 0: all")
    gen_p: StrictFloat = Field(
        default=1.0, gt=0, le=1, description="sample from the likeliest tokens that hold this much probability"
    )
    gen_min_p: StrictFloat = Field(
        default=0.0, ge=0, lt=1, description="only tokens at least this share as likely as the likeliest; 0: all"
    )
    gen_repetition_penalty: StrictFloat = Field(
        default=1.0, gt=0, description="above 1: what was written before is less likely (Keskar et al. 2019)"
    )
    gen_suppress_tokens: list[StrictInt] = Field(default_factory=list, description="token ids that are never drawn")
    gen_stop_strings: list[str] = Field(
        default_factory=list, description="texts that end a completion, beside the template's stop tokens"
    )


@config_section
class RolloutOptions:
    """What is kept of rollouts, and what may become of completions before they are learned from."""

    rewards: list[Any] = Field(
        default_factory=list,
        description="reward functions: exact_match, numeric, math_verify, format, overlong, code, judge, or your own as "
        "file.py:function; or mappings {name: ..., weight: 0.5} with a function's options",
    )
    reward_model_checkpoint: str | None = Field(
        default=None, description="folder of a reward model, which judges completions too"
    )
    reward_model_steps: str | None = Field(
        default=None,
        min_length=1,
        description="text that ends a step of a completion, such as a blank line, where the reward model judges steps (token "
        "classification): its score of a step is a reward of the step's last token; null: it judges whole completions",
    )
    reward_seconds: StrictFloat = Field(default=60.0, gt=0, description="that a call of a reward function may take")
    reward_memory_gb: StrictFloat | None = Field(
        default=4.0, gt=0, description="memory that a reward function may take; null: no limit"
    )
    reward_in_process: StrictBool = Field(
        default=False, description="call reward functions in the process that trains, without limits"
    )
    max_failed_rewards: StrictFloat = Field(
        default=0.5, ge=0, le=1, description="share of rewards that may be missing because a function failed"
    )
    environment: Any = Field(
        default=None,
        description="what the policy talks to in several turns: a class with reset and step, as module:Class or file.py:Class; "
        "or {name: ..., option: ...} with its keywords",
    )
    tools: list[Any] = Field(
        default_factory=list,
        description="functions that the policy may call, as module:function or file.py:function",
    )
    agent: Any = Field(
        default=None,
        description="a function of base_url and row that talks to the policy by the OpenAI chat protocol and returns a reward "
        "or None, as module:function or file.py:function",
    )
    agent_seconds: StrictFloat = Field(
        default=600.0, gt=0, description="that an agent may take for an episode, the policy's turns included"
    )
    max_turns: StrictInt = Field(
        default=16, ge=1, description="turns of the policy in an episode; gen_max_seq_len is of all of them together"
    )
    environment_seconds: StrictFloat = Field(default=60.0, gt=0, description="that a step of an environment may take")
    environment_memory_gb: StrictFloat | None = Field(
        default=4.0, gt=0, description="memory that an environment may take; null: no limit"
    )
    environment_in_process: StrictBool = Field(
        default=False, description="run environments in the process that trains, without limits"
    )
    overlong: Literal["train", "mask"] = Field(
        default="train", description="completions without an end: mask leaves them out of the loss (DAPO)"
    )
    max_staleness: StrictInt = Field(
        default=0,
        ge=0,
        description="above 0 the next rollout is made while one is learned from (asynchronous mode), by weights that are at "
        "most so many optimizer steps old when learning from it begins; 0: they take turns",
    )
    replay_routes: StrictBool = Field(
        default=False,
        description="of a mixture of experts: completions are learned from on the experts that drew them; false: on those that "
        "the weights choose now, which are the same but for rounding while nothing has been learned since",
    )
    off_policy_correction: Literal["none", "truncate", "mask"] | None = Field(
        default=None,
        description="of what the sampler draws otherwise than the trainer scores it, w times as probable: its loss is "
        "multiplied by w, truncated at the cap; or masked outside of floor and cap; null: truncate in asynchronous mode, "
        "else none",
    )
    off_policy_level: Literal["token", "seq"] = Field(
        default="token", description="whether w is of a token, or of its sequence (the product)"
    )
    off_policy_cap: StrictFloat = Field(default=2.0, ge=1, description="the largest w")
    off_policy_floor: StrictFloat = Field(default=0.0, ge=0, lt=1, description="the smallest w that mask keeps")
    max_logp_difference: StrictFloat | None = Field(
        default=None,
        gt=0,
        description="mean difference of log-probs between sampler and trainer from which on the run stops; null: 0.01 in "
        "fp32, 0.1 otherwise",
    )
    rollout_servers: list[str] = Field(
        default_factory=list,
        description="addresses of servers that draw completions (llm-trainer rollout-server); empty: the training process does",
    )
    weight_transport: Literal["files", "nccl"] = Field(
        default="files",
        description="how weights come to them: as files, or over a group of GPUs",
    )
    weight_folder: str | None = Field(
        default=None,
        description="folder of these files, on a file system that trainer and servers share; null: shared memory, for servers "
        "on this machine",
    )
    prompts_per_part: StrictInt | None = Field(
        default=None,
        ge=1,
        description="prompts that are written at once while a rollout is made, which a kill can lose of it per process; null: "
        "few, and a part for every process",
    )
    eval_samples: StrictInt = Field(
        default=1, ge=1, description="completions of each held-out prompt; with several, eval_pass@k is logged"
    )
    pass_reward: StrictFloat = Field(default=1.0, description="reward from which on a completion passes (eval_pass@k)")
    shown_completions: StrictInt = Field(
        default=0, ge=0, description="completions of each rollout that are printed, from the best to the worst"
    )
    keep_rollouts: StrictBool = Field(
        default=False, description="keep rollouts that no checkpoint needs any more, in <save_dir>/rollouts"
    )
    rollouts: str | None = Field(
        default=None, description="folder of another run's rollouts: they are learned from, and nothing is sampled"
    )

    @property
    def default_correction(self) -> Literal["none", "truncate"]:
        """The `off_policy_correction` that belongs to the mode."""
        return "truncate" if self.max_staleness else "none"


@config_section
class PtxOptions:
    """Language modelling that is mixed into the updates of a policy."""

    ptx_coef: StrictFloat = Field(
        default=0.0, ge=0, description="weight of the cross-entropy of further rows in each update; 0: there are none"
    )
    ptx_dataset: Files | None = Field(
        default=None,
        description="these rows, texts or conversations: a path or a list of paths; they begin anew when they end",
    )
    ptx_ratio: StrictFloat = Field(default=1.0, gt=0, description="rows of an update for each of its completions")

    def __post_init__(self) -> None:
        if self.ptx_dataset is not None and not self.ptx_coef:
            raise ConfigError(
                "ptx_dataset: nothing is learned from it, since ptx_coef is 0; set ptx_coef, such as 0.1, or leave it out"
            )


@config_section
class GRPOConfig(GenerateConfig, RolloutOptions, ReferenceOptions, PtxOptions):
    """Reinforcement learning from groups of completions: GRPO and its family, without a critic."""

    group_size: StrictInt = Field(default=12, ge=1, description="completions of each prompt")
    grpo_steps: StrictInt = Field(default=1, ge=1, description="passes over each rollout")
    rows_per_update: StrictInt | None = Field(
        default=None, ge=1, description="completions of an optimizer step, over all devices; null: all of a rollout"
    )
    loss_type: LossType = Field(default="grpo", description="the loss, and what it is a mean of")
    loss_clip_eps: StrictFloat | None = Field(
        default=None,
        ge=0,
        description="how far the ratio may fall below 1; null: what belongs to loss_type, 0.2 for grpo",
    )
    loss_clip_eps_high: StrictFloat | None = Field(
        default=None, ge=0, description="how far it may rise above 1; null: loss_clip_eps, or what belongs to loss_type"
    )
    loss_delta: StrictFloat | None = Field(
        default=None,
        gt=1,
        description="the largest ratio where the advantage is negative; null: none (two-sided clipping)",
    )
    loss_importance_sampling_level: Literal["token", "seq"] | None = Field(
        default=None,
        description="a ratio for each token, or for each sequence (the mean of its logarithms: GSPO); null: what belongs to "
        "loss_type, token for grpo",
    )
    loss_beta: StrictFloat = Field(
        default=0.0, ge=0, description="weight of the KL divergence from the reference; 0: no reference is loaded"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k3", description="how that is estimated (Schulman 2020)")
    kl_in: Literal["loss", "reward"] = Field(default="loss", description="where it is: in the loss, or in the reward")
    kl_bias_correction: StrictBool = Field(
        default=False, description="multiply it by the ratio, which makes its gradient that of the KL off policy too"
    )
    entropy_coef: StrictFloat = Field(default=0.0, ge=0, description="weight of the entropy, which is rewarded")
    advantage: Advantage | None = Field(
        default=None, description="what a completion is compared with; null: what belongs to loss_type"
    )
    max_resamplings: StrictInt = Field(
        default=0,
        ge=0,
        description="how often a group whose rewards are all equal is drawn again, before it is left out (dynamic sampling); "
        "0: it stays, and teaches nothing",
    )
    ref_sync_steps: StrictInt | None = Field(
        default=None,
        ge=1,
        description="the reference moves towards the policy before the first rollout that begins so many optimizer steps after "
        "it last did (TR-DPO); null: it never moves",
    )
    mixup_alpha: StrictFloat = Field(
        default=1.0, gt=0, le=1, description="how far it moves: reference <- alpha * policy + (1 - alpha) * reference"
    )
    share_prompts: StrictBool = Field(
        default=True, description="run the prompt of a group once per micro-batch, where attention can (CPU)"
    )
    gradient_accumulation_steps: StrictInt = Field(
        default=1, ge=1, description="a rollout has batch_size x this x devices prompts"
    )

    def __post_init__(self) -> None:
        PtxOptions.__post_init__(self)
        compares = ("group", "dr_grpo", "batch", "rloo", "gdpo", "reinforce++_baseline")
        kind = self.advantage or "group"
        if self.group_size == 1 and kind in compares:
            raise ConfigError(
                f"group_size: got 1, but advantage {kind} compares a completion with the others of its group, so that nothing "
                "would be learned; expected at least 2, or advantage: reinforce++"
            )
        if self.max_resamplings and self.group_size == 1:
            raise ConfigError(
                f"max_resamplings: got {self.max_resamplings}, but with group_size 1 all rewards of a group are always equal; "
                f"expected 0, or a group_size of at least 2"
            )
        if self.max_resamplings and self.reward_model_checkpoint is not None:
            raise ConfigError(WITH_JUDGE.format(self.max_resamplings))
        has_turns = self.environment is not None or self.agent is not None or self.tools
        if self.advantage == "remax" and has_turns:
            raise ConfigError(
                "advantage: remax compares with the greedy completion of a prompt, and an environment (tools, or an agent) "
                "answers it in several turns; expected another advantage, such as rloo"
            )
        if self.advantage == "remax" and self.rollouts is not None:
            raise ConfigError(
                "rollouts: another run's are learned from, and advantage remax compares with the greedy completion of each "
                "prompt, which that run need not have; leave rollouts out, or take another advantage"
            )
        if self.mixup_alpha != 1 and self.ref_sync_steps is None:
            raise ConfigError(
                f"mixup_alpha: got {self.mixup_alpha:g}, but the reference never moves; expected ref_sync_steps, the number of "
                "optimizer steps after which it does, such as 512"
            )
        if self.ref_sync_steps is not None and not self.loss_beta:
            raise ConfigError(
                f"ref_sync_steps: got {self.ref_sync_steps}, but there is no reference that could move; expected a weight of "
                "the KL from it above 0 (loss_beta, or kl_coef as a keyword)"
            )
        if self.ref_sync_steps is not None and self.rollouts is not None:
            raise ConfigError(
                "ref_sync_steps: the rollouts of another run are learned from, which have the log-probs of its reference; "
                "leave it out, or leave rollouts out and let this run sample"
            )
        if self.gen_repetition_penalty != 1 and (self.off_policy_correction or self.default_correction) == "none":
            raise ConfigError(
                f"gen_repetition_penalty: got {self.gen_repetition_penalty:g}: tokens are then drawn from another distribution "
                "than the policy's own, which learns; set off_policy_correction to truncate or mask, or leave it at 1"
            )


@config_section
class _BaselineConfig(GRPOConfig):
    """What estimators with a plain baseline have in common: the KL is a part of the reward."""

    advantage: Advantage = Field(  # type: ignore[assignment]  # None is its default, and not the choice of loss_type
        default="rloo", description="what a completion is compared with"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = Field(default="k1", description="how the KL is estimated (Schulman 2020)")
    kl_in: Literal["loss", "reward"] = Field(default="reward", description="where it is: in the loss, or in the reward")


@config_section
class RLOOConfig(_BaselineConfig):
    """Reinforcement learning with the mean of a group's other completions as baseline: RLOO."""

    group_size: StrictInt = Field(default=4, ge=1, description="completions of each prompt")
    loss_type: LossType = Field(default="dr_grpo", description="the loss, and what it is a mean of")


@config_section
class ReinforceConfig(_BaselineConfig):
    """Reinforcement learning with the mean of all completions as baseline: REINFORCE++."""

    group_size: StrictInt = Field(default=1, ge=1, description="completions of each prompt")
    loss_type: LossType = Field(default="bnpo", description="the loss, and what it is a mean of")
    advantage: Advantage = Field(default="reinforce++", description="what a completion is compared with")


@config_section
class ReMaxConfig(_BaselineConfig):
    """Reinforcement learning with the reward of the prompt's greedy completion as baseline: ReMax."""

    group_size: StrictInt = Field(default=1, ge=1, description="completions of each prompt, beside the greedy one")
    loss_type: LossType = Field(default="dr_grpo", description="the loss, and what it is a mean of")
    advantage: Advantage = Field(default="remax", description="what a completion is compared with")
