"""Proximal policy optimisation with a critic: InstructGPT's use of PPO on completions that the policy samples itself."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.config.errors import fields_of
from llm_trainer.config.ppo import PPOConfig
from llm_trainer.data.collate import laying
from llm_trainer.data.rollout_source import RolloutSource
from llm_trainer.data.rollouts import FINISHES, NO_REWARD, Finished, Maker, Rollout, collate_rollout
from llm_trainer.image_batch import moved
from llm_trainer.losses.advantages import weighted_rewards
from llm_trainer.losses.chunked import Objective
from llm_trainer.losses.language import mean_over
from llm_trainer.losses.policy import PolicyLoss, PolicyTokens
from llm_trainer.losses.sequences import Sequences
from llm_trainer.losses.value import value_loss
from llm_trainer.models.critic import Acted, ActorCritic, OwnCritic, critic_of, reader_of
from llm_trainer.models.freezing import see_alike
from llm_trainer.models.frozen import choose_reference
from llm_trainer.models.packing import packing_of
from llm_trainer.models.scored import scored
from llm_trainer.optim.extend import add_groups
from llm_trainer.trainers.answers import Batch, count_tokens
from llm_trainer.trainers.completions import given_logprobs
from llm_trainer.trainers.critics import CRITIC, check_learns, critic_of_folder, group_options, let_critic_alone
from llm_trainer.trainers.learned import of_learning, with_cuts
from llm_trainer.trainers.on_policy import OnPolicyTrainer
from llm_trainer.trainers.prompt_images import why_not_shown
from llm_trainer.trainers.ptx import PTX_OBJECTS, further_share, ptx_from_config
from llm_trainer.trainers.references import describe_reference, reference_of, seen_once
from llm_trainer.trainers.shaping import Followed, Shaping, refuse_norm
from llm_trainer.trainers.shaping import scored as scored_rollout
from llm_trainer.trainers.updates import updates_per_epoch

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build, Sketch

# What the section says about other objects than the trainer; `_from_config` makes them.
_OBJECTS = (
    "ref_model_checkpoint",
    "value_model_checkpoint",
    "reward_model_checkpoint",
    "gradient_accumulation_steps",
    *PTX_OBJECTS,
)
# What PPO's metrics are called in TRL, and here, by the names of `PolicyLoss.metrics`.
NAMES = {
    "approx_kl": "policy/approxkl_avg",
    "clip_ratio/region_mean": "policy/clipfrac_avg",
    "entropy": "policy/entropy_avg",
    "ratio": "val/ratio",
}


class PPOTrainer(OnPolicyTrainer):
    """Proximal policy optimisation with a critic, over the tokens that the policy wrote.

        loss = mean of -min(r A, clip(r, 1 - eps, 1 + eps) A)  +  vf_coef * mean of max((V - R)^2, (clip(V) - R)^2) / 2

    r is how much more probable the policy has made a token since it was sampled, A and R its advantage and return by GAE,
    V the critic's value of what stood before it (Schulman et al. 2017, arXiv:1707.06347). The reward of a token is what its
    KL from the reference costs, and at the last one the reward of the completion (Ouyang et al. 2022, arXiv:2203.02155).

    Args:
        ref_model: what the policy is held to; None: it is held to itself as it is now.
        value_model: the critic: a classification model with one label (a reward model), a language model, whose body gets a
            head, or any module that gives a number per token. None: made of the policy, see `critic_on_policy`.
        optimizer: of the policy's parameters; the critic's are added in groups of their own, if they are not there.
        **options: the other fields of `PPOConfig`, by their names; the rest are those of `BaseTrainer`.

    Raises:
        ValueError: `ref_model` or `value_model` is the policy itself, or the critic has another vocabulary.
    """

    section = "ppo_config"
    update_option = "ppo_batch_size"
    takes_flat = True
    takes_images = True
    no_variance = (
        "the rewards of all completions were equal, so that nothing was learned but the KL: look at the completions "
        "(llm-trainer rollouts), take easier or harder prompts, a higher gen_temperature, or a reward with more steps"
    )

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        value_model: nn.Module | None = None,
        *args: Any,
        **options: Any,
    ) -> None:
        said = {name: options.pop(name) for name in fields_of(PPOConfig) if name in options and name not in _OBJECTS}
        how = PPOConfig(**said)
        reference = None
        if how.kl_beta:  # before the critic puts a head on the policy
            reference, self.starts_at_reference = choose_reference(model, ref_model, how.reference)
            self._sees_once = see_alike(model, reference)
        check_learns(value_model, ref_model=ref_model, reward_model=options.get("reward_model"))
        self.critic = critic_of(model, value_model, how.critic_on_policy)
        self.loss = PolicyLoss("bnpo", clip_eps=how.clip_eps, entropy_coef=how.entropy_coef)
        self.shaping = Shaping(how)
        if how.reward_model_steps is not None:
            refuse_norm(self.shaping.norm)
        self.base_model = model
        optimizer = args[0] if args else options.get("optimizer")
        if isinstance(optimizer, torch.optim.Optimizer):  # else it is refused below
            self._add_to_optimizer(how, optimizer, options.get("scheduler"))
        super().__init__(
            model,
            *args,
            how=how,
            samples=how.completions_per_prompt,
            passes=how.ppo_epochs,
            rows_per_update=how.ppo_batch_size,
            ref_model=ref_model,
            **options,
        )
        let_critic_alone(self.optimizer, lambda: self._policy_waits)
        self.reference = None if reference is None else reference_of(reference, self, self._policy, how.reference)

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        section: PPOConfig = build.section
        own = {name: getattr(section, name) for name in fields_of(PPOConfig) if name not in _OBJECTS}
        own |= cls._rewards_from_config(config, build)
        own |= ptx_from_config(config, build, section.completions_per_prompt, section.ppo_batch_size)
        own |= cls._reference_from_config(section.kl_beta, build)
        if "value_model" not in build.given:
            found = critic_of_folder(section.value_model_checkpoint, config, build)
            own["value_model"] = critic_of(build.policy, found, section.critic_on_policy)
            own["critic_on_policy"] = own["value_optim_config"] = None  # it is made so, and `_extend_optimizer` knows
        return own

    @classmethod
    def _extend_optimizer(cls, optimizer: torch.optim.Optimizer, own: dict[str, Any], section: PPOConfig) -> None:
        options = None if section.value_optim_config is None else group_options(section.value_optim_config)
        if "value_model" in own:  # else it is the caller's, and the constructor adds it
            add_groups(optimizer, own["value_model"], options)

    @classmethod
    def _steps_per_epoch(cls, stream: Any, section: PPOConfig) -> int:
        return updates_per_epoch(
            stream, section, samples="completions_per_prompt", update="ppo_batch_size", passes="ppo_epochs"
        )

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        section: PPOConfig = sketch.section
        costs: dict[str, Any] = {"further_share": further_share(section)}
        costs |= cls._frozen_costs(section.kl_beta, moves=False, sketch=sketch)
        shares_body = section.critic_on_policy
        if shares_body is None:  # as `critic_of` decides
            shares_body = config.adapter_config is not None and section.value_model_checkpoint is None
        if not shares_body:
            costs |= sketch.critic(section.value_model_checkpoint)
        columns = len(("old_logprobs", "values", "advantages", "returns")) + bool(section.kl_beta)
        return {**costs, **sketch.sampled(section.completions_per_prompt, section.gen_max_seq_len, columns)}

    def _add_to_optimizer(self, how: PPOConfig, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Let the optimizer have the critic's parameters, and mark the groups that are the critic's alone.

        Raises:
            ValueError: it has them, though they are to have options of their own.
        """
        own = None if how.value_optim_config is None else group_options(how.value_optim_config)
        added = add_groups(optimizer, self.critic, own, scheduler)
        if own is not None and not added:
            raise ValueError(
                "value_optim_config: the optimizer has the critic's parameters already; give their groups these options, or "
                "leave them out of it"
            )
        of_critic = set(self.critic.parameters()) - set(self.base_model.parameters())
        for group in optimizer.param_groups:
            members = set(group["params"])
            if members <= of_critic:
                group["model"] = CRITIC
            elif how.critic_warmup_steps and members & of_critic:
                raise ValueError(
                    "critic_warmup_steps: the critic's parameters are in one group of the optimizer with the policy's; "
                    "expected groups of their own, as are made for those that the optimizer does not have"
                )

    def _other_models(self) -> dict[str, nn.Module]:
        return {CRITIC: self.critic}

    def _build_module(self, model: nn.Module) -> nn.Module:
        self._policy = scored(model)
        self._acting = ActorCritic(self._policy, self.critic)
        return self._acting

    def _reads_rows(self, model: nn.Module) -> None:
        super()._reads_rows(model)
        self.machine.reads_rows(partial(packing_of, self.critic, reader_of, self.device))

    def _get_extra_config_info(self) -> dict[str, Any]:
        where = f"a {type(self.critic).__name__} of its own"
        if self._acting.shares_body:
            where = "a head on the policy's body"
        held_to = describe_reference(self.reference)
        own = {"loss": self.loss, "critic": where, "reference": held_to}
        return own | super()._get_extra_config_info()

    def _get_extra_checkpoint_state(self) -> dict[str, Any]:
        return self.shaping.state_dict()

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.shaping.load_state_dict(state)

    # A rollout, from its completions to what they teach.

    def _maker_of(self, training: bool) -> Maker:
        return Followed(self._rollout_maker(), self.shaping, training, self._totals)

    def _build_source(self, source: Any, training: bool) -> Any:
        built = super()._build_source(source, training)
        if not isinstance(built, RolloutSource):
            raise ValueError(
                "nothing judges completions: expected a reward_func (or reward_model), or rollouts, the folder of another run's"
            )
        return self._with_further(built, training)

    def _takes_no_images(self) -> str:
        why = super()._takes_no_images()
        if why or self._images is None:
            return why
        critic: nn.Module = reader_of(self.critic)
        if isinstance(critic, OwnCritic):
            critic = critic.body
        sees = "a value_model that sees, a module whose forward takes images, or none, and the critic is made of the policy"
        return why_not_shown(critic, "the critic", sees, self._images)

    def _learned_columns(self) -> tuple[str, ...]:
        return ("advantages", "returns", "values", "old_logprobs")

    def _finish(self, rollout: Rollout) -> Finished:
        judged = self._judged(rollout)
        _, lay = laying(self.machine.layout, self._pad_id, self._images)
        columns = self.machine.score(rollout, partial(collate_rollout, lay=lay), self._say_of)
        columns |= given_logprobs(rollout, columns)
        if columns.pop("has_sums", None) is not None:
            raise ValueError(
                "old_logprobs: found sums over completions, [B]; PPO's ratios are of tokens: expected [B, L], one for each "
                "token of the responses, or none"
            )
        rewards = self._totals(rollout, judged)
        shaped = self.shaping(scored_rollout(rollout, rewards, columns | judged), follows=False)
        is_level = len(np.unique(rewards)) == 1  # NaN is one of them
        self._note(rollout, shaped.is_missing.numpy(), is_level and len(rewards) > 1)
        bounds = np.cumsum(rollout.lengths)[:-1]
        for name, values in (("advantages", shaped.advantages), ("returns", shaped.returns)):
            columns[name] = np.split(values[0].float().numpy(), bounds)
        masked = {}
        if self.how.overlong == "mask":
            masked["it has no end"] = rollout.column("finish") == FINISHES.index("length")
        return Finished(columns | judged, masked, {NO_REWARD: shaped.is_missing.numpy()})

    def _say_of(self, batch: Batch) -> dict[str, Tensor]:
        """What policy, critic and reference say about each token of a batch of a rollout."""
        rows = moved(of_learning(with_cuts(batch)), self.device)
        if self._sees_once:
            rows = seen_once(rows)
        acted = self._act(rows)
        found = {"old_logprobs": acted.scores.logprobs, "values": acted.values}
        if self.reference is not None:
            found["ref_logprobs"] = self._score(self.reference, rows).logprobs
        return found

    def _act(self, rows: Batch, **how: Any) -> Acted:
        """What policy and critic say of rows."""
        acted: Any = self._score(self.model, rows, **how)
        return acted

    def _totals(self, rollout: Rollout, judged: Mapping[str, Any]) -> np.ndarray:
        """`[rows]` the reward of each completion, of steps their sum, as GAE adds them up; NaN where it is missing."""
        values, _, weights = self._rollout_maker().table(rollout, judged)
        of_steps = rollout.step_rewards(judged)
        if of_steps is not None:
            sums = np.array([np.nansum(numbers) for numbers in of_steps])
            values[:, -1] = np.where(np.isnan(values[:, -1]), np.nan, sums)
        return weighted_rewards(torch.from_numpy(values), torch.from_numpy(weights)).numpy()

    # Learning from a rollout.

    @property
    def _policy_waits(self) -> bool:
        """Whether the critic learns alone still."""
        return self.machine.step < self.how.critic_warmup_steps

    def _loss_weight(self, batch: Batch) -> float:
        return float(Sequences.of_batch(batch).mask.sum())

    def _count_tokens(self, batch: Batch) -> int:
        return count_tokens(batch)

    def _prepare_batch(self, batch: Batch) -> Batch:
        return moved(of_learning(with_cuts(batch)), self.device)

    def _forward(self, batch: Batch) -> Acted:
        sequences = Sequences.of_batch(batch)
        tokens, _ = self._tokens(batch, sequences)
        objective = Objective(*self.loss.per_token(tokens, sequences))
        return self._act(batch, objective=objective, detach_body=self._policy_waits)

    def _compute_loss(self, outputs: Acted, batch: Batch) -> Tensor:
        sequences, scores = Sequences.of_batch(batch), outputs.scores
        num_tokens = sequences.mask.sum()

        # 1. the policy, whose losses the head has summed
        policy_loss = mean_over(scores.loss_sum, num_tokens.to(scores.loss_sum.dtype))
        tokens, metrics = self._tokens(batch, sequences)
        metrics |= self.loss.metrics(scores.logprobs, tokens, sequences, scores.entropy)
        self._watch(batch, scores.logprobs.detach(), sequences)

        # 2. the critic
        clip = self.how.value_clip_eps
        errors, of_critic = value_loss(outputs.values, batch["returns"], sequences.mask, batch["values"], clip)
        critic_loss = mean_over(errors.sum(), num_tokens.to(errors.dtype))

        # 3. both
        metrics |= of_critic | {
            "loss/policy_avg": (scores.loss_sum.detach(), num_tokens),
            "loss/value_avg": (errors.detach().sum(), num_tokens),
        }
        for name, (total, count) in metrics.items():
            self.record(NAMES.get(name, name), total, count)
        weight = 0.0 if self._policy_waits else 1.0  # not left out: engines want a gradient of every parameter
        return weight * policy_loss + self.how.vf_coef * critic_loss

    def _tokens(self, batch: Batch, sequences: Sequences) -> tuple[PolicyTokens, dict[str, tuple[Tensor, Tensor]]]:
        """What is known of the tokens beside their log-probs, and metrics of how they are corrected."""
        tokens = PolicyTokens(batch["advantages"], batch["old_logprobs"])
        if self.correction is None or "sampled_logprobs" not in batch:
            return tokens, {}
        weights, metrics = self.correction(batch["old_logprobs"], batch["sampled_logprobs"], sequences)
        return tokens._replace(corrections=weights), metrics
