"""Episodes of a trainer: who answers the policy, and what becomes of an episode in a rollout."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.reinforcement import RolloutOptions
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.templates import ChatTemplateError
from llm_trainer.data.rollouts import Plan, Prompt
from llm_trainer.data.stream import mix_seeds
from llm_trainer.episodes.environments import Tools, descriptions_of, environment_of, functions_of
from llm_trainer.episodes.players import Players
from llm_trainer.episodes.playing import Episode, Episodes, Generate, Limits, Start
from llm_trainer.generation.service import Completion
from llm_trainer.rewards.identity import code_hash
from llm_trainer.trainers.completions import Played, Written

ENVIRONMENT = "environment"  # the name of its column of rewards


class Partners:
    """Who answers the policy in the episodes of a run: an environment, or tools.

    Its processes are forked when it is made, before there are threads and devices.

    Args:
        how: the section.

    Attributes:
        gives_rewards: an environment does; tools are judged by reward functions.
        players: its processes.
        facts: what rollouts depend on, in JSON types.

    Raises:
        ConfigError: there is no such environment or function, or both are given.
    """

    def __init__(self, how: RolloutOptions) -> None:
        if how.environment is not None and how.tools:
            raise ConfigError(
                "got environment and tools; expected one of them: an environment finds the calls of its own tools in "
                "message['tool_calls'] and answers them"
            )
        self.gives_rewards = how.environment is not None
        functions = functions_of(how.tools)
        self.tools = descriptions_of(functions)
        make: Any = environment_of(how.environment) if self.gives_rewards else lambda: Tools(functions)
        name = getattr(getattr(make, "func", make), "__name__", ENVIRONMENT) if self.gives_rewards else "tools"
        self.players = Players(
            name,
            make,
            seconds=how.environment_seconds,
            memory_gb=how.environment_memory_gb,
            in_process=how.environment_in_process,
        )
        codes = [code_of(make)] if self.gives_rewards else [code_of(function) for function in functions.values()]
        self.facts = {"name": name, "code": codes, "max_turns": how.max_turns, "tools": self.tools}
        self._limits = Limits(how.max_turns, 0, None, self.gives_rewards)
        self._max_failed = how.max_failed_rewards

    def episodes(self, chat: ChatFormat, stops: Sequence[int], tokens: int, context: int | None) -> Episodes:
        """What plays them.

        Args:
            chat: makes ids of messages.
            stops: tokens that end a turn.
            tokens: of the policy in an episode, at most.
            context: of the model.
        """
        limits = self._limits._replace(tokens=tokens, context=context)
        return Episodes(chat, self.players, self.tools, stops, limits, self._max_failed)

    def try_out(self, chat: ChatFormat) -> str:
        """Whether what is said to the policy can be appended to what it has written, for people.

        Raises:
            ConfigError: the chat template refuses conversations of several turns.
        """
        role = "tool" if self.tools else "user"
        begin, said = [{"role": "user", "content": "?"}], [{"role": role, "content": "!"}]
        kept = {}
        for what, text in (("answer", "A"), ("thought", "<think>\nB\n</think>\n\nA")):
            reply = {"role": "assistant", "content": text}
            try:
                kept[what] = chat.encode_continuation(begin, reply, said, self.tools or None) is not None
            except ChatTemplateError as error:
                raise ConfigError(
                    f"the chat template cannot be used for episodes: it refuses what a {role} says after an answer ({error}). "
                    f"Expected a template for several turns: set another one as the tokenizer's chat_template"
                ) from None
        if not kept["answer"]:
            return "episodes: the chat template rewrites earlier turns, so every turn of an episode is a row of its own"
        if not kept["thought"]:
            return (
                "episodes: the chat template drops the thinking of earlier turns, so what follows a turn with thinking is a "
                "row of its own; other turns are appended"
            )
        return "episodes: the chat template keeps earlier turns, so all turns of an episode are one row"


def code_of(made: Any) -> str:
    """Hash of what a function does, or the methods of a class."""
    made = getattr(made, "func", made)
    if not isinstance(made, type):
        return code_hash(made)
    found = ""
    for base in made.__mro__:
        for _, method in sorted(vars(base).items()):
            if getattr(method, "__code__", None) is not None:
                found += code_hash(method)
    return found


def played(
    episodes: Episodes,
    plan: Plan,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    samples: int,
    generate: Generate,
    gives_rewards: bool,
) -> list[list[Written]]:
    """The episodes of each prompt, as rows of a rollout.

    Args:
        numbers: of the prompts in the noise.
        samples: episodes of each prompt.

    Raises:
        Interrupted: the plan has been stopped.
    """
    starts = []
    for prompt, number in zip(prompts, numbers, strict=True):
        row: dict[str, Any] = {**prompt.columns, "answer": prompt.answer}
        if prompt.messages is not None:
            row["messages"] = prompt.messages
        seed = mix_seeds(plan.seed, number)
        starts += [Start(row, number, sample, seed) for sample in range(samples)]
    found = episodes.play(starts, generate, plan.stop)
    groups = []
    for place, prompt in enumerate(prompts):
        rows: list[Written] = []
        for episode in found[place * samples : (place + 1) * samples]:
            rows += _rows(prompt, episode, gives_rewards)
        groups.append(rows)
    return groups


def _rows(prompt: Prompt, episode: Episode, gives_rewards: bool) -> list[Written]:
    """The rows of an episode; of one that failed at once, one without a token by the policy."""
    conversation = episode.conversation
    facts: dict[str, Any] = {"turns": conversation.num_turns}
    if episode.last:
        facts["last"] = episode.last
    if episode.error is not None:
        facts["cause"] = episode.error[0]
    reward = episode.reward if gives_rewards else None
    of_all = Played(episode.start.sample, True, conversation.text(), reward, episode.error, facts)
    written = [segment for segment in conversation.segments if any(segment.trained)]
    if not written:
        ids = conversation.segments[0].prompt if conversation.segments else prompt.ids.tolist() or [0]
        return [Written(_with_ids(prompt, ids), Completion([], [], episode.finish, []), played=of_all)]
    rows = []
    for number, segment in enumerate(written):
        finish = episode.finish
        if segment is not written[-1] and finish == "length":
            finish = "stop"
        one = of_all._replace(is_first=number == 0)
        rows.append(Written(_with_ids(prompt, segment.prompt), segment.completion(finish), played=one))
    return rows


def _with_ids(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    return replace(prompt, ids=np.array(ids, dtype=np.int64))
