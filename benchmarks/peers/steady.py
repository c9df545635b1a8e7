"""When a run of ours goes as it will go on for hours, whatever is left to the machine."""

from typing import Any

LONG = 100_000  # epochs of a run that somebody waits for: it ends when it is measured
COMPILED_AFTER = 2  # steps after which nothing is compiled any more: in the second some shapes are made dynamic


class Pace:
    """Whether a run has chosen what it leaves open, and compiled what it wants to compile."""

    def __init__(self) -> None:
        self._steps_alike = 0  # since the last choice
        self._last_choice = ""

    def is_steady(self, run: Any) -> bool:
        """Called after every step with the `RunView`."""
        chosen = run.trainer.run.choices.get("compile")
        choice = "" if chosen is None else chosen.value
        self._steps_alike = self._steps_alike + 1 if choice == self._last_choice else 0
        self._last_choice = choice
        return not choice.startswith("decided") and self._steps_alike >= COMPILED_AFTER
