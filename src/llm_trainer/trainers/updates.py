"""How the completions of a rollout are divided into updates."""

from typing import Any

from llm_trainer.config.errors import ConfigError
from llm_trainer.data.rollout_source import num_updates


def updates_per_epoch(stream: Any, section: Any, samples: str, update: str, passes: str) -> int:
    """Optimizer steps of an epoch.

    Args:
        stream: of prompts.
        section: of the algorithm.
        samples, update, passes: its fields: completions of a prompt, of an update, and passes over a rollout.

    Raises:
        ConfigError: updates do not divide a rollout.
    """
    per_prompt, per_update = getattr(section, samples), getattr(section, update)
    what = f"batch_size x gradient_accumulation_steps x devices x {samples}"
    check_divides(update, per_update, stream.rows_per_step * per_prompt, what)
    steps = num_updates(stream, per_prompt, per_update, getattr(section, passes))
    assert steps is not None, "a stream of rows says how many it has"
    return steps


def check_divides(update: str, per_update: int | None, rows: int, what: str) -> None:
    """
    Args:
        update: the option that says how many completions an update has.
        per_update: its value.
        rows: completions of a rollout.
        what: they are, in the words of the user's style.

    Raises:
        ConfigError: updates do not divide a rollout.
    """
    if per_update is not None and rows % per_update:
        raise ConfigError(
            f"{update}: got {per_update}, which does not divide the {rows} completions of a rollout: the last update of each "
            f"pass would be smaller than the others. Expected a divisor, or null for one update per pass; a rollout has {what}"
        )
