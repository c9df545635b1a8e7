"""Rewards for the form of a completion: a pattern that it must have, a length that it should not exceed."""

import re
from collections.abc import Sequence

from llm_trainer.config.errors import ConfigError


class Format:
    """1 where a completion has the form of a regular expression; else 0.

    Args:
        pattern: that it must match from its beginning to its end; `.` matches line ends too.

    Raises:
        ConfigError: it is no regular expression.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ConfigError(
                f"the reward format: got the pattern {pattern!r}, expected a regular expression ({error})"
            ) from None

    def __call__(self, completions: Sequence[str]) -> list[float]:
        return [float(self.pattern.fullmatch(completion.strip()) is not None) for completion in completions]


class Overlong:
    """A penalty that grows from 0 to -1 over the last tokens before a limit, and is -1 beyond it.

    Soft overlong punishment of DAPO (Yu et al. 2025, arXiv:2503.14476, eq. 13).

    Args:
        max_tokens: of a completion.
        buffer: tokens before that in which the penalty grows.

    Raises:
        ConfigError: the buffer is longer than the completion may be.
    """

    def __init__(self, max_tokens: int, buffer: int) -> None:
        if not 0 <= buffer <= max_tokens:
            raise ConfigError(
                f"the reward overlong: got buffer {buffer} and max_tokens {max_tokens}, expected 0 <= buffer <= max_tokens"
            )
        self.max_tokens, self.buffer = max_tokens, buffer

    def __call__(self, completions: Sequence[str], lengths: Sequence[int]) -> list[float]:
        return [self._penalty(length) for length in lengths]

    def _penalty(self, length: int) -> float:
        beyond = length - (self.max_tokens - self.buffer)
        if beyond <= 0:
            return 0.0
        return -min(1.0, beyond / max(1, self.buffer))
