"""A policy and its critic, called as one: the log-probability of a token, and the value of what stood before it."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_trainer.losses.language import IGNORE
from llm_trainer.models.rewarding import Rewarding, process_reward_model
from llm_trainer.models.scored import ScoredModel, TokenScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Acted(NamedTuple):
    """What policy and critic say about the labels of a batch.

    Attributes:
        scores: of the policy.
        values: `[B, T]`, at a label's position the value of the tokens BEFORE it, from which it was chosen; 0 where nothing
            is supervised.
    """

    scores: TokenScores
    values: Tensor


class ActorCritic(nn.Module):
    """A policy and its critic, whose forward gives `Acted`.

    Args:
        policy: a language model with scores.
        critic: a classification model with one label, of its own or on the body of the policy's (`critic_on_body`), which
            then runs once for both.

    Raises:
        ValueError: the critic is on the policy's body, and the policy does not come apart into body and head.
    """

    def __init__(self, policy: ScoredModel, critic: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.critic = Rewarding(critic)
        self.shares_body = any(inner is self.critic.body for inner in policy.modules())
        if self.shares_body and policy.head is None:
            raise ValueError(
                f"the critic is a head on the body of the policy, a {type(policy.base).__name__}, whose logits are not "
                f"those of a linear head on that body; expected a critic with a body of its own (value_model)"
            )

    def forward(self, labels: Tensor, detach_body: bool = False, **inputs: Any) -> Acted:
        """Score `labels`, and value what stands before each.

        Args:
            labels: `[B, T]`, or `[1, N]` laid flat; -100 where nothing counts. A document's first token is never a label.
            detach_body: the values give a shared body no gradient.
            inputs: as those of `ScoredModel`.
        """
        supervised = labels[:, 1:] != IGNORE  # (B, T - 1)
        if self.shares_body:

            def value(states: Tensor, head: nn.Linear | None) -> Tensor:
                states = states.detach() if detach_body else states
                return self.critic.head(states).squeeze(-1).float()  # (N,)

            scores = self.policy(labels=labels, distance=value, **inputs)
            assert scores.distance is not None
            spread = scores.distance.new_zeros(supervised.shape).masked_scatter(supervised, scores.distance)
            return Acted(scores._replace(distance=None), F.pad(spread, (1, 0)))

        scores = self.policy(labels=labels, **inputs)
        layout = {
            name: inputs[name] for name in ("attention_mask", "position_ids", "document_lengths") if name in inputs
        }
        after = self.critic(
            inputs["input_ids"], every_token=True, **layout
        )  # (B, T), of each token and those before it
        return Acted(scores, F.pad(torch.where(supervised, after[:, :-1], 0.0), (1, 0)))


def critic_on_body(policy: "PreTrainedModel") -> "PreTrainedModel":
    """A critic with a new head on the policy's own body, which then learns from both losses."""
    return process_reward_model(policy, policy.config.pad_token_id)


def critic_of(policy: "PreTrainedModel") -> "PreTrainedModel":
    """A critic with a new head on a copy of the policy's body as it is now."""
    body = deepcopy(policy.base_model)
    critic = process_reward_model(policy, policy.config.pad_token_id)
    setattr(critic, critic.base_model_prefix, body)
    return cast("PreTrainedModel", critic.requires_grad_(True))
