"""Reward models: a language model's body with a head that gives one number."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rewarding(nn.Module):
    """A `transformers` sequence-classification model with one label, read at each row's last token by its mask.

    `transformers` itself looks for the last token that is not the padding id, which is another one where padding and
    end of text share an id.

    Raises:
        ValueError: the model gives another number of labels.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        if not isinstance(model, PreTrainedModel) or not isinstance(head := model.get_submodule("score"), nn.Linear):
            raise ValueError(f"{type(model).__name__} is no reward model; make one with models.rewarding.reward_model")
        if head.out_features != 1:
            raise ValueError(f"{type(model).__name__} has {head.out_features} labels, expected 1: num_labels=1")
        self.body, self.head = model.base_model, head

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Rewards `[B]` of rows `[B, T]`."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, T, D]
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        last = torch.where(attention_mask.bool(), positions, -1).amax(1)  # [B]
        return self.head(hidden[torch.arange(len(hidden), device=hidden.device), last]).sum(-1).float()  # of one label


def reward_model(model: "PreTrainedModel", pad_token_id: int | None = None) -> "PreTrainedModel":
    """A sequence-classification model with one label on the body of a language model; its head is drawn at random.

    Args:
        model: the language model; the body is shared with it, not copied.
        pad_token_id: stored in the configuration, where `transformers` needs it to read batches.
    """
    from copy import deepcopy

    from transformers import AutoModelForSequenceClassification

    config = deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, pad_token_id
    with torch.device("meta"):
        empty = AutoModelForSequenceClassification.from_config(config)
    head = nn.Linear(config.hidden_size, 1, bias=False, dtype=model.dtype)
    nn.init.normal_(head.weight, std=config.initializer_range)
    setattr(empty, empty.base_model_prefix, model.base_model)
    empty.score = head
    return empty
