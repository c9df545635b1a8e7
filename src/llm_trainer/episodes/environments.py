"""What a policy talks to: an environment of the user, or his functions as tools."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards.named import imported
from llm_trainer.rewards.returned import Missing, finite

Message = Mapping[str, Any]
Row = Mapping[str, Any]


class Environment(Protocol):
    """One episode of something that answers.

    A new object is made for every episode, and seeds of `random` and `numpy` are set before, the same ones for all episodes
    of a prompt in a rollout. It runs in a process of its own.
    """

    def reset(self, row: Row) -> Sequence[Message]:
        """The messages with which the conversation begins.

        Args:
            row: the columns of the data's row, `answer` (the reference answer or None) and `messages` (its prompt as messages,
                where there are any).
        """

    def step(self, message: Message) -> tuple[Sequence[Message], float, bool]:
        """Answer a message of the policy.

        Args:
            message: `role`, `content` and, where tools are called, `tool_calls`.

        Returns:
            What is said to the policy, the reward of this step, and whether the episode is over.
        """


class Tools:
    """An environment of functions: it runs what the policy calls, and is over when it calls nothing.

    A function that raises says so to the policy, as one that does not exist or gets other arguments.

    Args:
        functions: by name.
    """

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self.functions = functions

    def reset(self, row: Row) -> Sequence[Message]:
        """The prompt of the row."""
        messages = row.get("messages")
        if not messages:
            raise ValueError(
                "the row has no messages to begin with; expected a prompt in the data (data_loader_config), or batches with "
                "messages, a list of them for each prompt"
            )
        return messages

    def step(self, message: Message) -> tuple[Sequence[Message], float, bool]:
        """What the functions return that are called; there is no reward."""
        answers = [self._answer(call["function"]) for call in message.get("tool_calls", ())]
        return answers, 0.0, not answers

    def _answer(self, call: Mapping[str, Any]) -> Message:
        name = call["name"]
        answer: dict[str, Any] = {"role": "tool", "name": name or "unknown"}
        if "error" in call:
            return {**answer, "content": f"Error: {call['error']}"}
        if name not in self.functions:
            known = ", ".join(self.functions)
            return {**answer, "content": f"Error: there is no tool {name}; the tools are {known}"}
        try:
            found = self.functions[name](**call["arguments"])
        except Exception as error:
            return {**answer, "content": f"Error: {type(error).__name__}: {error}"}
        return {**answer, "content": found if isinstance(found, str) else json.dumps(found, default=str)}


def environment_of(entry: Any) -> Callable[[], Environment]:
    """What makes environments.

    Args:
        entry: a class or a function that makes one; its name as `module:Class` or `file.py:Class`; or a mapping of `name` and
            the keywords that the class is made with.

    Raises:
        ConfigError: there is none.
    """
    options: dict[str, Any] = {}
    if isinstance(entry, Mapping):
        options = {key: value for key, value in entry.items() if key != "name"}
        entry = entry.get("name")
    made = imported("environment", entry) if isinstance(entry, str) else entry
    if not callable(made):
        raise ConfigError(
            f"environment: got {entry!r}, expected a class with reset and step, or its name as module:Class or file.py:Class"
        )
    if isinstance(made, type):
        missing = [name for name in ("reset", "step") if not callable(getattr(made, name, None))]
        if missing:
            raise ConfigError(
                f"environment: {made.__name__} has no {' and no '.join(missing)}; expected reset(row) -> messages and "
                f"step(message) -> (messages, reward, done)"
            )
    return partial(made, **options) if options else made


def functions_of(entries: Sequence[Any]) -> dict[str, Callable[..., Any]]:
    """Tools by name.

    Args:
        entries: functions, or their names as `module:function` or `file.py:function`.

    Raises:
        ConfigError: one is no function, or two have one name.
    """
    found: dict[str, Callable[..., Any]] = {}
    for entry in entries:
        function = imported("tools", entry) if isinstance(entry, str) else entry
        name = getattr(function, "__name__", "")
        if not callable(function) or not name:
            raise ConfigError(
                f"tools: got {entry!r}, expected functions, or names as module:function or file.py:function"
            )
        if name in found:
            raise ConfigError(f"tools: two functions are called {name}; give one of them another name")
        found[name] = function
    return found


def descriptions_of(functions: Mapping[str, Callable[..., Any]]) -> list[dict[str, Any]]:
    """What a chat template shows of functions: name, purpose and arguments, from type hints and docstrings.

    Raises:
        ConfigError: a function lacks them.
    """
    from transformers.utils import get_json_schema

    found = []
    for name, function in functions.items():
        try:
            found.append(get_json_schema(function))
        except Exception as error:  # of several classes, all about hints and docstrings
            raise ConfigError(
                f"tools: {name} cannot be described to the model: {error}. Expected a type hint for every argument, and a "
                f"docstring that says what the function does and, under `Args:`, a line for each argument"
            ) from None
    return found


def checked_step(found: Any) -> tuple[list[dict[str, Any]], float, bool]:
    """What `step` returned.

    Raises:
        Missing: it is something else, or the reward is not finite.
    """
    if not isinstance(found, tuple | list) or len(found) != 3:
        raise Missing(f"step returned {found!r:.200}, expected (messages, reward, done)", "type")
    messages, reward, done = found
    number = finite(reward, "step returned", " as the reward", "number")
    said = checked_messages("step", messages)
    if not said and not done:
        raise Missing("step returned no message, and is not done; expected something to answer to", "type")
    return said, number, bool(done)


def checked_messages(method: str, messages: Any) -> list[dict[str, Any]]:
    """Messages that an environment has returned.

    Raises:
        Missing: they are something else.
    """
    if not isinstance(messages, list | tuple):
        raise Missing(f"{method} returned {messages!r:.200}, expected a list of messages", "type")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            what = f"{message!r:.200}, expected a mapping with a role and content"
            raise Missing(f"{method} returned the message {what}", "type")
    return [dict(message) for message in messages]
