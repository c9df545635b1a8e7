"""A policy and its critic, called as one: the log-probability of a token, and the value of what stood before it."""

from copy import deepcopy
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llm_trainer.losses.experts import Routing
from llm_trainer.losses.language import IGNORE
from llm_trainer.models.freezing import see_alike
from llm_trainer.models.heads import logits_of
from llm_trainer.models.inside import adapted_model, has_adapters, language_config, transformers_model, vocab_size_of
from llm_trainer.models.rewarding import Rewarding, process_reward_model
from llm_trainer.models.scored import ScoredModel, TokenScores
from llm_trainer.models.seeing import accepted_inputs
from llm_trainer.models.vision import SeenOnce

# What of a batch a critic with a body of its own is given, beside the ids.
_OF_A_CRITIC = ("attention_mask", "position_ids", "document_lengths", "images", "rope_positions")


class Acted(NamedTuple):
    """What policy and critic say about the labels of a batch.

    Attributes:
        scores: of the policy.
        values: `[B, T]`, at a label's position the value of the tokens BEFORE it, from which it was chosen; 0 where nothing
            is supervised.
    """

    scores: TokenScores
    values: Tensor

    @property
    def routing(self) -> Routing | None:
        """What the routers of the policy did, where it is a mixture of experts."""
        return self.scores.routing

    @property
    def logprobs(self) -> Tensor:
        """`[B, T]` of the policy, for whoever asks no critic."""
        return self.scores.logprobs


class ActorCritic(nn.Module):
    """A policy and its critic, whose forward gives `Acted`.

    Args:
        policy: a language model with scores.
        critic: of the policy (`critic_of`); where both have one body, it runs once for both.

    Attributes:
        shares_body: whether they have.
        sees_once: the critic takes what the policy's tower makes of images: neither learns to see, and both see alike.

    Raises:
        ValueError: the critic is on the policy's body, and the policy does not come apart into body and head.
    """

    def __init__(self, policy: ScoredModel, critic: nn.Module) -> None:
        super().__init__()
        self.policy = policy
        self.critic = reader_of(critic)
        self.shares_body = any(inner is self.critic.body for inner in policy.modules())
        if self.shares_body and policy.head is None:
            raise ValueError(
                f"the critic is a head on the body of the policy, a {type(policy.base).__name__}, whose logits are not "
                f"those of a linear head on that body; expected a critic with a body of its own (value_model)"
            )
        own = not self.shares_body and isinstance(self.critic, Rewarding)
        self.sees_once = own and see_alike(policy.base, critic) and see_alike(critic, policy.base)

    def compile(self, *args: Any, **options: Any) -> None:
        """Of models that see their language models alone (`Seeing.compile`)."""
        if self.policy.vision.model is None:
            super().compile(*args, **options)
            return
        self.policy.compile(*args, **options)
        if not self.shares_body:
            self.critic.compile(*args, **options)

    def forward(self, labels: Tensor, detach_body: bool = False, **inputs: Any) -> Acted:
        """Score `labels`, and value what stands before each.

        Args:
            labels: `[B, T]`, or `[1, N]` laid flat; -100 where nothing counts. A document's first token is never a label.
            detach_body: the values give a shared body no gradient.
            inputs: as those of `ScoredModel`.
        """
        supervised = labels[:, 1:] != IGNORE  # (B, T - 1)
        if self.shares_body:

            def value(states: Tensor, head: nn.Module | None) -> Tensor:
                states = states.detach() if detach_body else states
                return cast(Rewarding, self.critic).head(states).squeeze(-1).float()  # (N,)

            scores = self.policy(labels=labels, distance=value, **inputs)
            assert scores.distance is not None
            spread = scores.distance.new_zeros(supervised.shape).masked_scatter(supervised, scores.distance)
            return Acted(scores._replace(distance=None), F.pad(spread, (1, 0)))

        seen = inputs.get("images")
        if self.sees_once and not isinstance(seen, SeenOnce):
            seen = inputs["images"] = SeenOnce(seen)
        scores = self.policy(labels=labels, **inputs)
        layout = {name: inputs[name] for name in _OF_A_CRITIC if name in inputs}
        if isinstance(seen, SeenOnce) and not self.sees_once:  # the critic sees for itself
            layout["images"] = seen.images
        # (B, T), of each token and those before it
        after = self.critic(inputs["input_ids"], every_token=True, **layout)
        return Acted(scores, F.pad(torch.where(supervised, after[:, :-1], 0.0), (1, 0)))


