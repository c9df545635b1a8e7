"""Learning from pairs of a better and a worse answer: DPO and its relatives, and ORPO, SimPO, CPO without a reference."""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trainer.image_batch import moved, of_images
from llm_trainer.losses.pairs import Pairs, pairs_from_tokens
from llm_trainer.losses.preference import NLL_NORMS, PreferenceLoss, PreferenceTerms, resolve_loss_type
from llm_trainer.models.freezing import see_alike
from llm_trainer.models.frozen import StartingPoint, check_base, choose_reference
from llm_trainer.models.scored import ScoredModel, TokenScores, scored
from llm_trainer.trainers.answers import (
    Batch,
    as_rows,
    count_tokens,
    join,
    lay_flat,
    num_answers,
    num_pairs,
    row_weights,
    score,
    share_prompts,
    supervised,
    with_prompts,
)
from llm_trainer.trainers.base import BaseTrainer
from llm_trainer.trainers.building import DataRequest
from llm_trainer.trainers.references import describe_reference, precompute_reference, reference_of, seen_once

if TYPE_CHECKING:
    from llm_trainer.config.algorithms import DPOConfig
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build, Sketch

SIDES = ("chosen", "rejected")
_AT_REFERENCE = {"fp32": 1e-4}  # log-ratio per token that rounding explains, before the first update
_AT_REFERENCE_HALF = 2e-2  # the same in bf16 and fp16, where a batch's padding changes the last bits


class StartError(ValueError):
    """Policy and reference are the same model, but do not give the same numbers."""


