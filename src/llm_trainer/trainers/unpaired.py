"""Learning from single answers that are called good or bad: KTO, and APO-zero for such data."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_trainer.image_batch import moved, of_images
from llm_trainer.losses.unpaired import UnpairedLoss, kto_kl, mismatched_order
from llm_trainer.models.freezing import see_alike
from llm_trainer.models.frozen import StartingPoint, choose_reference
from llm_trainer.models.scored import ScoredModel, TokenScores, scored
from llm_trainer.trainers.answers import (
    Batch,
    as_rows,
    count_tokens,
    join,
    lay_flat,
    mean_over_rows,
    num_answers,
    row_weights,
    score,
    supervised,
)
from llm_trainer.trainers.base import BaseTrainer
from llm_trainer.trainers.references import reference_of, seen_once

if TYPE_CHECKING:
    from llm_trainer.config.algorithms import KTOConfig
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build, Sketch

_KL = "kl_"  # keys of a batch's mismatched rows: prompts with the completions of other prompts


class KTOTrainer(BaseTrainer):
    """KTO: the mean of `UnpairedLoss` over the answers of the whole optimizer step.

    Batches: `prompt_input_ids [B, P]`, `completion_input_ids [B, L]`, each with its `..._attention_mask`, padded on any
    side; or joined ones (see `trainers.answers`); and `desirable [B]`, bool.

    KTO's KL is one number per step, over the mismatched pairs of all its micro-batches and ranks. A joined batch brings
    them (`kl_input_ids`, `kl_labels`, ...: our own data does, so the KL does not depend on the order or on how a step
    is cut). Otherwise each prompt of a micro-batch gets the completion of another one; a micro-batch of one row has
    none, and a step without any keeps the KL of the step before.

    Args:
        ref_model: what the policy is compared with; None: the policy as it is now.
        reference: 'base': without a `ref_model` the policy with its adapters (`peft`) off.
        loss_type: 'kto' or 'apo_zero_unpaired', which needs no KL.
        beta: how strongly the policy is held to the reference.
        desirable_weight: weight of the good answers.
        undesirable_weight: weight of the bad ones.
    """

    section = "kto_config"
    rows = ("unpaired",)
    takes_flat = True
    takes_images = True
    balances_experts = True
    learns_from_rows_alone = True
    reference: ScoredModel | StartingPoint

    def __init__(
        self,
        *args: Any,
        ref_model: nn.Module | None = None,
        reference: str = "start",
        loss_type: str = "kto",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **options: Any,
    ) -> None:
        self.loss = UnpairedLoss(loss_type, beta, desirable_weight, undesirable_weight)
        self._kl: float | None = None if loss_type == "kto" else 0.0  # of the last training step that has an estimate
        self._kl_of_step = self._kl  # of the step under way, or of the batch that is evaluated
        self._num_of_kind = torch.zeros(2)  # good and bad answers of the step
        model = options["model"] if "model" in options else args[0]
        compared_with, _ = choose_reference(model, ref_model, reference)
        self._sees_once = see_alike(model, compared_with)
        super().__init__(*args, **options)
        self.reference = reference_of(compared_with, self, self._policy, reference)

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        section: KTOConfig = build.section
        source = section.ref_model_checkpoint
        reference: dict[str, Any] = {"reference": section.reference}
        if source is not None and "ref_model" not in build.given:
            reference["ref_model"] = build.frozen(source)
        return reference | {
            "loss_type": section.loss_type,
            "beta": section.loss_beta,
            "desirable_weight": section.desirable_weight,
            "undesirable_weight": section.undesirable_weight,
        }

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        # For the KL both models score mismatched answers too.
        forwards = 3 if sketch.section.loss_type == "kto" else 1
        return sketch.frozen(forwards=forwards)

    def _build_module(self, model: nn.Module) -> nn.Module:
        self._policy = scored(model)
        self.reference = (
            self._policy
        )  # until the policy is prepared: adapters that begin with what rows say are made here
        return self._policy

    def _loss_weight(self, batch: Batch) -> float:
        return float(row_weights(batch, len(batch["desirable"])).sum())

    def _count_tokens(self, batch: Batch) -> int:
        return count_tokens({name: value for name, value in batch.items() if not name.startswith(_KL)})

    def _begin_step(
        self, batches: list[Batch], weights: list[float], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> None:
        """Count the step's good and bad answers, and estimate its KL from its mismatched pairs."""
        num_good = num_bad = 0
        for batch, weight in zip(batches, weights, strict=True):
            if weight:
                desirable = batch["desirable"].bool()
                num_good += int(desirable.sum())
                num_bad += int((~desirable).sum())
        counts = torch.tensor([num_good, num_bad], dtype=torch.float32, device=self.device)
        self._num_of_kind = sum_over_ranks(counts)
        if self.loss.loss_type != "kto":
            return
        total, number = torch.zeros((), device=self.device), 0
        for batch, weight in zip(batches, weights, strict=True):
            mismatched = self._mismatched(batch)
            if mismatched is None:
                continue
            mismatched = self._with_reference(mismatched)
            ratios = log_ratios(score(self.model, mismatched).logprobs, mismatched)
            if weight:
                total, number = total + ratios.sum(), number + len(ratios)
        total, count = sum_over_ranks(torch.stack([total, total.new_tensor(number)]))
        self._kl_of_step = self._kl
        if count > 0:
            self._kl_of_step = float(kto_kl(total, count))
            if self.model.training:  # what is evaluated must not change what is learned
                self._kl = self._kl_of_step
        elif self._kl is None:
            raise ValueError(
                "KTO estimates its KL from prompts with the completions of other prompts, and the first step holds no "
                "two rows in one micro-batch; expected a batch_size of at least 2, or batches with kl_input_ids"
            )

    def _mismatched(self, batch: Batch) -> Batch | None:
        """A batch's mismatched rows on the device: those it brings, or its prompts with one another's completions."""
        given = {name.removeprefix(_KL): value for name, value in batch.items() if name.startswith(_KL)}
        if given:
            return moved(lay_flat(given, self.machine.layout), self.device)
        if len(batch["desirable"]) < 2:
            return None
        if "prompt_input_ids" not in batch:
            raise ValueError(
                "a joined KTO batch brings no mismatched pairs: expected the keys kl_input_ids, kl_labels and "
                "kl_attention_mask, or prompt_input_ids and completion_input_ids, which the trainer joins itself"
            )
        order = mismatched_order(batch["prompt_input_ids"] * batch["prompt_attention_mask"])
        swapped = {name: batch[name][order] for name in batch if name.startswith("completion_")}
        of_prompts = of_images(batch)
        kept = {name: batch[name] for name in batch if name.startswith("prompt_") or name in of_prompts}
        swapped_rows = join(kept | swapped, ("completion",))
        return moved(lay_flat(swapped_rows, self.machine.layout), self.device)

    def _with_reference(self, rows: Batch) -> Batch:
        """Rows with what the reference says of their labels."""
        rows = seen_once(rows) if self._sees_once else rows
        with torch.no_grad():
            return rows | {"ref_logprobs": score(self.reference, rows).logprobs}

    def _prepare_batch(self, batch: Batch) -> Batch:
        rows = {name: value for name, value in batch.items() if not name.startswith(_KL)}
        joined = join(rows, ("completion",))
        return self._with_reference(moved(lay_flat(joined, self.machine.layout), self.device))

    def _forward(self, batch: Batch) -> TokenScores:
        return score(self.model, batch, differentiable=True)

    def _compute_loss(self, outputs: TokenScores, batch: Batch) -> Tensor:
        assert self._kl_of_step is not None
        desirable = batch["desirable"].bool()
        ratios = log_ratios(outputs.logprobs, batch)
        losses, metrics = self.loss(ratios, desirable, ratios.new_tensor(self._kl_of_step))
        self.record("kl", metrics["kl"] * num_answers(batch), num_answers(batch))
        logps = torch.where(supervised(batch), as_rows(outputs.logprobs.detach(), batch), 0.0).sum(1)
        for kind, chosen in (("chosen", desirable), ("rejected", ~desirable)):
            self.record(f"rewards/{kind}", metrics[f"rewards/{kind}"].sum(), chosen.sum())
            self.record(f"logps/{kind}", logps[chosen].sum(), chosen.sum())
        self._record_margin(metrics["rewards/chosen"].sum(), metrics["rewards/rejected"].sum(), len(losses))
        return mean_over_rows(losses, batch)

    def _record_margin(self, good: Tensor, bad: Tensor, count: int) -> None:
        """This batch's share of the step's margin, the mean reward of good answers minus that of bad ones.

        `good` and `bad` `[]` are sums of rewards; the means are over the step, which must have both kinds.
        """
        num_good, num_bad = self._num_of_kind
        margin = (good / num_good - bad / num_bad) * (num_good + num_bad)  # over `count`: its share of the mean
        both = (num_good > 0) & (num_bad > 0)
        self.record("rewards/margins", torch.where(both, margin, 0.0), torch.where(both, float(count), 0.0))

    def _get_extra_checkpoint_state(self) -> dict[str, Any]:
        return {"kl": self._kl}

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        self._kl = state["kl"]


def log_ratios(logprobs: Tensor, rows: Batch) -> Tensor:
    """`[B]` log-probs of the answers, policy minus reference."""
    return as_rows(logprobs - rows["ref_logprobs"], rows).sum(1)
