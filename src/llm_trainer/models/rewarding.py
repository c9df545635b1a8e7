"""Reward models: a language model's body with a head that gives one number, for an answer or for each of its steps."""

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llm_trainer.checkpoint.weights import without_progress_bars
from llm_trainer.models.attention import BLOCKED_ARCHITECTURES, knows_branches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ANSWERS, STEPS = "ForSequenceClassification", "ForTokenClassification"  # ends of the names of transformers' classes


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

        if not isinstance(model, PreTrainedModel) or not isinstance(head := model.get_submodule("score"), nn.Linear):
            raise ValueError(f"{type(model).__name__} is no reward model; make one with models.rewarding.reward_model")
        if head.out_features != 1:
            raise ValueError(f"{type(model).__name__} has {head.out_features} labels, expected 1: num_labels=1")
        self.body, self.head = cast("PreTrainedModel", model.base_model), head

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
        hidden = self.body(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state  # [B, T, D]
        if not every_token and document_lengths is not None:
            hidden = hidden[0, document_lengths.cumsum(0) - 1]  # [B, D]
        elif not every_token:
            assert attention_mask is not None
            positions = torch.arange(hidden.shape[1], device=hidden.device)
            last = torch.where(attention_mask.bool(), positions, -1).amax(1)  # [B]
            hidden = hidden[torch.arange(len(hidden), device=hidden.device), last]
        return self.head(hidden).squeeze(-1).float()


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


def _classifier(kind: Any, model: "PreTrainedModel", pad_token_id: int | None) -> "PreTrainedModel":
    config = deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, pad_token_id
    with torch.device("meta"):
        empty = kind.from_config(config)
    bias = empty.score.bias is not None
    head = nn.Linear(config.hidden_size, 1, bias=bias, dtype=model.dtype)
    nn.init.normal_(head.weight, std=config.initializer_range)
    if bias:
        nn.init.zeros_(head.bias)
    setattr(empty, empty.base_model_prefix, model.base_model)
    empty.score = head
    return empty


def judged_in(folder: str | Path) -> str | None:
    """What the model of a Hugging Face folder judges: `ANSWERS`, `STEPS`, or None where it is no classifier."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = config.get("architectures") or []
    return next((kind for kind in (ANSWERS, STEPS) for name in names if name.endswith(kind)), None)


def load_reward_model(
    folder: str | Path, attention: str = "sdpa", dtype: torch.dtype | str = torch.float32
) -> "PreTrainedModel":
    """The reward model of a Hugging Face folder.

    Args:
        folder: of a classification model with one label.
        attention: as `resolve_attention` gives it.
        dtype: of the parameters.

    Raises:
        ValueError: the folder holds another model: transformers would give any language model a head of random numbers.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    judged = judged_in(folder)
    if judged is None:
        names = ", ".join(config.get("architectures") or ["no architecture"])
        raise ValueError(
            f"{folder}: found {names}, expected a reward model (...{ANSWERS}, or ...{STEPS} for steps), as a run with a "
            f"reward_config saves it"
        )
    labels = len(config["id2label"]) if "id2label" in config else 2  # the default, which transformers does not write
    if labels != 1:
        raise ValueError(f"{folder}: found a classifier with {labels} labels, expected one, the reward")
    if attention == "blocked" and config["model_type"] not in BLOCKED_ARCHITECTURES:
        attention = "sdpa"
    kind: Any = AutoModelForSequenceClassification if judged == ANSWERS else AutoModelForTokenClassification
    with without_progress_bars():
        return kind.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
