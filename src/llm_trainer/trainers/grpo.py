"""Reinforcement learning from groups of completions, without a critic: GRPO and its family."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from llm_trainer.config.errors import fields_of
from llm_trainer.config.reinforcement import WITH_JUDGE, GRPOConfig
from llm_trainer.data.rollout_source import RolloutSource
from llm_trainer.data.rollouts import FINISHES, JUDGED, LEVEL, NO_REWARD, Finished, Rollout
from llm_trainer.image_batch import moved
from llm_trainer.losses.advantages import (
    OF_TOKENS,
    Advantages,
    greedy_rewards,
    group_statistics,
    token_advantages,
    weighted_rewards,
)
from llm_trainer.losses.chunked import Objective
from llm_trainer.losses.language import mean_over
from llm_trainer.losses.policy import KL_ESTIMATORS, PolicyLoss, PolicyTokens, unread_settings
from llm_trainer.losses.sequences import Sequences
from llm_trainer.models.freezing import see_alike
from llm_trainer.models.frozen import choose_reference
from llm_trainer.models.inside import vocab_size_of
from llm_trainer.models.scored import TokenScores, scored
from llm_trainer.trainers.answers import Batch, count_tokens, lay_flat, share_prompts
from llm_trainer.trainers.completions import given_logprobs, has_given, has_given_logprobs
from llm_trainer.trainers.given import (
    check_known,
    compare,
    is_given,
    join_responses,
    pad_id_of,
    refuse_of_rollouts,
    without_missing,
)
from llm_trainer.trainers.learned import of_learning, with_cuts
from llm_trainer.trainers.moving import MovingReference
from llm_trainer.trainers.on_policy import OnPolicyTrainer
from llm_trainer.trainers.ptx import PTX_OBJECTS, further_share, ptx_from_config
from llm_trainer.trainers.references import describe_reference, reference_of
from llm_trainer.trainers.updates import updates_per_epoch

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build, Sketch

# The keywords of this style whose names its section has otherwise.
KEYWORDS = {
    "num_samples_per_prompt": "group_size",
    "clip_eps": "loss_clip_eps",
    "kl_coef": "loss_beta",
    "temperature": "gen_temperature",
}
BASELINE = "it is the greedy one, which others are compared with"  # why a completion is not learned from
REFERENCE = "reference"  # the name in checkpoints of one that moves
MOVED_AT = "reference_moved_at"  # and of the step at which it last did
# What a section says about other objects than the loss.
_OBJECTS = ("ref_model_checkpoint", "reward_model_checkpoint", "gradient_accumulation_steps", *PTX_OBJECTS)


class GRPOTrainer(OnPolicyTrainer):
    """Reinforcement learning from groups of completions: the mean of `PolicyLoss` over the whole optimizer step.

        loss = mean of -min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coef * KL(policy || reference) - entropy_coef * entropy

    r is how much more probable the policy has made a token since it was sampled, A how much better its completion was than
    the others of its group, in standard deviations (Shao et al. 2024, arXiv:2402.03300, eq. 3).

    Batches: `prompts [B, P]` (or `input_ids`) with `prompt_attention_mask`; completions of them are sampled and rewarded. Or
    batches that carry completions, which are used as they are, rows of one step with equal prompts being a group:
    `trainers.given.join_responses` says what they have.

    Args:
        num_samples_per_prompt: completions of each prompt; None: 4.
        clip_eps: how far a ratio may be from 1; None: what belongs to `loss_type`, 0.2 for GRPO.
        kl_coef: weight of the KL from the reference; 0: there is none.
        temperature: of sampling; the policy that learns is this distribution.
        ref_model: what the policy is held to; None: it is held to itself as it is now. With
            `ref_sync_steps` it moves between rollouts: reference <- mixup_alpha * policy + (1 - mixup_alpha) * reference.
        reward_weights: of each reward function, or of each column of rewards `[B, F]` that are given; None: 1.
        **options: the other fields of `GRPOConfig`, by their names; the rest are those of `BaseTrainer`.

    Raises:
        ValueError: an option of the loss makes no sense.
    """

    section = "grpo_config"
    takes_flat = True
    takes_images = True
    how: GRPOConfig
    options: ClassVar[type[GRPOConfig]] = GRPOConfig
    default_samples: ClassVar[int] = 4  # where objects are given

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        num_samples_per_prompt: int | None = None,
        clip_eps: float | None = None,
        kl_coef: float = 0.0,
        temperature: float = 1.0,
        ref_model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        samples = self.default_samples if num_samples_per_prompt is None else num_samples_per_prompt
        said = {
            "group_size": samples,
            "loss_clip_eps": clip_eps,
            "loss_beta": kl_coef,
            "gen_temperature": temperature,
        }
        how = _section(type(self), said, options)
        self.loss = loss_of(how)
        self.advantages = Advantages(_advantage_of(how))
        reference = None
        if how.loss_beta:
            reference, self.starts_at_reference = choose_reference(model, ref_model, how.reference)
            self._sees_once = see_alike(model, reference)
        self._moving: MovingReference | None = None
        if reference is not None and how.ref_sync_steps is not None:
            self._moving = MovingReference(reference, model, how.reference, how.ref_sync_steps, how.mixup_alpha)
        self._of_correction: dict[str, tuple[Tensor, Tensor]] = {}  # what to watch of a micro-batch
        self._said_constant = False  # that rewards which are given in validation data say nothing about weights
        self._given: list[tuple[Batch, Batch]] = []  # batches of this step that carry completions, and their rows
        super().__init__(
            model,
            *args,
            how=how,
            samples=how.group_size,
            passes=how.grpo_steps,
            rows_per_update=how.rows_per_update,
            ref_model=ref_model,
            **options,
        )
        self._of_given = self.advantages
        if self.rewards is None and options.get("reward_weights") is not None:
            self._of_given = replace(self.advantages, weights=torch.tensor(options["reward_weights"]))
        if how.max_resamplings and self.judge is not None:
            raise ValueError(WITH_JUDGE.format(how.max_resamplings))
        self.reference = None if reference is None else reference_of(reference, self, self._policy, how.reference)
        models = [self._policy, *([] if self.reference is None else [self.reference])]
        self.shares_prompts = how.share_prompts and all(model.knows_branches(self.device) for model in models)
        # Branches are flat rows, and that a model keeps the images of such rows apart has to have been tried out.
        sees = self._policy.vision.model is not None and self.machine.shows_images
        self.shares_prompts = self.shares_prompts and (self.machine.layout.flat or not sees)

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        section: GRPOConfig = build.section
        options = {name: getattr(section, name) for name in fields_of(GRPOConfig) if name not in _OBJECTS}
        for ours, theirs in KEYWORDS.items():
            options[ours] = options.pop(theirs)
        options |= cls._rewards_from_config(config, build)
        options |= ptx_from_config(config, build, section.group_size, section.rows_per_update)
        return options | cls._reference_from_config(section.loss_beta, build)

    @classmethod
    def _steps_per_epoch(cls, stream: Any, section: GRPOConfig) -> int:
        return updates_per_epoch(stream, section, samples="group_size", update="rows_per_update", passes="grpo_steps")

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        section: GRPOConfig = sketch.section
        frozen = cls._frozen_costs(section.loss_beta, section.ref_sync_steps is not None, sketch)
        several = section.grpo_steps > 1 or section.rows_per_update is not None
        columns = 1 + bool(section.loss_beta) + several  # advantages, the reference's log-probabilities, and older ones
        only_compared = int(_advantage_of(section) == "remax")  # the greedy one
        sampled = sketch.sampled(section.group_size, section.gen_max_seq_len, columns, only_compared)
        return {**frozen, **sampled, "further_share": further_share(section)}

    def _build_module(self, model: nn.Module) -> nn.Module:
        self._policy = scored(model)
        return self._policy

    def _get_extra_config_info(self) -> dict[str, Any]:
        held_to = describe_reference(self.reference)
        if self._moving is not None:
            held_to = f"moves by {self._moving.alpha:g} every {self._moving.every} steps"
        prompts = "shared" if self.shares_prompts else "repeated"
        own = {"loss": self.loss, "advantages": self.advantages.kind, "reference": held_to, "prompts": prompts}
        return own | super()._get_extra_config_info()

    # A reference that moves.

    def _other_models(self) -> dict[str, nn.Module]:
        if self._moving is None or self._moving.model is self.base_model:
            return {}  # what of it moves is kept with the reference's values
        return {REFERENCE: self._moving.model}

    def _build_source(self, source: Any, training: bool) -> Any:
        built = super()._build_source(source, training)
        if not isinstance(built, RolloutSource):
            refuse_of_rollouts(self.how)
        return self._with_further(built, training)

    @property
    def _draws_greedy(self) -> bool:
        return self.advantages.kind == "remax"

    @property
    def _max_resamplings(self) -> int:
        return self.how.max_resamplings

    def _learned_columns(self) -> tuple[str, ...]:
        return ("advantages", "old_logprobs") if self._takes_several_updates else ("advantages",)

    @property
    def _takes_several_updates(self) -> bool:
        """Whether the policy may have moved on when the last update on a rollout begins."""
        return self.passes > 1 or self.rows_per_update is not None

    def _finish_facts(self) -> dict[str, Any]:
        how, facts = self.how, super()._finish_facts()
        facts |= {"advantage": self.advantages.kind, "has_reference": bool(how.loss_beta)}
        if how.loss_beta and how.kl_in == "reward":
            facts["kl_in_reward"] = [how.loss_beta, how.kl_estimator]
        return facts

    def _before_rollout(self) -> None:
        if self._moving is not None:
            self._moving.move(self.machine)

    def _get_extra_checkpoint_state(self) -> dict[str, Any]:
        return {} if self._moving is None else {MOVED_AT: self._moving.moved_at}

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        if self._moving is not None:
            self._moving.moved_at = state[MOVED_AT]

    # Batches.

    def _joined(self, batch: Batch) -> Batch:
        """The batch as rows whose labels are the tokens to learn from."""
        if not is_given(batch):
            if "labels" not in batch:
                raise ValueError(
                    f"a batch with the keys {', '.join(batch)}: nothing judges completions of its prompts; expected a "
                    f"reward_func (or reward_model), or rollouts, the folder of another run's, or responses [B, L] and rewards "
                    f"[B] beside the prompts"
                )
            return with_cuts(without_missing(batch))
        for one, rows in self._given:
            if one is batch:
                return rows
        if self.how.loss_beta and self.how.kl_in == "reward":
            raise ValueError(
                "kl_in='reward': found batches that carry responses and rewards; expected rewards from which the KL is already "
                "taken. Set kl_in='loss', or take it from them and leave kl_coef out"
            )
        rows = join_responses(batch, *pad_id_of(self.tokenizer, self.base_model))
        is_token = rows["attention_mask"].bool()
        check_known("prompts and responses", rows["input_ids"][is_token], vocab_size_of(self.base_model))
        self._given.append((batch, rows))
        return rows

    def _loss_weight(self, batch: Batch) -> float:
        return float(self.loss.num_terms(Sequences.of_batch(self._joined(batch))))

    def _count_tokens(self, batch: Batch) -> int:
        return count_tokens(self._joined(batch))

    def _begin_step(
        self, batches: list[Batch], weights: list[float], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Compare completions that are given with the others of their groups, which may be on other ranks."""
        super()._begin_step(batches, weights, sum_over_ranks)
        current = set(map(id, batches))
        self._given = [(batch, rows) for batch, rows in self._given if id(batch) in current]
        counted = [batch for batch, weight in zip(batches, weights, strict=True) if weight]
        rows = [self._joined(batch) for batch in counted]
        unknown = [one for one in rows if "advantages" not in one]
        # Ranks ask together, whatever each of them has.
        if any(map(is_given, batches)):
            compare(unknown, self._of_given, self.device, self.machine.rank, sum_over_ranks, self._record_given)

    def _record_given(self, name: str, value: float) -> None:
        """Record what one watches of rewards that are given, in training: those of validation data no weights change."""
        if self.model.training:
            self.record(name, value)
        elif not self._said_constant:
            self._said_constant = True
            self.machine.say(
                "WARNING: the validation data carries completions with their rewards, which are the same for any weights, so "
                "that no best model is known, and nothing stops early; expected prompts, and a reward_func"
            )

    def _policy_rows(self, batch: Batch) -> Batch:
        rows = self._joined(batch)
        groups = rows.get("group", rows.get("prompt_keys"))
        if self.shares_prompts and groups is not None:
            rows = share_prompts(rows, groups, self._never_drawn)
        elif is_given(batch):
            rows = lay_flat(rows, self.machine.layout)
        return moved(of_learning(rows), self.device)

    def _prepare_batch(self, batch: Batch) -> Batch:
        rows = self._policy_rows(batch)
        if self.reference is not None and "ref_logprobs" not in rows:
            with torch.no_grad():
                rows["ref_logprobs"] = self._score(self.reference, rows).logprobs
        return rows

    # The loss.

    def _forward(self, batch: Batch) -> TokenScores:
        if not self._is_sum_of_tokens(batch):
            return self._score(self.model, batch, differentiable=True)
        sequences = Sequences.of_batch(batch)
        known = self._tokens(batch, torch.zeros(batch["labels"].shape, device=self.device), sequences)
        return self._score(self.model, batch, objective=Objective(*self.loss.per_token(known, sequences)))

    def _is_sum_of_tokens(self, batch: Batch) -> bool:
        """Whether a token's loss depends on its own log-prob alone, so that the head makes its gradient in the forward."""
        needs_logprobs = self._corrects(batch) and "old_logprobs" not in batch
        return self.loss.is_per_token and "has_sums" not in batch and not needs_logprobs

    def _corrects(self, batch: Batch) -> bool:
        return self.correction is not None and "sampled_logprobs" in batch

    def _compute_loss(self, outputs: TokenScores, batch: Batch) -> Tensor:
        sequences, loss = Sequences.of_batch(batch), self.loss
        if "has_sums" in batch and loss.level == "token":
            loss = loss.replace(importance="seq")  # of sums over completions there are no ratios of tokens
        known = self._tokens(batch, outputs.logprobs, sequences)
        metrics = loss.metrics(outputs.logprobs, known, sequences, outputs.entropy) | self._of_correction
        for name, (total, count) in metrics.items():
            self.record(name, total, count)
        self._watch(batch, outputs.logprobs.detach(), sequences)
        if self._is_sum_of_tokens(batch):
            return mean_over(outputs.loss_sum, loss.num_terms(sequences).to(outputs.loss_sum.dtype))
        return loss.mean(loss.token_losses(outputs.logprobs, known, sequences, outputs.entropy), sequences)

    def _tokens(self, batch: Batch, logprobs: Tensor, sequences: Sequences) -> PolicyTokens:
        """What is known of the tokens beside the policy's `logprobs`."""
        advantages = batch.get("advantages")
        if advantages is None:  # a filler, which weighs nothing
            advantages = torch.zeros_like(logprobs)
        tokens = PolicyTokens(advantages, batch.get("old_logprobs"), batch.get("ref_logprobs"))
        if self.correction is None or not self._corrects(batch):
            return tokens
        old = batch.get("old_logprobs", logprobs.detach())
        weights, self._of_correction = self.correction(old, batch["sampled_logprobs"], sequences)
        return tokens._replace(corrections=weights)

    # What is learned of a rollout.

    def _finish(self, rollout: Rollout) -> Finished:
        # 1. what completions are worth, and what of it their tokens earn themselves
        columns = self._logprobs(rollout)
        judged = self._judged(rollout)
        values, names, weights = self._rollout_maker().table(rollout, judged)
        baseline = self._baseline(rollout, values, weights)  # less no KL: that is of what is compared with it
        last, of_row = rollout.episodes()
        values, weights = self._with_kl(rollout, columns, values, weights, of_row)
        of_tokens = rollout.token_rewards(judged) if self.advantages.kind in OF_TOKENS else None
        if of_tokens is not None:  # compared by themselves
            of_steps = None if rollout.step_rewards(judged) is None else names.index(JUDGED)
            take_out_of_tokens(values, of_tokens[1], of_steps)

        # 2. compared with the others of its group; an episode of several rows once
        values, groups = values[last], torch.from_numpy(np.array(rollout.column("group")))[last]
        how = replace(self.advantages, weights=torch.from_numpy(weights), greedy_rewards=baseline)
        advantages, is_missing = how(torch.from_numpy(values), groups)
        is_level = level_groups(values, weights, groups)
        self._note(rollout, is_missing.numpy(), bool(is_level.all()) and len(groups.unique()) < len(groups))

        # 3. of every token
        advantages, is_missing, is_level = advantages[of_row], is_missing[of_row], is_level[of_row]
        learned = []
        for row, advantage in enumerate(advantages.tolist()):
            learned.append(np.float32(advantage) * rollout.store["trained"][row].astype(np.float32))
        if of_tokens is not None:
            is_level &= add_token_advantages(learned, of_tokens[0], rollout, is_missing, groups, how)

        # 4. what is not learned from
        masked = {}
        if self.how.overlong == "mask":
            masked["it has no end"] = rollout.column("finish") == FINISHES.index("length")
        dropped = {BASELINE: rollout.is_greedy} if self._draws_greedy else {}
        dropped[NO_REWARD] = is_missing.numpy()
        if self.how.max_resamplings:
            dropped[LEVEL] = is_level
        return Finished(columns | judged | {"advantages": learned}, masked, dropped)

    def _logprobs(self, rollout: Rollout) -> dict[str, list[np.ndarray]]:
        """The log-probs that an update needs and that the sampler has not left, as columns."""
        has_no_sampler = has_given(rollout) and self.how.kl_in == "reward"  # whose log-probs the KL would be of
        old = self._takes_several_updates or has_given_logprobs(rollout) or has_no_sampler
        columns = self._scored(rollout, old=old, reference=self.reference)
        return columns | given_logprobs(rollout, columns)

    def _with_kl(
        self,
        rollout: Rollout,
        columns: Mapping[str, Sequence[np.ndarray]],
        values: np.ndarray,
        weights: np.ndarray,
        of_row: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rewards `[rows, F]` and their weights, with the cost of leaving the reference as one more, where it is one.

        `of_row` `[rows]` says whose row each is (`Rollout.episodes`).
        """
        if self.how.kl_in != "reward" or self.reference is None:
            return values, weights
        costs = -self.how.loss_beta * kl_of_rows(rollout, columns, self.how.kl_estimator)
        costs = np.bincount(of_row, costs)[of_row]  # of the episode
        found = np.column_stack([values, costs])
        found[np.isnan(values).all(1)] = np.nan  # what has no reward has none by its KL alone
        return found, np.append(weights, 1.0)

    def _baseline(self, rollout: Rollout, values: np.ndarray, weights: np.ndarray) -> Tensor | None:
        """`[rows]` the reward of the greedy completion of each row's prompt; 0 in evaluation, which draws none."""
        if not self._draws_greedy:
            return None
        totals = weighted_rewards(torch.from_numpy(values), torch.from_numpy(weights))
        if not rollout.is_greedy.any():
            return torch.zeros_like(totals)
        groups = torch.from_numpy(np.array(rollout.column("group")))
        return greedy_rewards(totals, groups, torch.from_numpy(rollout.is_greedy))


def _section(trainer: type[GRPOTrainer], said: dict[str, Any], options: dict[str, Any]) -> GRPOConfig:
    """The fields of the section among a trainer's keywords, which are taken out of `options`.

    Raises:
        TypeError: one is called otherwise in this style.
    """
    renamed = {theirs: ours for ours, theirs in KEYWORDS.items()}
    for name in fields_of(GRPOConfig):
        if name not in options or name in _OBJECTS:
            continue
        if name in renamed:
            raise TypeError(f"{trainer.__name__} has no option {name!r} in this style; it is {renamed[name]}")
        said[name] = options.pop(name)
    return trainer.options(**said)


def loss_of(how: GRPOConfig) -> PolicyLoss:
    """The loss that a section says.

    Raises:
        ValueError: its type does not look at something that is said.
    """
    kl_coef = how.loss_beta if how.kl_in == "loss" else 0.0
    for name in unread_settings(how.loss_type):
        value = getattr(how, f"loss_{name}")
        if value is not None:
            raise ValueError(
                f"loss_{name}: got {value:g}, but loss_type {how.loss_type} does not look at it; expected null, or another "
                f"loss_type, such as grpo"
            )
    return PolicyLoss(
        loss_type=how.loss_type,
        clip_eps=how.loss_clip_eps,
        clip_eps_high=how.loss_clip_eps_high,
        delta=how.loss_delta,
        importance=how.loss_importance_sampling_level,
        kl_coef=kl_coef,
        kl_estimator=how.kl_estimator,
        kl_bias_correction=how.kl_bias_correction,
        entropy_coef=how.entropy_coef,
        max_completion_length=how.gen_max_seq_len,
    )


def _advantage_of(how: GRPOConfig) -> str:
    if how.advantage is not None:
        return how.advantage
    return "dr_grpo" if how.loss_type == "dr_grpo" else "group"


def kl_of_rows(rollout: Rollout, columns: Mapping[str, Sequence[np.ndarray]], estimator: str) -> np.ndarray:
    """`[rows]` the KL of the policy that wrote each completion from the reference, summed over its tokens."""
    wrote = columns.get("old_logprobs", rollout.store["sampled_logprobs"])
    totals = np.zeros(len(rollout))
    for row in range(len(rollout)):
        differences = torch.from_numpy((wrote[row] - columns["ref_logprobs"][row]).astype(np.float64))
        trained = torch.from_numpy(np.array(rollout.store["trained"][row], dtype=bool))
        totals[row] = float(KL_ESTIMATORS[estimator](differences)[trained].sum())
    return totals


def take_out_of_tokens(values: np.ndarray, by_token: np.ndarray, judged: int | None) -> None:
    """Make those of the rewards `values [rows, F]` 0 that are a sum of what tokens earn; NaN stays where one is missing.

    Args:
        by_token: `[rows, functions]` bool, the first columns of `values`: which of them are such a sum.
        judged: the column of a reward model that judges steps, if there is one: all of its are.
    """
    is_sum = np.zeros(values.shape, dtype=bool)
    is_sum[:, : by_token.shape[1]] = by_token
    if judged is not None:
        is_sum[:, judged] = True
    values[is_sum & ~np.isnan(values)] = 0.0


def add_token_advantages(
    learned: list[np.ndarray],
    rewards: Sequence[np.ndarray],
    rollout: Rollout,
    is_missing: Tensor,
    groups: Tensor,
    how: Advantages,
) -> np.ndarray:
    """Add what tokens earn themselves to the advantages `learned`; `[rows]` bool: that is nothing in the row's group.

    Args:
        learned: `[T]` of each row.
        rewards: `[T]` of each row, NaN where there is none.
        is_missing: `[rows]` which rows have no reward at all.
    """
    known = []
    for has_none, numbers in zip(is_missing.tolist(), rewards, strict=True):
        known.append(torch.from_numpy(np.where(has_none, np.nan, numbers)))
    found = token_advantages(known, groups, how)
    earns = torch.zeros(len(learned))
    for row, advantages in enumerate(found):
        learned[row] += advantages.numpy().astype(np.float32) * rollout.store["trained"][row].astype(np.float32)
        earns[row] = float(advantages.abs().max())
    of_group = group_statistics(earns, groups)
    return (of_group.is_level & (of_group.mean == 0)).numpy()


def level_groups(rewards: np.ndarray, weights: np.ndarray, groups: Tensor) -> np.ndarray:
    """`[rows]` bool: all rewards of the row's group are equal."""
    totals = weighted_rewards(torch.from_numpy(rewards), torch.from_numpy(weights))
    return group_statistics(totals, groups).is_level.numpy()
