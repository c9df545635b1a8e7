"""Where in an epoch of data a step begins: a number, or a place inside a rollout."""

from typing import NamedTuple


class InRollout(NamedTuple):
    """A position between two updates of a rollout; sources of rollouts have such ones in place of a single number.

    Attributes:
        position: of the rollout's first prompt in the epoch.
        number: of the rollout, counted over the whole run.
        updates: optimizer steps that were taken on it.
    """

    position: int
    number: int = 0
    updates: int = 0

    @classmethod
    def at(cls, position: "Position") -> "InRollout":
        """The same position, of a run that has no rollout behind it if it is a single number."""
        return position if isinstance(position, cls) else cls(int(position))  # type: ignore[arg-type]


Position = int | InRollout  # in an epoch of data, whatever its source counts
