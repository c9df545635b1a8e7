"""Calls an environment, in whatever process, and never past an exception."""

import json
import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llm_trainer.episodes.environments import Environment, checked_messages, checked_step
from llm_trainer.rewards.calling import awaited, in_words, place_of
from llm_trainer.rewards.returned import Missing


class Call(NamedTuple):
    """What the environment of an episode is asked.

    Attributes:
        slot: Which of the episodes that are played at a time.
        message: Of the policy; None: the episode begins.
        row: What it begins with.
        seed: Of `random` and `numpy`, when it begins.
    """

    slot: int
    message: Mapping[str, Any] | None = None
    row: Mapping[str, Any] = {}
    seed: int = 0


def failed(cause: str, what: str) -> dict[str, Any]:
    """The answer of an environment that has none: one of `rewards.returned.CAUSES`, and words that follow its name."""
    return {"cause": cause, "what": what}


class Player:
    """Plays one episode after another.

    Args:
        make: an environment.
    """

    def __init__(self, make: Callable[[], Environment]) -> None:
        self._make = make
        self._environment: Environment | None = None

    def answer(self, call: Call) -> dict[str, Any]:
        """In JSON types: `messages`, and to a message also `reward` and `done`; or `cause` and `what`."""
        message = call.message
        if message is None:
            return guarded(lambda: self._begin(call), call.seed)
        return guarded(lambda: self._step(message))

    def _begin(self, call: Call) -> dict[str, Any]:
        self._environment = None  # what it holds goes before the next one comes
        environment = self._make()
        messages = checked_messages("reset", awaited(environment.reset(call.row)))
        if not messages:
            raise Missing("reset returned no message, expected those with which the conversation begins", "type")
        self._environment = environment
        return {"messages": messages}

    def _step(self, message: Mapping[str, Any]) -> dict[str, Any]:
        if self._environment is None:
            raise Missing("its process was lost in an earlier turn", "exited")
        messages, reward, done = checked_step(awaited(self._environment.step(message)))
        return {"messages": messages, "reward": reward, "done": done}


def guarded(ask: Callable[[], dict[str, Any]], seed: int | None = None) -> dict[str, Any]:
    """What a function of the user gives, in JSON types, or `cause` and `what`, whatever it raises.

    Args:
        ask: calls it.
        seed: of `random` and `numpy`, for what begins; None: it goes on.
    """
    if seed is not None:
        random.seed(seed)
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            numpy.random.seed(seed % 2**32)
    try:
        found = ask()
        json.dumps(found)
        return found
    except Missing as missing:
        return failed(missing.cause, str(missing))
    except MemoryError as error:
        return failed("memory", f"ran out of memory{place_of(error)}")
    except SystemExit as error:
        return failed("exited", f"called exit ({error.code}){place_of(error)}")
    except Exception as error:
        return failed("raised", f"raised {in_words(error)}{place_of(error)}")
