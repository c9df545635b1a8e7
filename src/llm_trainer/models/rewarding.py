"""Reward models: a language model's body with a head that gives one number, for an answer or for each of its steps."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llm_trainer.models.adapter_folder import load_pretrained
from llm_trainer.models.attention import knows_branches
from llm_trainer.models.build import attention_of
from llm_trainer.models.inside import adapted_model
from llm_trainer.models.pretrained import ENDINGS, REWARD_MODELS, Kind, Pretrained, find_pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of the two labels of a model that judges steps, in lower case.
RIGHT = ("right", "correct", "positive", "good", "true", "yes", "+", "1")
WRONG = ("wrong", "incorrect", "negative", "bad", "false", "no", "-", "0")
OF_STEPS = next(ending for ending, kind in ENDINGS.items() if kind is Kind.STEP_REWARD_MODEL)


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

        inner = adapted_model(model)
        head = dict(inner.named_children()).get("score") if isinstance(inner, PreTrainedModel) else None
        labels = getattr(head, "out_features", None)  # also of a copy that is trained and saved beside adapters
        if head is None or labels is None:
            raise ValueError(f"{type(model).__name__} is no reward model; make one with models.rewarding.reward_model")
        if labels != 1:
            raise ValueError(f"{type(model).__name__} has {labels} labels, expected 1: num_labels=1")
        self.body = cast("PreTrainedModel", inner.base_model)
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
    if type(model.config) not in auto_class._model_mapping:
        raise ValueError(
            f"transformers has no classifier on the body of a {type(model).__name__}, so that no reward model and no critic "
            f"can be made of it; expected another family, such as qwen3_moe, or for a critic a value_model of its own"
        )
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
    found = find_pretrained(source, REWARD_MODELS)
    num_labels = len(_labels_of(found.config))
    if num_labels != 1:
        raise ValueError(f"{source}: found a classifier with {num_labels} labels, expected one, the reward")
    return _loaded(found, attention, dtype)


def load_judge(source: str | Path, judges_steps: bool, attention: str = "sdpa") -> "PreTrainedModel":
    """The model of `source` that judges what a policy writes: its steps, with one label or two, or whole completions.

    Args:
        source: as `find_pretrained` takes it.
        judges_steps: whether somebody says where steps end.
        attention: as `resolve_attention` gives it.

    Raises:
        ValueError: there is another model.
    """
    found = find_pretrained(source, REWARD_MODELS, key="reward_model_checkpoint")
    _check_judge(str(found), found.kind is Kind.STEP_REWARD_MODEL, judges_steps)
    if not judges_steps:
        return load_reward_model(source, attention)
    label_of_right(_labels_of(found.config))
    return _loaded(found, attention, torch.float32)


def _loaded(found: Pretrained, attention: str, dtype: torch.dtype | str) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

    model_class: Any = AutoModelForSequenceClassification
    if found.kind is Kind.STEP_REWARD_MODEL:
        model_class = AutoModelForTokenClassification
    attends = attention_of(attention, AutoConfig.from_pretrained(found.model_source))
    return load_pretrained(model_class, found, attends, dtype)


def _labels_of(config: Mapping[str, Any]) -> list[str]:
    """The names of a classifier's labels, by number; transformers does not write its default, two without names."""
    names = config.get("id2label") or {0: "LABEL_0", 1: "LABEL_1"}
    return [names[number] for number in sorted(names, key=int)]


def label_of_right(labels: Sequence[str]) -> int | None:
    """Which label says that a step is right; None: there is one label alone.

    Of two without names of their own it is the second, as where TRL and others train on `labels: [false, true]`.

    Raises:
        ValueError: there are more, or their names do not say which it is.
    """
    names = [name.strip().lower() for name in labels]
    if len(names) == 1:
        return None
    if names == ["label_0", "label_1"]:
        return 1
    is_right = [name in RIGHT for name in names]
    is_wrong = [name in WRONG for name in names]
    if len(names) == 2 and sorted(is_right) == [False, True] and is_wrong == [not right for right in is_right]:
        return is_right.index(True)
    raise ValueError(
        f"reward_model (reward_model_checkpoint): a model that judges steps has {len(labels)} labels ({', '.join(labels)}); "
        f"expected one, how right a step is, or two, wrong and right: the default names LABEL_0 and LABEL_1, or in id2label "
        f"one of {', '.join(WRONG)} and one of {', '.join(RIGHT)}"
    )


def _check_judge(name: str, is_of_steps: bool, judges_steps: bool) -> None:
    """
    Raises:
        ValueError: steps are to be judged by a model of whole completions, or the other way round.
    """
    if is_of_steps and not judges_steps:
        raise ValueError(
            f"reward_model (reward_model_checkpoint): a {name} judges the steps of an answer, at the last token of each, and "
            f'nothing says where they end; expected reward_model_steps, the text that ends a step (such as "\\n\\n"), or, to '
            f"judge whole completions, a model for sequence classification with one label (reward_config on pairs)"
        )
    if judges_steps and not is_of_steps:
        raise ValueError(
            f"reward_model_steps: a {name} judges whole completions, and no steps; expected a model for token classification "
            f"(reward_config on judged steps), or leave reward_model_steps out"
        )


class Judge(nn.Module):
    """A reward model, called alike whatever it is: a `transformers` classifier with one label, or any module that gives one
    number for each row of ids `[B, T]` under a mask `[B, T]`.

    Raises:
        ValueError: it judges steps, and not whole completions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        if isinstance(model, PreTrainedModel):
            _check_judge(type(model).__name__, type(model).__name__.endswith(OF_STEPS), judges_steps=False)
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


class StepJudge(nn.Module):
    """A process reward model, called alike whatever it is: a `transformers` token classifier, or any module that gives one
    number for each token of ids `[B, T]` under a mask `[B, T]`. Whoever calls it reads the numbers at the steps' last tokens.

    Two labels are the logits of wrong and right, and the number is the probability of right (`label_of_right`). One label is
    the logit of right, as `process_reward_model` has it, and the number its probability; where the configuration says
    `problem_type: regression`, the label is the number.

    Raises:
        ValueError: it judges whole completions, or its labels do not say what is right.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        self.model = model
        self._is_classifier = isinstance(model, PreTrainedModel)
        if isinstance(model, PreTrainedModel):
            _check_judge(type(model).__name__, type(model).__name__.endswith(OF_STEPS), judges_steps=True)
            self._right = label_of_right(_labels_of(model.config.to_dict()))
            self._is_probability = getattr(model.config, "problem_type", None) != "regression"

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores `[B, T]` of the tokens of rows padded on the right.

        Raises:
            ValueError: the module gives something else.
        """
        found = self.model(input_ids, attention_mask=attention_mask)
        if self._is_classifier:
            logits = found.logits.float()  # (B, T, labels)
            if self._right is not None:
                return logits.softmax(-1)[..., self._right]
            return logits[..., 0].sigmoid() if self._is_probability else logits[..., 0]
        if not isinstance(found, Tensor) or found.shape != input_ids.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"reward_model with reward_model_steps: got {shape} for ids {list(input_ids.shape)}, expected one number for "
                f"each token: a transformers model for token classification, or a module that gives {list(input_ids.shape)}"
            )
        return found.float()
