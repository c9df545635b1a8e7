"""How many tokens a micro-batch may have: as configured or as found, how that shrinks, and what a checkpoint holds of it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.data.stream import StepSource
from llm_trainer.layout import couples_rows, takes_flat
from llm_trainer.state import Choice

Configured = int | Literal["auto"] | None  # tokens; the machine's choice; micro-batches as they come
KEY = "data_loader_config.micro_batch_tokens: null"


class Budget:
    """How many tokens a micro-batch may have, in training and in evaluation.

    The rows of a step, their order and its gradient do not depend on it. So the machine may choose it, and change it between
    two steps: whoever does opens `source.steps(epoch, position)` anew, at the position where the step began.

    Args:
        configured: what the user says.
        sources: what is cut: the training data first, then the validation data. One that has a number of its own keeps it,
            unless a smaller one is in force.
        machine: what memory there is and who shares it, in words: a number that was found holds for this machine alone.
        may_cut: whether micro-batches may be cut at all where the user does not say a number.

    Attributes:
        tokens: in force, with padding where rows are padded; None: micro-batches are as they come. A row that is longer is
            a micro-batch of its own.
        why: the reason, in a few words.
        is_settled: False while `tokens` still have to be found.
    """

    def __init__(
        self, configured: Configured, sources: Iterable[StepSource], machine: str = "", may_cut: bool = True
    ) -> None:
        self._sources = [(source, source.micro_batch_tokens) for source in sources]
        own = self._sources[0][1]
        self.configured = configured if own == "auto" else own
        self.machine = machine
        self._may_cut = may_cut or isinstance(self.configured, int)
        self._has_shrunk = False
        self._found: tuple[int, int] | None = None  # tokens while layers run plain, and once they are compiled
        self.is_settled = self.configured != "auto"
        self.tokens = self.configured if isinstance(self.configured, int) else None
        self.why = "as configured" if self.is_settled else "not found yet"
        self._apply()

    @property
    def is_automatic(self) -> bool:
        """Whether the machine chooses it."""
        return self.configured == "auto"

    def settle(self, tokens: int | None, why: str, compiled: int | None = None) -> None:
        """Take what was found, on all ranks the same; `compiled`: once layers are compiled, if that is another number."""
        is_smaller = self.tokens is not None and self.tokens < (tokens or math.inf)
        if not (self._has_shrunk and is_smaller):  # an evaluation has found it to be too large
            self.tokens, self.why = tokens, why
            if tokens is not None and compiled is not None:
                self._found = tokens, compiled
        self.is_settled = True
        self._apply()

    def compiled(self, is_on: bool) -> bool:
        """Take the number for layers that are compiled, or that run plain; whether it is another one than before."""
        if self._found is None or self.tokens == self._found[is_on]:
            return False
        self.tokens = self._found[is_on]
        self._apply()
        return True

    def shrink(self, cost: int, longest: int = 1) -> bool:
        """Cut smaller from now on, because a micro-batch did not fit; whether that can help.

        All ranks call it together, with numbers that they have agreed on.

        Args:
            cost: tokens of the step's largest micro-batch, with padding.
            longest: tokens of the step's longest row, which cannot be cut.
        """
        if not self._may_cut or cost <= longest:
            return False
        self.tokens = max(longest, next_size(cost / 2))
        self.why = f"{cost:,} did not fit into memory"
        self._has_shrunk, self._found = True, None
        self._apply()
        return True

    def choice(self) -> Choice | None:
        """What the machine has chosen, for the screen; None where the user's own words are in force."""
        if not (self.is_automatic or self._has_shrunk):
            return None
        return choice_of(self.tokens, self.why)

    def state_dict(self) -> dict[str, Any]:
        """What is in force, and what it was chosen for."""
        return {
            "tokens": self.tokens,
            "why": self.why,
            "configured": self.configured,
            "machine": self.machine,
            "is_settled": self.is_settled,
            "has_shrunk": self._has_shrunk,
            "found": self._found,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Go on with what was in force, on a machine as this one and with the same configuration; else with what is here.

        Args:
            state: None: the checkpoint is of a version that did not know.
        """
        if state is None or state["configured"] != self.configured or state["machine"] != self.machine:
            return
        self.tokens, self.why = state["tokens"], state["why"]
        self.is_settled, self._has_shrunk = state["is_settled"], state["has_shrunk"]
        found = state.get("found")  # not in checkpoints of earlier versions
        self._found = None if found is None else tuple(found)
        self._apply()

    def _apply(self) -> None:
        """Tell the sources."""
        for source, own in self._sources:
            in_force = own
            if own == "auto" and self.is_settled:
                in_force = self.tokens
            if self._has_shrunk and self.tokens is not None:
                in_force = min(in_force, self.tokens) if isinstance(in_force, int) else self.tokens
            source.micro_batch_tokens = in_force


def choice_of(tokens: int | None, why: str) -> Choice:
    """A budget that the machine has chosen, for the screen."""
    value = "as they come" if tokens is None else f"{tokens:,} tokens"
    return Choice("micro-batches", value, why, KEY)


def next_size(tokens: float) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... that is at least `tokens`: few sizes, so that runs choose alike."""
    wanted = max(1, math.ceil(tokens))
    power = 1 << (wanted - 1).bit_length()
    between = power * 3 // 4
    return between if power > 2 and between >= wanted else power


def size_below(tokens: float) -> int:
    """The largest of these sizes that is at most `tokens`, and at least 1."""
    wanted = max(1, math.floor(tokens))
    power = 1 << (wanted.bit_length() - 1)
    between = power * 3 // 2
    return between if power > 1 and between <= wanted else power


def may_cut(algorithm: Algorithm) -> bool:
    """Whether cutting micro-batches anew changes nothing but rounding."""
    couples = algorithm.regulariser.couples_rows or algorithm.couples_rows
    return not couples and class_may_cut(type(algorithm), algorithm.saved_model)


def class_may_cut(kind: type[Algorithm], model: nn.Module) -> bool:
    """The same of an algorithm that is not there yet, and the model that it will train."""
    return takes_flat(kind) and not couples_rows(model)
