"""Whether the steps of a run can teach anything: what counts in their losses, and whether there was a gradient."""

from collections.abc import Callable

from llm_trainer.config.errors import counted
from llm_trainer.state import StepDone

SAID_EVERY = 10  # looks in a row
NO_TERMS = (
    "nothing in their rows counts in the loss. Expected tokens to learn from: look at labels (-100 is not learned from), at "
    "masks of completions (response_attention_mask, overlong: mask), and at what truncation leaves"
)
NO_GRADIENT = (
    "so that nothing was learned. Completions of a group whose rewards are all equal teach nothing: look at reward and "
    "frac_reward_zero_std in the log, and at what the reward function gives (llm-trainer rollouts)"
)


class NothingCounts(ValueError):
    """A run has ended, and nothing in its steps counted in the loss."""


class Learning:
    """Adds up the terms of steps: tokens, rows or pairs, whatever a loss is a mean of.

    Args:
        say: prints.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._steps, self._terms = 0, 0.0  # since the last look
        self._looks = 0  # in a row, in which nothing counted
        # Steps of this process in which nothing counted, and those without a gradient.
        self._in_vain = self._flat = 0

    def note(self, done: StepDone) -> None:
        """Note a step."""
        self._steps += 1
        self._terms += sum(done.terms.values())
        if done.finite and done.grad_norm == 0:
            self._flat += 1

    def check(self, step: int, is_over: bool) -> None:
        """Say if nothing has counted since the last look: on all ranks alike.

        Args:
            step: optimizer steps done.
            is_over: the run ends.

        Raises:
            NothingCounts: it ends, and nothing has counted in any of its steps.
        """
        steps, terms = self._steps, self._terms
        self._steps, self._terms = 0, 0.0
        if terms:
            self._looks = 0
        elif steps:
            self._looks += 1
            self._in_vain += steps
        if is_over and self._in_vain == step > 0:
            raise NothingCounts(f"nothing was learned in {counted(step, 'step')}: {NO_TERMS}")
        if is_over and self._flat == step > 0:
            self._say(f"WARNING: the gradient of {counted(step, 'step')}, all of the run, was 0, {NO_GRADIENT}")
        if steps and not terms and self._looks % SAID_EVERY == 1:
            self._say(f"WARNING: in {counted(steps, 'step')} up to step {step} {NO_TERMS}")
