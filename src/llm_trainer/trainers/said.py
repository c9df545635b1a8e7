"""What a model and a tokenizer say of themselves, as far as they do: their context, their ids, what ends a completion."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from llm_trainer.models.inside import language_config, transformers_model, vocab_size_of


class RowsOfIds:
    """Sequences of ids as rows whose tokens are all labels."""

    def __init__(self, ids: Sequence[Sequence[int]]) -> None:
        self.ids, self.lengths = ids, np.array([len(row) for row in ids])

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = np.array(self.ids[index])
        return {"input_ids": ids, "trained": np.ones(len(ids), dtype=bool), "document_lengths": [len(ids)]}


def check_ids(policy: nn.Module, **ids: Sequence[int]) -> None:
    """
    Raises:
        ValueError: an option names ids that the policy does not have, or all that it has.
    """
    vocab_size = vocab_size_of(policy)
    if vocab_size is None:
        return
    for name, numbers in ids.items():
        if not isinstance(numbers, Iterable) or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"{name}: got {numbers!r}, expected a list of token ids, such as [{vocab_size - 1}]")
        wrong = [number for number in numbers if not 0 <= number < vocab_size]
        if wrong or len(set(numbers)) == vocab_size:
            found = f"the id {wrong[0]}" if wrong else f"all {vocab_size} ids"
            raise ValueError(
                f"{name}: found {found}, and the model knows the ids 0 to {vocab_size - 1}; expected some of these: look them "
                f"up in the tokenizer of this model"
            )


def check_vocabulary(policy: nn.Module, **others: nn.Module | None) -> None:
    """
    Raises:
        ValueError: a model that reads the policy's tokens knows fewer than it, by the name of its argument.
    """
    ours = vocab_size_of(policy)
    for name, model in others.items():
        theirs = None if model is None else vocab_size_of(model)
        if ours is not None and theirs is not None and theirs < ours:
            raise ValueError(
                f"{name} knows {theirs} tokens, the policy {ours}; expected a model with the policy's tokenizer: one of the "
                f"same family"
            )


def config_of(model: nn.Module) -> dict[str, Any]:
    """The configuration of a model that reads text; nothing where it does not say."""
    found = transformers_model(model)
    return {} if found is None else language_config(found.config).to_dict()


def stop_tokens_of(tokenizer: Any, model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a completion, as model and tokenizer say."""
    found: list[int] = []
    inside = transformers_model(model)
    if inside is not None and inside.generation_config is not None:
        stops = inside.generation_config.eos_token_id
        found += [stops] if isinstance(stops, int) else stops or []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found))


def different_ids(ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """What is different about two vocabularies, token -> id, in words; empty: nothing."""
    here = {number: token for token, number in ours.items()}
    there = {number: token for token, number in theirs.items()}
    different = sorted(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    if not different:
        return ""
    examples = "; ".join(f"id {i} is {here.get(i)!r} here and {there.get(i)!r} there" for i in different[:3])
    return f"{len(different)} ids differ ({examples}; None: no such id)"
