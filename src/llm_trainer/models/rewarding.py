"""Reward models: a language model's body with a head that gives one number, for an answer or for each of its steps."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from llm_trainer.image_batch import of_images
from llm_trainer.models.adapter_folder import load_pretrained
from llm_trainer.models.attention import knows_branches
from llm_trainer.models.build import attention_of
from llm_trainer.models.inside import adapted_model, auto_class, language_config, sees_images
from llm_trainer.models.pretrained import ENDINGS, REWARD_MODELS, Kind, Pretrained, find_pretrained
from llm_trainer.models.seeing import Seeing, placeholder_of
from llm_trainer.models.vision import Images

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Names of the two labels of a model that judges steps, in lower case.
RIGHT = ("right", "correct", "positive", "good", "true", "yes", "+", "1")
WRONG = ("wrong", "incorrect", "negative", "bad", "false", "no", "-", "0")
OF_STEPS = next(ending for ending, kind in ENDINGS.items() if kind is Kind.STEP_REWARD_MODEL)


class Rewarding(Seeing, nn.Module):
    """A `transformers` classification model with one label, read at each row's last token or at every token.

    `transformers` itself looks for the last token that is not the padding id, which is another one where padding and
    end of text share an id.

    Args:
        model: of sequences or of tokens.
        num_labels: that it has to have; None: any number, and of several each reward is a row of them.

    Raises:
        ValueError: the model gives another number of labels.
    """

    def __init__(self, model: nn.Module, num_labels: int | None = 1) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        inner = adapted_model(model)
        head = dict(inner.named_children()).get("score") if isinstance(inner, PreTrainedModel) else None
        labels = getattr(head, "out_features", None)  # also of a copy that is trained and saved beside adapters
        if head is None or labels is None:
            raise ValueError(f"{type(model).__name__} is no reward model; make one with models.rewarding.reward_model")
        if num_labels is not None and labels != num_labels:
            raise ValueError(
                f"{type(model).__name__} has {labels} labels, expected {num_labels}: num_labels={num_labels}"
            )
        self.body = cast("PreTrainedModel", inner.base_model)
        self.head = head
        self._look(self.body)

    def _call(self, input_ids: Tensor, **inputs: Any) -> Any:
        return self.body(input_ids=input_ids, use_cache=False, **inputs)

    def per_token(self, input_ids: Tensor, **layout: Any) -> Tensor:
        """A reward for each of `input_ids [B, T]` or `[1, N]`, of the same shape; `layout` as in `forward`."""
        return self(input_ids, **layout, every_token=True)

    def knows_branches(self, device: torch.device) -> bool:
        """Whether flat batches may have branches (see `models.attention`) when the model runs on `device`."""
        return knows_branches(language_config(self.body.config), device)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_lengths: Tensor | None = None,
        every_token: bool = False,
        images: Images | None = None,
        rope_positions: Tensor | None = None,
        **model_inputs: Any,
    ) -> Tensor:
        """Rewards `[B]` of rows `[B, T]` or of B documents laid flat `[1, N]`; of `every_token`: like `input_ids`.

        `images`, `rope_positions` and `model_inputs` as of `ScoredModel.forward`.
        """
        # 1. what the body is called with
        given = {"attention_mask": attention_mask, "position_ids": position_ids, **model_inputs}
        inputs = {name: value for name, value in given.items() if value is not None}
        features, zero = self._seen(images, brings_pixels=bool(of_images(model_inputs)))
        if self.vision.model is not None:
            inputs |= self.vision.inputs(input_ids, features, attention_mask, position_ids, rope_positions)
        # 2. its states, and what the head says of them
        hidden = self._run(input_ids, **inputs).last_hidden_state  # (B, T, D)
        if not every_token:
            hidden = _last_tokens(hidden, attention_mask, document_lengths)  # (B, D)
        rewards = self.head(hidden).float()  # (..., labels)
        if rewards.shape[-1] == 1:
            rewards = rewards.squeeze(-1)
        return rewards if zero is None else rewards + zero


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
        model: the language model, which may see images; the body is shared with it, not copied.
        pad_token_id: stored in the configuration, where `transformers` needs it to read batches.
    """
    return _classifier(Kind.ANSWER_REWARD_MODEL, model, pad_token_id)


def process_reward_model(model: "PreTrainedModel", pad_token_id: int | None = None) -> "PreTrainedModel":
    """A token-classification model with one label, the logit that a step is right; arguments of `reward_model`."""
    return _classifier(Kind.STEP_REWARD_MODEL, model, pad_token_id)


def _classifier(kind: Kind, model: "PreTrainedModel", pad_token_id: int | None) -> "PreTrainedModel":
    # 1. the class that fits the body, without weights
    config = deepcopy(model.config)
    made = classifier_class(kind, config)
    config.num_labels = 1
    for part in (config, language_config(config)):
        part.pad_token_id = pad_token_id
    with torch.device("meta"):
        classifier = made._from_config(config)

    # 2. a new head, and the body of `model`
    has_bias = classifier.score.bias is not None
    text = language_config(config)
    head = nn.Linear(text.hidden_size, 1, bias=has_bias, dtype=model.dtype)
    nn.init.normal_(head.weight, std=text.initializer_range)
    if has_bias:
        nn.init.zeros_(head.bias)
    setattr(classifier, classifier.base_model_prefix, model.base_model)
    classifier.score = head
    return classifier


