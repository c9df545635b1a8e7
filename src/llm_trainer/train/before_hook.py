"""What a checkpoint says if a hook fails: that it was not called yet."""

from llm_trainer import checkpoint
from llm_trainer.state import Progress
from llm_trainer.train.metrics import Metrics


class BeforeHook:
    """What a hook may change of what a checkpoint holds besides weights, as it is before one is called.

    Args:
        progress: where the run stands.
        metrics: since the last log line.
    """

    def __init__(self, progress: Progress, metrics: Metrics) -> None:
        self._progress, self._metrics = progress, metrics
        self._state, self._sums, self._noise = progress.state_dict(), metrics.copy(), checkpoint.random_state()

    def go_back(self) -> None:
        """Let all of it be as it was."""
        self._progress.load_state_dict(self._state)
        self._metrics.go_back(self._sums)
        checkpoint.set_random_state(self._noise)
