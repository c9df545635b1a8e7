"""Reward models: one number per answer, learnt from pairs of a better and a worse one."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from llm_trainer.losses.reward import bradley_terry
from llm_trainer.models.rewarding import Rewarding
from llm_trainer.trainers.base import BaseTrainer
from llm_trainer.trainers.completions import Batch, count_tokens, join, num_answers, placed

if TYPE_CHECKING:
    from llm_trainer.config.schema import TrainConfig

SIDES = ("chosen", "rejected")


class RewardTrainer(BaseTrainer):
    """A reward model (Bradley-Terry): the mean of `-log sigmoid(chosen - rejected - margin)` over the step's pairs.

    Batches: as those of `DPOTrainer`, padded, and perhaps `margin [B]`, by how much the chosen answer is better.

    Args:
        model: a `transformers` sequence-classification model with one label, whose folder is what is saved
            (`models.rewarding.reward_model` makes one of a language model).
        center_coef: weight of the term that keeps rewards around 0.
        use_margin: False: ignore the margins that the data has.
    """

    config_section = "reward_config"

    def __init__(self, *args: Any, center_coef: float = 0.0, use_margin: bool = True, **kwargs: Any) -> None:
        self.center_coef, self.use_margin = center_coef, use_margin
        super().__init__(*args, **kwargs)

    @classmethod
    def _from_config(cls, config: "TrainConfig") -> dict[str, Any]:
        section = config.reward_config
        return {} if section is None else {"center_coef": section.center_coef, "use_margin": section.use_margin}

    def _build_module(self, model: nn.Module) -> nn.Module:
        return Rewarding(model)

    def _loss_weight(self, batch: Batch) -> float:
        return float(len(batch["chosen_input_ids"]) if "chosen_input_ids" in batch else num_answers(batch) // 2)

    def _count_tokens(self, batch: Batch) -> int:
        return count_tokens(batch)

    def _prepare_batch(self, batch: Batch) -> Batch:
        return placed(join(batch, SIDES), self.device)

    def _forward(self, batch: Batch) -> Tensor:
        """`[2B]` rewards, the chosen answers' first."""
        return self.model(batch["input_ids"], batch["attention_mask"])

    def _compute_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        chosen, rejected = outputs.chunk(2)
        margin = batch["margin"] if self.use_margin and "margin" in batch else None
        losses, metrics = bradley_terry(chosen, rejected, margin, self.center_coef)
        for name in ("accuracy", "margin", "mean_reward"):
            self.record(name, metrics[name].sum(), len(losses))
        self.record("min_reward", metrics["min_reward"].min())  # the mean over micro-batches of their extremes, as TRL
        self.record("max_reward", metrics["max_reward"].max())
        return losses.mean()