def classifier_class(kind: Kind, config: Any) -> Any:
    """The class of transformers that puts a head of labels on the body of a model of this configuration.

    Of models that see, transformers has one for Gemma 3 alone. Those of other families are made here in the same way: by its
    generic heads, with the names of weights and classes that it would give them (`LlavaForSequenceClassification`).

    Args:
        kind: a reward model's.
        config: of transformers.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification
    from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

    auto: Any = AutoModelForSequenceClassification
    generic: Any = GenericForSequenceClassification
    if kind is Kind.STEP_REWARD_MODEL:
        auto, generic = AutoModelForTokenClassification, GenericForTokenClassification
    known = auto._model_mapping
    if type(config) in known:
        return known[type(config)]
    seeing = auto_class(config)._model_mapping
    if sees_images(config) and type(config) in seeing:
        return _seeing_classifier(generic, seeing[type(config)])
    raise ValueError(
        f"transformers has no classifier on the body of a model of kind {config.model_type}, so that no reward model and no "
        f"critic can be made of it; expected another family, such as qwen3_moe, or for a critic a value_model of its own"
    )


@cache
def _seeing_classifier(generic: Any, language_class: Any) -> Any:
    """A head of transformers' `generic` classifiers on the body of the models of a class that see."""
    family = language_class.__name__.partition("For")[0]
    ending = generic.__name__.removeprefix("Generic")
    body = next(base for base in language_class.__mro__ if base.__name__ == f"{family}PreTrainedModel")
    # NOTE: by its module transformers knows whether to read folders with older names of weights as those of the family.
    return type(f"{family}{ending}", (generic, body), {"__module__": language_class.__module__})


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
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(found.model_source)
    made = classifier_class(found.kind, config)
    return load_pretrained(made, found, attention_of(attention, config), dtype)


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


class AnyJudge(nn.Module):
    """What judges what a policy writes, called alike whatever it is.

    Attributes:
        model: a `Rewarding`, or what was given.
    """

    model: nn.Module

    def compile(self, *args: Any, **options: Any) -> None:
        """Of a model that sees its language model alone (`Seeing.compile`)."""
        if placeholder_of(self.model) is None:
            super().compile(*args, **options)
        else:
            self.model.compile(*args, **options)


class Judge(AnyJudge):
    """A reward model, called alike whatever it is: a `transformers` classifier with one label, which may have adapters, or
    any module that gives one number for each row of ids `[B, T]` under a mask `[B, T]`, and perhaps `images`.

    Raises:
        ValueError: it judges steps, and not whole completions.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        inner = adapted_model(model)
        self.model = model
        if isinstance(inner, PreTrainedModel):
            name = type(inner).__name__
            _check_judge(name, name.endswith(OF_STEPS), judges_steps=False)
            self.model = Rewarding(model)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, images: Images | None = None) -> Tensor:
        """Rewards `[B]` of rows padded on the right, which may show `images`.

        Raises:
            ValueError: the module gives something else.
        """
        shown = {} if images is None else {"images": images}
        rewards = self.model(input_ids, attention_mask, **shown)
        if not isinstance(rewards, Tensor) or rewards.numel() != len(input_ids):
            shape = list(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
            raise ValueError(
                f"reward_model: got {shape} for {len(input_ids)} rows, expected one number for each: a transformers "
                f"classification model with one label, or a module that gives [{len(input_ids)}]"
            )
        return rewards.reshape(-1).float()


class StepJudge(AnyJudge):
    """A process reward model, called alike whatever it is: a `transformers` token classifier, or any module that gives one
    number for each token of ids `[B, T]` under a mask `[B, T]`, and perhaps `images`. Whoever calls it reads the numbers at
    the steps' last tokens.

    Two labels are the logits of wrong and right, and the number is the probability of right (`label_of_right`). One label is
    the logit of right, as `process_reward_model` has it, and the number its probability; where the configuration says
    `problem_type: regression`, the label is the number.

    Raises:
        ValueError: it judges whole completions, or its labels do not say what is right.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        from transformers import PreTrainedModel

        inner = adapted_model(model)
        self.model = model
        self._is_classifier = isinstance(inner, PreTrainedModel)
        if isinstance(inner, PreTrainedModel):
            name = type(inner).__name__
            _check_judge(name, name.endswith(OF_STEPS), judges_steps=True)
            self._right = label_of_right(_labels_of(inner.config.to_dict()))
            self._is_probability = getattr(inner.config, "problem_type", None) != "regression"
            if sees_images(inner.config):
                self.model = Rewarding(model, num_labels=None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, images: Images | None = None) -> Tensor:
        """Scores `[B, T]` of the tokens of rows padded on the right, which may show `images`.

        Raises:
            ValueError: the module gives something else.
        """
        if self._is_classifier:
            logits = self._logits(input_ids, attention_mask, images)
            if self._right is not None:
                return logits.softmax(-1)[..., self._right]
            return logits[..., 0].sigmoid() if self._is_probability else logits[..., 0]
        shown = {} if images is None else {"images": images}
        found = self.model(input_ids, attention_mask=attention_mask, **shown)
        if not isinstance(found, Tensor) or found.shape != input_ids.shape:
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"reward_model with reward_model_steps: got {shape} for ids {list(input_ids.shape)}, expected one number for "
                f"each token: a transformers model for token classification, or a module that gives {list(input_ids.shape)}"
            )
        return found.float()

    def _logits(self, input_ids: Tensor, attention_mask: Tensor, images: Images | None) -> Tensor:
        """`[B, T, labels]` of a token classifier."""
        if not isinstance(self.model, Rewarding):
            logits: Tensor = self.model(input_ids, attention_mask=attention_mask).logits
            return logits.float()
        found = self.model.per_token(input_ids, attention_mask=attention_mask, images=images)
        return found.reshape(*input_ids.shape, -1)