class OwnCritic(nn.Module):
    """A critic of the user's: any module that gives a number for each token, read as `Rewarding` is.

    Args:
        model: its forward takes `input_ids [B, T]`, and `attention_mask` and `position_ids` where it has these, and returns
            `[B, T]` or `[B, T, 1]`, as a tensor, as `.logits` or as `["logits"]`. Where rows show some, `images`
            (`image_batch.ImageBatch`), which it has to have.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.body = model
        self._accepted = accepted_inputs(model)

    def per_token(self, input_ids: Tensor, **layout: Any) -> Tensor:
        """The numbers of `input_ids [B, T]` or `[1, N]`, of the same shape."""
        return self(input_ids, **layout)

    def forward(self, input_ids: Tensor, every_token: bool = True, **layout: Any) -> Tensor:
        """Values `[B, T]` of `input_ids [B, T]`.

        Raises:
            ValueError: the module returned another shape.
        """
        if self._accepted is not None:
            layout = {name: value for name, value in layout.items() if name in self._accepted}
        values = logits_of(self.body(input_ids, **layout), type(self.body).__name__)
        if values.dim() == 3 and values.shape[-1] == 1:
            values = values.squeeze(-1)
        if values.shape != input_ids.shape:
            raise ValueError(
                f"value_model: {type(self.body).__name__} returned the shape {tuple(values.shape)} for input_ids "
                f"{tuple(input_ids.shape)}; expected one number for each token"
            )
        return values.float()


def reader_of(critic: nn.Module) -> "Rewarding | OwnCritic":
    """What gives a critic's numbers per token."""
    from transformers import PreTrainedModel

    return Rewarding(critic) if isinstance(adapted_model(critic), PreTrainedModel) else OwnCritic(critic)


def critic_of(policy: nn.Module, value_model: nn.Module | None = None, on_policy: bool | None = None) -> nn.Module:
    """The critic of a policy.

    Args:
        policy: a language model.
        value_model: a classification model with one label, such as a reward model, is the critic itself; a language model's
            body gets a new head; any other module is the user's own critic. None: a new head on the policy's body.
        on_policy: whether that is the body itself, which then learns from both losses, or a copy of it as it is now. None:
            itself where only its adapters learn: a copy of it would cost as much memory as all the rest.

    Raises:
        ValueError: it is the policy itself, has another vocabulary, or cannot be made.
    """
    if value_model is None:
        if on_policy is None:
            on_policy = has_adapters(policy)
        return _made_of(policy, on_policy)
    if value_model is policy:
        raise ValueError(
            "value_model is the policy itself, whose head gives a distribution over the vocabulary; expected another model, "
            "or none and critic_on_policy=True for a head on the policy's own body"
        )
    if on_policy:
        raise ValueError("critic_on_policy: value_model is a critic with a body of its own; give one of them")
    theirs, ours = vocab_size_of(value_model), vocab_size_of(policy)
    if theirs is not None and ours is not None and theirs < ours:
        raise ValueError(
            f"value_model knows {theirs} tokens, the policy {ours}; expected a critic with the policy's tokenizer: one trained "
            f"on this model's family, or none, and one is made of the policy"
        )
    model = transformers_model(value_model)
    if model is not value_model or model.get_output_embeddings() is None:
        return value_model
    return process_reward_model(model, language_config(model.config).pad_token_id)


def _made_of(policy: nn.Module, shares_body: bool) -> nn.Module:
    model = transformers_model(policy)
    if model is None:
        raise ValueError(
            f"value_model: none given, and a {type(policy).__name__} is no transformers model of which a critic could be made; "
            f"expected a module that gives a number for each token"
        )
    critic = process_reward_model(model, language_config(model.config).pad_token_id)
    if not shares_body:
        setattr(critic, critic.base_model_prefix, deepcopy(model.base_model))
    return critic
