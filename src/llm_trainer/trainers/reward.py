"""Reward models: one number per answer, learnt from pairs of a better and a worse one, or one per reasoning step."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llm_trainer.image_batch import moved, of_images
from llm_trainer.losses.language import IGNORE, mean_over
from llm_trainer.losses.reward import bradley_terry, process_reward
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.pretrained import REWARD_MODELS, Kind, find_pretrained
from llm_trainer.models.rewarding import Rewarding, load_reward_model, process_reward_model, reward_model
from llm_trainer.trainers.answers import (
    Batch,
    count_tokens,
    join,
    lay_flat,
    mean_over_rows,
    model_inputs,
    num_pairs,
    row_weights,
    share_prompts,
)
from llm_trainer.trainers.base import BaseTrainer
from llm_trainer.trainers.building import DataRequest

if TYPE_CHECKING:
    from llm_trainer.config.algorithms import RewardConfig
    from llm_trainer.config.schema import TrainConfig
    from llm_trainer.trainers.building import Build, Sketch

SIDES = ("chosen", "rejected")
_INPUTS = ("input_ids", "attention_mask", "position_ids", "document_lengths")


class RewardTrainer(BaseTrainer):
    """A reward model. Pairs (Bradley-Terry): the mean of `-log sigmoid(chosen - rejected - margin)` over the step's pairs.

    Judged steps: the mean of the binary cross-entropy over all steps of the optimizer step (a process reward model).

    Batches: as those of `DPOTrainer`, and perhaps `margin [B]`, by how much the chosen answer is better. For steps
    `input_ids [B, T]`, `attention_mask [B, T]` and `step_labels [B, T]`, how right (0 to 1) the step is that ends at this
    token, -100 elsewhere, and perhaps `loss_weights [B, T]`, how much it counts; or the same laid flat.

    Args:
        model: a `transformers` sequence-classification model with one label, for steps a token-classification model,
            whose folder is what is saved (`models.rewarding` makes them of language models).
        center_coef: weight of the term that keeps the rewards of pairs around 0.
        use_margin: False: ignore the margins that the data has.
        share_prompts: run the prompt of a pair once, as `DPOTrainer` does.
    """

    section = "reward_config"
    rows = ("pairs", "process")
    sides = len(SIDES)
    takes_flat = True
    takes_images = True
    reader = Rewarding
    learns_from_rows_alone = True

    def __init__(
        self, *args: Any, center_coef: float = 0.0, use_margin: bool = True, share_prompts: bool = True, **kwargs: Any
    ) -> None:
        self.center_coef, self.use_margin = center_coef, use_margin
        self.shares_prompts = False
        super().__init__(*args, **kwargs)
        self.shares_prompts = share_prompts and self._rewarding.knows_branches(self.device)

    @classmethod
    def _from_config(cls, config: "TrainConfig", build: "Build") -> dict[str, Any]:
        section: RewardConfig = build.section
        return {
            "center_coef": section.center_coef,
            "use_margin": section.use_margin,
            "share_prompts": section.share_prompts,
        }

    @classmethod
    def _model_from_config(cls, config: "TrainConfig", build: "Build") -> nn.Module:
        """The reward model of a folder, to train on, or a new head on a language model: of answers or, as the data is, steps.

        Raises:
            ValueError: the model of the folder judges the other of the two.
        """
        of_steps, source = build.kind.name == "process", config.model_config
        wanted = Kind.STEP_REWARD_MODEL if of_steps else Kind.ANSWER_REWARD_MODEL
        found = None
        if isinstance(source, str):
            found = find_pretrained(source, (Kind.LANGUAGE_MODEL, *REWARD_MODELS), key="model_config")
        if found is None or found.kind is Kind.LANGUAGE_MODEL:
            make = process_reward_model if of_steps else reward_model
            return make(build.model(), build.tokenizer.pad_token_id)
        if found.kind is not wanted:
            rows = "answers judged step by step" if of_steps else "pairs of answers"
            raise ValueError(
                f"model_config: {source} holds {found.kind.value}, but the rows of file_dataset are {rows}; expected "
                f"{wanted.value}, or a language model"
            )
        attention = resolve_attention(config.run_config.attention, build.device)
        return load_reward_model(found.source, attention)

    @classmethod
    def _data_from_config(cls, section: "RewardConfig") -> DataRequest:
        return DataRequest(cls.rows, share_prompts=section.share_prompts)

    @classmethod
    def _plan_costs(cls, config: "TrainConfig", sketch: "Sketch") -> dict[str, Any]:
        return {"rows_per_sample": len(SIDES), "has_head": False}

    def _build_module(self, model: nn.Module) -> nn.Module:
        self._rewarding = Rewarding(model)
        return self._rewarding

    def _loss_weight(self, batch: Batch) -> float:
        if "step_labels" in batch:
            return float(_step_weights(batch).sum())
        return float(row_weights(batch, num_pairs(batch)).sum())

    def _count_tokens(self, batch: Batch) -> int:
        return count_tokens(batch)

    def _prepare_batch(self, batch: Batch) -> Batch:
        if "step_labels" in batch:
            return moved(lay_flat(batch, self.machine.layout), self.device)
        rows = join(batch, SIDES)
        shares = self.shares_prompts and not of_images(rows)
        rows = share_prompts(rows) if shares else lay_flat(rows, self.machine.layout)
        return moved(rows, self.device)

    def _forward(self, batch: Batch) -> Tensor:
        """`[2B]` rewards, the chosen answers' first; of judged steps one per token, like `input_ids`."""
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        inputs |= model_inputs({name: batch[name] for name in of_images(batch)}, self.model)
        rewards = self.model(**inputs, every_token="step_labels" in batch)
        return rewards[batch["document_order"]] if "document_order" in batch else rewards

    def _compute_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        if "step_labels" in batch:
            return self._loss_of_steps(outputs, batch)
        chosen, rejected = outputs.chunk(2)
        margin = batch["margin"] if self.use_margin and "margin" in batch else None
        losses, metrics = bradley_terry(chosen, rejected, margin, self.center_coef)
        for name in ("accuracy", "margin", "mean_reward"):
            self.record(name, metrics[name].sum(), len(losses))
        self.record("min_reward", metrics["min_reward"].min())  # the mean over micro-batches of their extremes, as TRL
        self.record("max_reward", metrics["max_reward"].max())
        return mean_over_rows(losses, batch)

    def _loss_of_steps(self, scores: Tensor, batch: Batch) -> Tensor:
        judged = batch["step_labels"] != IGNORE
        losses, metrics = process_reward(scores, batch["step_labels"], judged)
        self.record("accuracy", metrics["accuracy"].sum(), judged.sum())
        weights = _step_weights(batch)
        return mean_over((losses * weights).sum(), weights.sum())


def _step_weights(batch: Batch) -> Tensor:
    """`[B, T]` how much the step that ends at a token counts, 0 where none does."""
    judged = batch["step_labels"] != IGNORE
    return judged * batch["loss_weights"].float() if "loss_weights" in batch else judged
