"""Episodes of a trainer: who answers the policy, and what becomes of an episode in a rollout."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.reinforcement import RolloutOptions
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.templates import ChatTemplateError
from llm_trainer.data.rollouts import Plan, Prompt
from llm_trainer.data.stream import mix_seeds
from llm_trainer.episodes.agents import AgentEpisodes, AgentPlayer
from llm_trainer.episodes.environments import Tools, descriptions_of, environment_of, functions_of
from llm_trainer.episodes.player import Player
from llm_trainer.episodes.players import Players
from llm_trainer.episodes.playing import Episode, Episodes, Generate, Limits, Start
from llm_trainer.generation.service import Completion
from llm_trainer.rewards.identity import code_hash
from llm_trainer.rewards.named import imported
from llm_trainer.trainers.completions import Played, Written


class Partners:
    """Who talks to the policy in the episodes of a run: an environment, tools or an agent.

    Its processes are forked when it is made, before there are threads and devices.

    Args:
        how: the section.

    Attributes:
        label: of what it is, and of its column of rewards.
        gives_rewards: tools give none: reward functions judge them.
        players: its processes.
        tools: descriptions of functions that the policy may call.
        facts: what rollouts depend on, in JSON types.

    Raises:
        ConfigError: there is no such class or function, or several are given.
    """

    def __init__(self, how: RolloutOptions) -> None:
        given = [name for name, value in _given(how).items() if value]
        if len(given) > 1:
            raise ConfigError(
                f"got {' and '.join(given)}; expected one of them: environments and agents find what the policy calls in "
                f"message['tool_calls'], and answer it themselves"
            )
        [self.label] = given
        self.gives_rewards = self.label != "tools"
        functions = functions_of(how.tools)
        self.tools = descriptions_of(functions)
        seconds, made = how.environment_seconds, list(functions.values())
        play: Callable[[], Any]
        if self.label == "environment":
            make = environment_of(how.environment)
            play, made = partial(Player, make), [make]
        elif self.label == "agent":
            agent = imported("agent", how.agent) if isinstance(how.agent, str) else how.agent
            if not callable(agent):
                raise ConfigError(f"agent: got {agent!r}, expected a function of base_url and row, or its name")
            play, made, seconds = partial(AgentPlayer, agent), [agent], how.agent_seconds
        else:
            play = partial(Player, partial(Tools, functions))
        name = "tools" if len(made) != 1 or self.label == "tools" else name_of(made[0])
        self.players = Players(
            name,
            play,
            seconds=seconds,
            memory_gb=how.environment_memory_gb,
            in_process=how.environment_in_process,
        )
        codes = [code_of(one) for one in made]
        self.facts = {"name": name, "code": codes, "max_turns": how.max_turns, "tools": self.tools}
        self._limits = Limits(how.max_turns, 0, None, self.label == "environment")
        self._max_failed = how.max_failed_rewards

    @staticmethod
    def are_in(how: RolloutOptions) -> bool:
        """Whether a section names any."""
        return any(_given(how).values())

    def episodes(
        self,
        chat: ChatFormat,
        stops: Sequence[int],
        tokens: int,
        context: int | None,
        max_failed: float | None = None,
    ) -> Episodes | AgentEpisodes:
        """What plays them.

        Args:
            chat: makes ids of messages.
            stops: tokens that end a turn.
            tokens: of the policy in an episode, at most.
            context: of the model.
            max_failed: share of failures above which the run stops; None: the section's.
        """
        if max_failed is None:
            max_failed = self._max_failed
        limits = self._limits._replace(tokens=tokens, context=context)
        if self.label == "agent":
            return AgentEpisodes(chat, self.players, stops, limits, max_failed)
        return Episodes(chat, self.players, self.tools, stops, limits, max_failed)

    def play(
        self,
        chat: ChatFormat,
        stops: Sequence[int],
        tokens: int,
        context: int | None,
        prompts: Sequence[str],
        generate: Generate,
    ) -> list[str]:
        """An episode for each of `prompts`, as text; where one fails, what happened. Other arguments: see `episodes`."""
        starts = []
        for number, prompt in enumerate(prompts):
            row = {"prompt": prompt, "answer": None, "messages": [{"role": "user", "content": prompt}]}
            starts.append(Start(row, number, 0, number))
        shown = self.episodes(chat, stops, tokens, context, max_failed=1.0).play(starts, generate, lambda: False)
        texts = []
        for episode in shown:
            text = episode.conversation.text()
            if episode.error is not None:
                text = episode.error[1]
            texts.append(text)
        return texts

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


def _given(how: RolloutOptions) -> dict[str, bool]:
    return {"environment": how.environment is not None, "tools": bool(how.tools), "agent": how.agent is not None}


def name_of(made: Any) -> str:
    """What an environment or an agent is called."""
    made = getattr(made, "func", made)
    return str(getattr(made, "__name__", type(made).__name__))


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
    episodes: Episodes | AgentEpisodes,
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
    began, drawing = time.perf_counter(), plan.seconds.get("generate", 0.0)
    found = episodes.play(starts, generate, plan.stop)
    drawing = plan.seconds.get("generate", 0.0) - drawing
    answering = time.perf_counter() - began - drawing
    plan.seconds["environment"] = plan.seconds.get("environment", 0.0) + answering
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
        one = of_all._replace(is_first=number == 0)
        completion = segment.completion(episode.finish)  # that of all: an episode has an end or none
        rows.append(Written(_with_ids(prompt, segment.prompt), completion, played=one))
    return rows


def _with_ids(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    return replace(prompt, ids=np.array(ids, dtype=np.int64))
