"""What a model and a tokenizer say of themselves, as far as they do: their context, their ids, what ends a completion."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn


class RowsOfIds:
    """Sequences of ids as rows whose tokens are all labels."""

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self.ids, self.lengths = ids, np.array([len(row) for row in ids])

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = np.array(self.ids[index])
        return {"input_ids": ids, "trained": np.ones(len(ids), dtype=bool), "document_lengths": [len(ids)]}


def vocab_size_of(model: nn.Module) -> int | None:
    """How many ids a model knows; None: it does not say."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    return getattr(model.config.get_text_config(), "vocab_size", None)


def context_of(model: nn.Module) -> int | None:
    """The most tokens that a model takes; None: it does not say."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return None
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model that reads text; nothing where it does not say."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return {}
    found: dict[str, Any] = model.config.get_text_config().to_dict()
    return found


def stop_tokens_of(tokenizer: Any, model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a completion, as model and tokenizer say."""
    from transformers import PreTrainedModel

    found: list[int] = []
    if isinstance(model, PreTrainedModel) and model.generation_config is not None:
        stops = model.generation_config.eos_token_id
        found += [stops] if isinstance(stops, int) else stops or []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found))
