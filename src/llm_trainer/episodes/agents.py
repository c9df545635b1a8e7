"""Plays episodes with an agent that was written elsewhere: it is given a base_url, and a reward when it is done."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_trainer.episodes.conversation import Chat
from llm_trainer.episodes.endpoint import ChatEndpoint, Session
from llm_trainer.episodes.player import Call, guarded
from llm_trainer.episodes.players import AT_ONCE, Players
from llm_trainer.episodes.playing import Episode, Failures, Generate, Limits, Start
from llm_trainer.rewards.returned import finite
from llm_trainer.rewards.workers import Interrupted

Agent = Callable[[str, Mapping[str, Any]], Any]
WAIT_S = 0.05  # for a request, between two looks at the agents


class AgentPlayer:
    """Runs an agent, in whatever process, and never past an exception.

    Args:
        agent: called with base_url and row; it returns its reward, or None: reward functions judge.
    """

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def answer(self, call: Call) -> dict[str, Any]:
        """`reward`; or `cause` and `what`."""
        return guarded(lambda: {"reward": self._reward(call)}, call.seed)

    def _reward(self, call: Call) -> float | None:
        reward = self._agent(call.row["base_url"], call.row["row"])
        if reward is None:
            return None
        return finite(reward)


class AgentEpisodes:
    """Plays episodes with an agent.

    Args:
        chat: makes ids of messages.
        players: the agents.
        stops: tokens that end a turn.
        limits: of an episode.
        max_failed: the run stops above this share of failed episodes, over the latest ones.
    """

    def __init__(self, chat: Chat, players: Players, stops: Sequence[int], limits: Limits, max_failed: float) -> None:
        self.chat, self.players, self.stops, self.limits = chat, players, stops, limits
        self._failures = Failures(max_failed)

    def play(self, starts: Sequence[Start], generate: Generate, stop: Callable[[], bool]) -> list[Episode]:
        """As `playing.Episodes.play`."""
        episodes: list[Episode] = []
        for first in range(0, len(starts), AT_ONCE):
            episodes += self._play(starts[first : first + AT_ONCE], generate, stop)
        self._failures.watch(episodes)
        return episodes

    def _play(self, starts: Sequence[Start], generate: Generate, stop: Callable[[], bool]) -> list[Episode]:
        endpoint = ChatEndpoint()
        episodes, calls = [], []
        for slot, start in enumerate(starts):
            session = Session(self.chat, self.stops, self.limits, start.number, start.sample)
            endpoint.sessions[str(slot)] = session
            episodes.append(Episode(start, session))
            row = {"base_url": endpoint.base_url(str(slot)), "row": start.row}
            calls.append(Call(slot, None, row, start.seed))
        # NOTE: the endpoint ends before the agents are waited for, or threads would wait for answers for ever.
        with self.players.asking(calls) as look, endpoint:
            while (answers := look()) is None:
                if stop():
                    raise Interrupted
                endpoint.answer(generate, WAIT_S)
        for episode, answer in zip(episodes, answers, strict=True):
            self._end(episode, answer)
        return episodes

    def _end(self, episode: Episode, answer: Mapping[str, Any]) -> None:
        if "cause" in answer:
            episode.fail(answer["cause"], f"agent {self.players.name} {answer['what']}")
            return
        episode.reward = answer["reward"]
        segments = episode.conversation.segments
        episode.finish = "length" if segments and segments[-1].is_cut else "stop"
