"""Reward models: a language model's body with a head that gives one number, for an answer or for each of its steps."""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llm_trainer.checkpoint.weights import without_progress_bars
from llm_trainer.models.attention import knows_branches
from llm_trainer.models.build import supported_attention
from llm_trainer.models.pretrained import REWARD_MODELS, Kind, find_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rewarding(nn.Module):
    """A `transformers` classification model with one label, read at each row's last token or at every token.

    `transformers` itself looks for the last token that is not the padding id, which is another one where padding and
    end of text share an id.

    Raises:
        ValueError: the model gives another number of labels.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        head = model.get_submodule("score") if isinstance(model, PreTrainedModel) else None
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{type(model).__name__} is no reward model; make one with models.rewarding.reward_model")
        if head.out_features != 1:
            raise ValueError(f"{type(model).__name__} has {head.out_features} labels, expected 1: num_labels=1")
        self.body = cast("PreTrainedModel", model.base_model)
        self.head = head

    def per_token(self, input_ids: Tensor, **layout: Tensor) -> Tensor:
        """A reward for each of `input_ids [B, T]` or `[1, N]`, of the same shape; `layout` as in `forward`."""
        return self(input_ids, **layout, every_token=True)

    def knows_branches(self, device: torch.device) -> bool:
        """Whether flat batches may have branches (see `models.attention`) when the model runs on `device`."""
        return knows_branches(self.body.config, device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_lengths: Tensor | None = None,
        every_token: bool = False,
    ) -> Tensor:
        """Rewards `[B]` of rows `[B, T]` or of B documents laid flat `[1, N]`; of `every_token`: like `input_ids`."""
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {name: value for name, value in given.items() if value is not None}
        hidden = self.body(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state  # (B, T, D)
        if not every_token:
            hidden = _last_tokens(hidden, attention_mask, document_lengths)  # (B, D)
        return self.head(hidden).squeeze(-1).float()


def _last_tokens(hidden: Tensor, attention_mask: Tensor | None, document_lengths: Tensor | None) -> Tensor:
    """`hidden [B, T, D]` of rows, or `[1, N, D]` of B documents laid flat -> `[B, D]`, at the last token of each."""
    if document_lengths is not None:
        return hidden[0, document_lengths.cumsum(0) - 1]
    assert attention_mask is not None
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = torch.where(attention_mask.bool(), positions, -1).amax(1)  # (B,)
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, last]


def reward_model(model: "PreTrainedModel", pad_token_id: int | None = None) -> "PreTrainedModel":
    """A sequence-classification model with one label on the body of a language model; its head is drawn at random.

    Args:
        model: the language model; the body is shared with it, not copied.
        pad_token_id: stored in the configuration, where `transformers` needs it to read batches.
    """
    from transformers import AutoModelForSequenceClassification

    return _classifier(AutoModelForSequenceClassification, model, pad_token_id)


def process_reward_model(model: "PreTrainedModel", pad_token_id: int | None = None) -> "PreTrainedModel":
    """A token-classification model with one label, the logit that a step is right; arguments of `reward_model`."""
    from transformers import AutoModelForTokenClassification

    return _classifier(AutoModelForTokenClassification, model, pad_token_id)


def _classifier(auto_class: Any, model: "PreTrainedModel", pad_token_id: int | None) -> "PreTrainedModel":
    # 1. the class that fits the body, without weights
    config = deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, pad_token_id
    with torch.device("meta"):
        classifier = auto_class.from_config(config)

    # 2. a new head, and the body of `model`
    has_bias = classifier.score.bias is not None
    head = nn.Linear(config.hidden_size, 1, bias=has_bias, dtype=model.dtype)
    nn.init.normal_(head.weight, std=config.initializer_range)
    if has_bias:
        nn.init.zeros_(head.bias)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    classifier.score = head
    return classifier


def load_reward_model(
    source: str | Path, attention: str = "sdpa", dtype: torch.dtype | str = torch.float32
) -> "PreTrainedModel":
    """The reward model that `find_pretrained` finds.

    Args:
        source: of a classification model with one label.
        attention: as `resolve_attention` gives it.
        dtype: of the parameters.

    Raises:
        ValueError: there is another model: transformers would give any language model a head of random numbers.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    found = find_pretrained(source, REWARD_MODELS)
    num_labels = len(found.config.get("id2label", range(2)))  # transformers does not write its default, 2
    if num_labels != 1:
        raise ValueError(f"{source}: found a classifier with {num_labels} labels, expected one, the reward")
    model_class: Any = AutoModelForSequenceClassification
    if found.kind is Kind.STEP_REWARD_MODEL:
        model_class = AutoModelForTokenClassification
    attention = supported_attention(attention, found.config)
    with without_progress_bars():
        return model_class.from_pretrained(found.source, attn_implementation=attention, dtype=dtype)


class Judge(nn.Module):
    """A reward model, called alike whatever it is: a `transformers` classifier with one label, or any module that gives one
    number for each row of ids `[B, T]` under a mask `[B, T]`.

    Raises:
        ValueError: it judges steps, and not whole completions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel) and type(model).__name__.endswith("ForTokenClassification"):
            raise ValueError(
                f"reward_model (reward_model_checkpoint): a {type(model).__name__} judges the steps of an answer, at the last "
                f"token of each, and here whole completions are judged; expected a model for sequence classification with one "
                f"label (reward_config on pairs). A reward function that calls it may return a number for each token"
            )

        self.model = Rewarding(model) if isinstance(model, PreTrainedModel) else model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards `[B]` of rows padded on the right.

        Raises:
            ValueError: the module gives something else.
        """
        rewards = self.model(input_ids, attention_mask)
        if not isinstance(rewards, Tensor) or rewards.numel() != len(input_ids):
            shape = list(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ValueError(
                f"reward_model: got {shape} for {len(input_ids)} rows, expected one number for each: a transformers "
                f"classification model with one label, or a module that gives [{len(input_ids)}]"
            )
        return rewards.reshape(-1).float()