class DPOTrainer(BaseTrainer):
    """Preference optimisation: the mean of `PreferenceLoss` over the pairs of the whole optimizer step.

    Batches: `prompt_input_ids [B, P]`, `chosen_input_ids [B, L]`, `rejected_input_ids [B, L]`, each with its
    `..._attention_mask`, padded on any side; or joined ones (see `trainers.answers`), chosen rows before rejected.
    With `ref_log_probs_given` also `ref_chosen_logps [B]` and `ref_rejected_logps [B]`, summed over the answers.
    Chosen and rejected run in one forward.

    Args:
        ref_model: what the policy is compared with; None: the policy as it is now. Losses that need no reference (`orpo`,
            `simpo`, `cpo`) have none.
        reference: 'base': without a `ref_model` the policy with its adapters (`peft`) off.
        ref_log_probs_given: the batches carry the reference's log-probs, and no reference model is kept.
        starts_at_reference: whether policy and reference begin equal, so that the rewards of the first step must be 0
            (and the loss of DPO ln 2); anything else stops the run. None: found out by comparing the weights.
        mask_prompt: False: the NLL term counts the prompt's tokens too, as TRL's ORPO does. The comparison never does.
        share_prompts: run the prompt of a pair once, which changes no number, where the attention of policy and
            reference can do it: ours for the CPU (`"blocked"`).
        **options: fields of `PreferenceLoss` (`beta=0.1`, `label_smoothing=0.0`, `loss_type="sigmoid"`,
            `nll_loss_coef`, `nll_norm`, `simpo_gamma`, ...; None: the default); the others are those of `BaseTrainer`.

    Raises:
        ValueError: `ref_model` is the policy itself, or an option of the loss makes no sense.
    """

    section = "dpo_config"
    rows = ("pairs",)
    sides = len(SIDES)
    takes_flat = True
    takes_images = True
    balances_experts = True
    learns_from_rows_alone = True
    reference: ScoredModel | StartingPoint | None

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        *args: Any,
        reference: str = "start",
        ref_log_probs_given: bool = False,
        starts_at_reference: bool | None = None,
        mask_prompt: bool = True,
        share_prompts: bool = True,
        **options: Any,
    ) -> None:
        of_loss = {f.name: options.pop(f.name) for f in fields(PreferenceLoss) if f.name in options}
        self.loss = PreferenceLoss(**{name: value for name, value in of_loss.items() if value is not None})
        self.couples_rows = self.loss.couples_rows
        self.mask_prompt = mask_prompt
        if len(args) > 3 or not isinstance(ref_model, nn.Module | None):
            raise TypeError(
                f"{type(self).__name__} takes model, ref_model (a module, or None), optimizer, train_loader and val_loader by "
                f"position, got {type(ref_model).__name__} as ref_model and {len(args)} more; name the arguments"
            )
        compared_with, starts_equal = None, False
        if self.loss.needs_reference and not ref_log_probs_given:
            compared_with, starts_equal = choose_reference(model, ref_model, reference)
        self._sees_once = compared_with is not None and see_alike(model, compared_with)
        self._has_reference, self.shares_prompts = compared_with is not None, False
        if starts_at_reference is None:
            starts_at_reference = starts_equal
        self._at_start = starts_at_reference and self.loss.needs_reference
        self._baseline = torch.zeros(2, dtype=torch.float64)  # sum and number of the rewards of earlier steps
        self._new_rewards = torch.zeros(2)
        self._joined_before: list[
            tuple[Batch, Batch]
        ] = []  # micro-batches that `_begin_step` has joined, and their rows
        super().__init__(model, *args, **options)
        self._new_rewards = self._new_rewards.to(self.device)
        if compared_with is not None:
            self.reference = reference_of(compared_with, self, self._policy, reference)
        models = [self._policy, *([] if self.reference is None else [self.reference])]
        self.shares_prompts = share_prompts and all(model.knows_branches(self.device) for model in models)

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        section: DPOConfig = build.section
        return cls._reference_from_config(section, build) | {
            "loss_type": resolve_loss_type(section.loss_type, section.loss_ipo),
            "beta": section.loss_beta,
            "label_smoothing": section.loss_label_smoothing,
            "simpo_gamma": section.loss_simpo_gamma,
            "nll_loss_coef": section.nll_loss_coef,
            "nll_norm": section.nll_norm,
            "f_divergence": section.f_divergence,
            "f_alpha": section.f_alpha,
            "discopop_tau": section.discopop_tau,
            "ld_alpha": section.ld_alpha,
            "mask_prompt": section.mask_prompt,
            "share_prompts": section.share_prompts,
        }

    @classmethod
    def _reference_from_config(cls, section: "DPOConfig", build: "Build") -> dict[str, Any]:
        """What the policy is compared with, as keywords; none: the constructor makes a copy, or needs none."""
        which: dict[str, Any] = {"reference": section.reference}
        if "ref_model" in build.given:
            return which
        source = section.ref_model_checkpoint
        reference = None if source is None else build.frozen(source)
        if not section.precompute_ref_log_probs:
            return which if reference is None else which | {"ref_model": reference}
        if not PreferenceLoss(resolve_loss_type(section.loss_type, section.loss_ipo)).needs_reference:
            return {}
        if section.reference == "base":
            check_base(build.policy, has_model=reference is not None)
        scorer = build.policy if reference is None else reference
        for stream in build.streams:
            precompute_reference(stream, scorer, build, section.share_prompts, section.reference)
        starts_equal = reference is None and section.reference == "start"
        return {"ref_log_probs_given": True, "starts_at_reference": starts_equal}

    @classmethod
    def _data_from_config(cls, section: "DPOConfig") -> DataRequest:
        loss = PreferenceLoss(resolve_loss_type(section.loss_type, section.loss_ipo))
        return DataRequest(cls.rows, share_prompts=section.share_prompts, couples_rows=loss.couples_rows)

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        section: DPOConfig = sketch.section
        loss = PreferenceLoss(resolve_loss_type(section.loss_type, section.loss_ipo))
        keeps_reference = loss.needs_reference and not section.precompute_ref_log_probs
        reference = sketch.frozen() if keeps_reference else {}
        return {"rows_per_sample": len(SIDES), **reference}

    def _build_module(self, model: nn.Module) -> nn.Module:
        self._policy = scored(model)
        # Until the policy is prepared: adapters that begin with what rows say are made where it is what it is compared with.
        self.reference = self._policy if self._has_reference else None
        return self._policy

    def _loss_weight(self, batch: Batch) -> float:
        return float(row_weights(batch, num_pairs(batch)).sum())

    def _count_tokens(self, batch: Batch) -> int:
        return count_tokens(batch)

    def _get_extra_config_info(self) -> dict[str, Any]:
        reference = describe_reference(self.reference)
        if self.reference is None and self.loss.needs_reference:
            reference = "given log-probs"
        return {"loss": self.loss, "reference": reference, "prompts": "shared" if self.shares_prompts else "repeated"}

    def _joined(self, batch: Batch) -> Batch:
        """The batch as rows, with `completion`, the answers' part of the labels, when the prompts are labels too."""
        for number, (one, rows) in enumerate(self._joined_before):
            if one is batch:
                del self._joined_before[number]
                return rows
        rows = join(batch, SIDES)
        if self.mask_prompt or not self.loss.nll_weight:
            return rows
        return with_prompts(rows, num_answers(rows) // 2) | {"completion": rows["labels"]}

    def _begin_step(
        self, batches: list[Batch], weights: list[float], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Count what the step's NLL term is a mean of: it has another denominator than the comparison."""
        self._new_rewards.zero_()
        if not self.loss.nll_weight:
            return
        counts = [sum(weights), 0.0]
        self._joined_before = []
        for batch, weight in zip(batches, weights, strict=True):
            if weight:
                rows = self._joined(batch)
                self._joined_before.append((batch, rows))
                number = num_answers(rows) // 2
                lengths = supervised(rows).sum(1)[:number]
                terms = NLL_NORMS[self.loss.nll_norm](lengths, lengths)[1]
                counts[1] += float((terms * row_weights(rows, number)).sum())
        pairs, all_terms = sum_over_ranks(torch.tensor(counts, device=self.device)).tolist()
        self._nll_terms_per_pair = all_terms / (pairs or 1.0)

    def _policy_rows(self, batch: Batch) -> Batch:
        rows = self._joined(batch)
        shares = self.shares_prompts and not of_images(rows)
        rows = share_prompts(rows) if shares else lay_flat(rows, self.machine.layout)
        return moved(rows, self.device)

    def _prepare_batch(self, batch: Batch) -> Batch:
        rows = self._policy_rows(batch)
        if self.reference is not None and "ref_chosen_logps" not in rows:
            rows = seen_once(rows) if self._sees_once else rows
            with torch.no_grad():
                rows["ref_logprobs"] = score(self.reference, rows).logprobs
        return rows

    def _forward(self, batch: Batch) -> TokenScores:
        return score(self.model, batch, differentiable=True)

    def _compute_loss(self, outputs: TokenScores, batch: Batch) -> Tensor:
        pairs = self._pairs(outputs.logprobs, batch)
        terms = self.loss(pairs)
        count = len(terms.losses)
        if self._at_start and self.model.training and self.machine.step == 0:
            self._check_start(pairs, terms)
        for name, value in terms.metrics.items():
            self.record(name, value.sum(), count)
        if self.loss.nll_weight:
            self.record("nll_loss", terms.nll_sums.detach().sum(), terms.nll_counts.sum())
        total: Tensor | float = count
        if "row_weights" in batch:
            terms, total = terms.weighted(batch["row_weights"]), batch["row_weights"].sum()
        nll_terms = None
        if self.loss.nll_weight:
            nll_terms = self._nll_terms_per_pair * total  # this batch's even share of the step's
        if "bco_pair" in self.loss.names and self.model.training and self.machine.is_recording:
            rewards = torch.cat([terms.metrics["rewards/chosen"], terms.metrics["rewards/rejected"]])
            self._new_rewards += torch.stack([rewards.sum().float(), rewards.new_tensor(len(rewards)).float()])
        return terms.total(total, nll_terms)

    def _pairs(self, logprobs: Tensor, batch: Batch) -> Pairs:
        """Reduce per-token log-probs to one number per answer."""
        answers = batch | {"labels": batch.get("completion", batch["labels"])}
        logps, masks = as_rows(logprobs, batch), supervised(answers).chunk(2)
        reference: tuple[Tensor | None, ...] = (None, None)
        if "ref_logprobs" in batch:
            reference = as_rows(batch["ref_logprobs"], batch).chunk(2)
        pairs = pairs_from_tokens(*logps.chunk(2), *masks, *reference)
        changes: dict[str, Any] = {}
        if "ref_chosen_logps" in batch:
            changes = {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}
        if "completion" in batch:
            nll_mask = supervised(batch).chunk(2)[0]
            changes["nll_logps"] = torch.where(nll_mask, logps.chunk(2)[0], 0.0).sum(1)
            changes["nll_lengths"] = nll_mask.sum(1)
        if "bco_pair" in self.loss.names:
            total, number = self._baseline.tolist()
            changes["reward_baseline"] = logps.new_tensor(total / (number or 1.0))
        return replace(pairs, **changes)

    def _end_step(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        if "bco_pair" in self.loss.names:
            self._baseline += sum_over_ranks(self._new_rewards).cpu()

    def _get_extra_checkpoint_state(self) -> dict[str, Any]:
        return {"reward_baseline": self._baseline.tolist()}

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._baseline = torch.tensor(state["reward_baseline"], dtype=torch.float64)

    def _check_start(self, pairs: Pairs, terms: PreferenceTerms) -> None:
        """Before any update an equal policy and reference give rewards of 0, and DPO a loss of ln 2.

        Raises:
            StartError: they do not.
        """
        precision = self.machine.precision_name
        limit = _AT_REFERENCE.get(precision, _AT_REFERENCE_HALF)
        off = max(float(ratio.detach().abs().max()) for ratio in pairs.log_ratios(average=True))
        loss, margin = float(terms.losses.detach().mean()), float(terms.metrics["rewards/margins"].abs().mean())
        is_dpo = resolve_loss_type(self.loss.loss_type) == {"sigmoid": 1.0}
        if off <= limit and not (is_dpo and abs(loss - math.log(2)) > margin + 1e-5):  # its slope is at most 1
            return
        raise StartError(
            f"before the first update the policy is the reference, so all rewards must be 0 and the loss of DPO "
            f"{math.log(2):.6f}, but the log-probs differ by {off:.2e} per token (at most {limit:g} is "
            f"rounding in {precision}) and the loss is {loss:.6f}. Likely causes: dropout in the policy (set "
            f"attention_dropout and the like to 0), reference log-probs of other weights or another tokenizer, a "
            f"model that was changed after the trainer was made. If policy and reference are meant to differ, pass "
            f"starts_at_reference=False"
        )
