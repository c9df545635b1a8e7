"""Reinforcement learning from groups of completions, without a critic: GRPO and its family."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trainer.config.errors import fields_of
from llm_trainer.config.reinforcement import GRPOConfig
from llm_trainer.losses.advantages import Advantages
from llm_trainer.losses.chunked import Objective
from llm_trainer.losses.language import mean_over
from llm_trainer.losses.policy import Correction, PolicyLoss, PolicyTokens
from llm_trainer.losses.sequences import Sequences
from llm_trainer.models.scored import TokenScores, scored
from llm_trainer.trainers.answers import Batch, count_tokens, lay_flat, score, share_prompts, to_device
from llm_trainer.trainers.base import BaseTrainer
from llm_trainer.trainers.given import compare, is_given, join_responses, pad_id_of, without_missing
from llm_trainer.trainers.references import default_reference, reference_of

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
# What a section says about other objects than the loss.
_OBJECTS = ("ref_model_checkpoint", "gradient_accumulation_steps")


class GRPOTrainer(BaseTrainer):
    """Reinforcement learning from groups of completions: the mean of `PolicyLoss` over the whole optimizer step.

        loss = mean of -min(r A, clip(r, 1 - eps, 1 + eps) A) + kl_coef * KL(policy || reference) - entropy_coef * entropy

    r is how much more probable the policy has made a token since it was sampled, A how much better its completion was than
    the others of its group, in standard deviations (Shao et al. 2024, arXiv:2402.03300, eq. 3).

    Batches: `prompts [B, P]` (or `input_ids`) with `prompt_attention_mask`; completions of them are sampled and rewarded. Or
    batches that carry completions, which are used as they are, rows of one step with equal prompts being a group:
    `trainers.given.join_responses` says what they have.

    Args:
        num_samples_per_prompt: completions of each prompt.
        clip_eps: how far a ratio may be from 1; None: what belongs to `loss_type`, 0.2 for GRPO.
        kl_coef: weight of the KL from the reference; 0: there is none.
        temperature: of sampling; the policy that learns is this distribution.
        ref_model: what the policy is held to; None: a frozen copy of it as it is now, or with its adapters off.
        reward_weights: of each reward function; None: 1.
        **options: the other fields of `GRPOConfig`, by their names; the rest are those of `BaseTrainer`.

    Raises:
        ValueError: an option of the loss makes no sense.
    """

    section = "grpo_config"
    rows = ("prompts",)
    takes_flat = True

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        num_samples_per_prompt: int = 4,
        clip_eps: float | None = None,
        kl_coef: float = 0.0,
        temperature: float = 1.0,
        ref_model: nn.Module | None = None,
        reward_weights: list[float] | None = None,
        **options: Any,
    ) -> None:
        said = {
            "group_size": num_samples_per_prompt,
            "loss_clip_eps": clip_eps,
            "loss_beta": kl_coef,
            "gen_temperature": temperature,
        }
        self.how = _section(type(self).__name__, said, options)
        self.loss = loss_of(self.how)
        weights = None if reward_weights is None else torch.tensor(reward_weights, dtype=torch.float64)
        self.advantages = Advantages(_advantage_of(self.how), weights)
        self.correction = correction_of(self.how)
        reference = None
        if self.how.loss_beta:
            reference = default_reference(model) if ref_model is None else ref_model
        self._given: list[tuple[Batch, Batch]] = []  # batches of this step that carry completions, and their rows
        super().__init__(model, *args, **options)
        self.reference = None if reference is None else reference_of(reference, self, self._policy)
        models = [self._policy, *([] if self.reference is None else [self.reference])]
        self.shares_prompts = self.how.share_prompts and all(model.knows_branches(self.device) for model in models)

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        section: GRPOConfig = build.section
        options = {name: getattr(section, name) for name in fields_of(GRPOConfig) if name not in _OBJECTS}
        for ours, theirs in KEYWORDS.items():
            options[ours] = options.pop(theirs)
        source = section.ref_model_checkpoint
        if section.loss_beta and source is not None and "ref_model" not in build.given:
            options["ref_model"] = build.frozen(source)
        return options

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        section: GRPOConfig = sketch.section
        reference = sketch.frozen() if section.loss_beta else {}
        columns = 1 + bool(section.loss_beta)  # advantages, and the reference's log-probabilities
        sampled = sketch.sampled(section.group_size, section.gen_max_seq_len, columns)
        return {**reference, **sampled}

    def _build_module(self, model: nn.Module) -> nn.Module:
        self._policy = scored(model)
        return self._policy

    def _get_extra_config_info(self) -> dict[str, Any]:
        held_to = "none" if self.reference is None else "a frozen model"
        prompts = "shared" if self.shares_prompts else "repeated"
        return {"loss": self.loss, "advantages": self.advantages.kind, "reference": held_to, "prompts": prompts}

    # Batches.

    def _joined(self, batch: Batch) -> Batch:
        """The batch as rows whose labels are the tokens to learn from."""
        if not is_given(batch):
            return without_missing(batch)
        for one, rows in self._given:
            if one is batch:
                return rows
        if self.how.loss_beta and self.how.kl_in == "reward":
            raise ValueError(
                "kl_in='reward': found batches that carry responses and rewards; expected rewards from which the KL is already "
                "taken. Set kl_in='loss', or take it from them and leave kl_coef out"
            )
        rows = join_responses(batch, *pad_id_of(self.tokenizer, self.base_model))
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
        current = set(map(id, batches))
        self._given = [(batch, rows) for batch, rows in self._given if id(batch) in current]
        counted = [batch for batch, weight in zip(batches, weights, strict=True) if weight]
        rows = [self._joined(batch) for batch in counted]
        unknown = [one for one in rows if "advantages" not in one]
        # Ranks ask together, whatever each of them has.
        if any(map(is_given, batches)):
            compare(unknown, self.advantages, self.device, self.machine.rank, sum_over_ranks, self.record)

    def _prepare_batch(self, batch: Batch) -> Batch:
        rows = self._joined(batch)
        groups = rows.get("group", rows.get("prompt_keys"))
        if self.shares_prompts and groups is not None:
            rows = share_prompts(rows, groups)
        else:
            rows = lay_flat(rows, self.machine.layout)
        rows = to_device(rows, self.device)
        if self.reference is not None and "ref_logprobs" not in rows:
            with torch.no_grad():
                rows["ref_logprobs"] = score(self.reference, rows, temperature=self.how.gen_temperature).logprobs
        return rows

    def _forward(self, batch: Batch) -> TokenScores:
        objective = None
        if self._is_sum_of_tokens(batch):
            sequences = Sequences.of_batch(batch)
            known = self._tokens(batch, torch.zeros(batch["labels"].shape, device=self.device), sequences)
            objective = Objective(*self.loss.per_token(known, sequences))
        wants_logprobs = objective is None
        return score(self.model, batch, wants_logprobs, self.how.gen_temperature, objective)

    def _is_sum_of_tokens(self, batch: Batch) -> bool:
        """Whether a token's loss depends on its own log-prob alone, so that the head makes its gradient in the forward."""
        corrects = self.correction is not None and "sampled_logprobs" in batch
        return self.loss.is_per_token and "has_sums" not in batch and not corrects

    def _compute_loss(self, outputs: TokenScores, batch: Batch) -> Tensor:
        sequences, loss = Sequences.of_batch(batch), self.loss
        if "has_sums" in batch and loss.level == "token":
            loss = loss.replace(importance="seq")
        known = self._tokens(batch, outputs.logprobs, sequences)
        for name, (total, count) in loss.metrics(outputs.logprobs, known, sequences, outputs.entropy).items():
            self.record(name, total, count)
        if self._is_sum_of_tokens(batch):
            return mean_over(outputs.loss_sum, loss.num_terms(sequences).to(outputs.loss_sum.dtype))
        return loss.mean(loss.token_losses(outputs.logprobs, known, sequences, outputs.entropy), sequences)

    def _tokens(self, batch: Batch, logprobs: Tensor, sequences: Sequences) -> PolicyTokens:
        """What is known of the tokens beside the policy's `logprobs`."""
        advantages = batch.get("advantages")
        if advantages is None:  # a filler, which weighs nothing
            advantages = torch.zeros_like(logprobs)
        tokens = PolicyTokens(advantages, batch.get("old_logprobs"), batch.get("ref_logprobs"))
        if self.correction is None or "sampled_logprobs" not in batch:
            return tokens
        old = tokens.old_logprobs if tokens.old_logprobs is not None else logprobs.detach()
        weights, metrics = self.correction(old, batch["sampled_logprobs"], sequences)
        for name, (total, count) in metrics.items():
            self.record(name, total, count)
        return tokens._replace(corrections=weights)


def _section(trainer: str, said: dict[str, Any], options: dict[str, Any]) -> GRPOConfig:
    """The fields of the section among a trainer's keywords, which are taken out of `options`.

    Raises:
        TypeError: one is called otherwise in this style.
    """
    renamed = {theirs: ours for ours, theirs in KEYWORDS.items()}
    for name in fields_of(GRPOConfig):
        if name not in options or name in _OBJECTS:
            continue
        if name in renamed:
            raise TypeError(f"{trainer} has no option {name!r} in this style; it is {renamed[name]}")
        said[name] = options.pop(name)
    return GRPOConfig(**said)


def loss_of(how: GRPOConfig) -> PolicyLoss:
    """The loss that a section says."""
    kl_coef = how.loss_beta if how.kl_in == "loss" else 0.0
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


def correction_of(how: GRPOConfig) -> Correction | None:
    """How a section corrects what was drawn otherwise than it is scored."""
    mode = how.off_policy_correction
    if mode == "none":
        return None
    return Correction(mode, how.off_policy_level, how.off_policy_cap, how.off_policy_floor)


def _advantage_of(how: GRPOConfig) -> str:
    if how.advantage is not None:
        return how.advantage
    return "dr_grpo" if how.loss_type == "dr_grpo" else "group"
