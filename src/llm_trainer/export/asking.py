"""What is asked of a model and a tokenizer of transformers, in training and of an export alike."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, tzinfo
from typing import Any, Self

from jinja2 import TemplateError
from torch import Tensor

from llm_trainer.export.probe import Conversation, Rendered
from llm_trainer.models import inside

# Settings of a config.json that change no number, or that stand under another name in `Probe.facts`.
_NO_NUMBER = {"architectures", "dtype", "torch_dtype", "use_cache", "output_router_logits", "transformers_version"}
_NO_NUMBER |= {"bos_token_id", "eos_token_id", "pad_token_id", "name_or_path", "problem_type", "return_dict", "qat"}
_NO_NUMBER |= {"quantization_config", "tie_word_embeddings", "initializer_range", "chunk_size_feed_forward"}
_NO_NUMBER |= {"id2label", "label2id", "is_encoder_decoder", "output_hidden_states", "output_attentions"}


def facts_of(model: Any) -> dict[str, Any]:
    """What is compared of a transformers model besides its answers: see `Probe.facts`."""
    described = model.config.to_dict()
    facts: dict[str, Any] = {"settings": json.loads(json.dumps(_settings(described), default=str))}
    tied = is_tied(model)
    if tied is not None:  # the word of the configuration counts too: transformers sees what lies there, others read it
        facts["tied"] = tied
        facts["settings"]["tie_word_embeddings"] = described.get("tie_word_embeddings")
        if model.config.get_text_config() is not model.config:  # others read the inner one
            facts["inner tie_word_embeddings"] = model.config.get_text_config().tie_word_embeddings
    return facts


def _settings(described: Mapping[str, Any]) -> dict[str, Any]:
    """Those that change a number, of the models inside too."""
    found = {}
    for name, value in described.items():
        if name in _NO_NUMBER or name.startswith("_") or "dropout" in name:
            continue
        found[name] = value
        if name.endswith("_config") and isinstance(value, dict):
            found[name] = _settings(value)
    return found


def is_tied(model: Any) -> bool | None:
    """Whether head and embeddings are one matrix; None: something is around one of them, or there is no head."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or any(type(one).__module__.startswith("peft.") for one in (head, embeddings)):
        return None
    return inside.is_tied(model)


def stops_of(model: Any) -> list[int]:
    """Where a transformers model stops by its generation config."""
    stops = model.generation_config.eos_token_id
    if stops is None:
        return []
    return [stops] if isinstance(stops, int) else list(stops)


class _Day(datetime):
    """Some templates print the day, which is another one when the export is asked."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> Self:
        return cls(2026, 1, 31, tzinfo=tz)


@contextmanager
def _always_the_same_day() -> Iterator[None]:
    """transformers gives templates a `strftime_now`, which cannot be passed from outside."""
    from transformers.utils import chat_template_utils

    theirs: Any = chat_template_utils
    real, theirs.datetime = theirs.datetime, _Day
    try:
        yield
    finally:
        theirs.datetime = real


def prints_the_day(tokenizer: Any) -> bool:
    """Whether the chat template of a tokenizer asks for the time."""
    return "strftime_now" in str(tokenizer.chat_template)


def rendered(tokenizer: Any, conversation: Conversation) -> Rendered | None:
    """A conversation in a tokenizer's chat template, always on the same day: see `probe.Asked.render`."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    options: dict[str, Any] = {}
    if conversation.enable_thinking is not None:
        options["enable_thinking"] = conversation.enable_thinking
    try:
        with _always_the_same_day():
            text = tokenizer.apply_chat_template(
                conversation.messages,
                tokenize=False,
                add_generation_prompt=conversation.add_generation_prompt,
                **options,
            )
    except (TemplateError, TypeError, ValueError, LookupError):  # a program: some take no system message
        return None
    return Rendered(text, list(tokenizer(text, add_special_tokens=False)["input_ids"]))


def special_tokens_of(tokenizer: Any) -> list[str] | None:
    """Special and added tokens of a tokenizer, by their ids; None: there is no tokenizer."""
    if tokenizer is None:
        return None
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    ids |= tokenizer.get_added_vocab()
    return sorted(ids, key=lambda token: (ids[token], token))


def margin_of(logits: Tensor) -> float:
    """How far the second likeliest token is behind, in nats. `logits [V]`"""
    first, second = logits.float().topk(2).values.tolist()
    return first - second
