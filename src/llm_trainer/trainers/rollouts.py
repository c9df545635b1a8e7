"""Rollouts of the trainers that learn from the policy's own completions: how they are drawn, rewarded and scored."""

from collections.abc import Sequence
from typing import Any

from llm_trainer.config.reinforcement import GenerateConfig
from llm_trainer.generation.decoding import Decoding


def decoding_of(how: GenerateConfig, seed: int, stop_token_ids: Sequence[int], tokenizer: Any = None) -> Decoding:
    """How completions are drawn.

    Args:
        how: what the section says.
        seed: of their noise.
        stop_token_ids: that end one.
        tokenizer: makes text of ids where texts end one; None: there are no such texts.
    """
    decode = None if tokenizer is None else tokenizer.decode
    return Decoding(
        max_new_tokens=how.gen_max_seq_len,
        temperature=how.gen_temperature,
        top_k=how.gen_k,
        top_p=how.gen_p,
        min_p=how.gen_min_p,
        repetition_penalty=how.gen_repetition_penalty,
        suppress_tokens=tuple(how.gen_suppress_tokens),
        stop_strings=tuple(how.gen_stop_strings),
        decode=decode,
        stop_token_ids=tuple(stop_token_ids),
        seed=seed,
    )
