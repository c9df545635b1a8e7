"""A run of two models for tests: a policy that learns its labels, and a critic that learns to say 1 before each of them."""

from typing import Any

from torch import Tensor, nn

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.image_batch import moved
from llm_trainer.losses.language import IGNORE
from llm_trainer.model_group import ModelGroup
from llm_trainer.models.critic import Acted, ActorCritic, critic_of
from llm_trainer.models.scored import scored
from llm_trainer.trainers.answers import lay_flat


class TwoModels(SFTTrainer):
    """Both losses are means over the labels of the step."""

    takes_flat = True

    def __init__(self, model: Any, critic: nn.Module, **options: Any) -> None:
        self.critic = critic
        super().__init__(model=model, **options)

    def _other_models(self) -> dict[str, nn.Module]:
        return {"critic": self.critic}

    def _build_module(self, model: nn.Module) -> nn.Module:
        return ActorCritic(scored(model), self.critic)

    def _prepare_batch(self, batch: Any) -> Any:
        return moved(lay_flat(batch, self.machine.layout), self.device)

    def _forward(self, batch: Any) -> Acted:
        return self.model(**{name: batch[name] for name in batch if name != "loss_weights"})

    def _loss_weight(self, batch: Any) -> float:
        return float((batch["labels"][:, 1:] != IGNORE).sum())

    def _compute_loss(self, outputs: Acted, batch: Any) -> Tensor:
        counts = batch["labels"] != IGNORE
        errors = (outputs.values - 1).square() * counts
        return (outputs.scores.loss_sum + errors.sum()) / outputs.scores.num_tokens


def two_models(model: Any, shares_body: bool, lr: float = 1e-2) -> dict[str, Any]:
    """Keywords of `TwoModels`: the critic learns with half the rate, in groups of its own where its body is its own."""
    critic = critic_of(model, on_policy=shares_body)
    optimizer = configure_optimizer(model=ModelGroup(model, {"critic": critic}), lr=lr)
    if not shares_body:
        optimizer = configure_optimizer(model=model, lr=lr)
        for group in configure_optimizer(model=critic, lr=lr / 2).param_groups:
            optimizer.add_param_group(group)
    return {"model": model, "critic": critic, "optimizer": optimizer}
