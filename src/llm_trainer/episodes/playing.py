"""Plays episodes: environments and policy take turns, all episodes that wait for the policy in one batch."""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from llm_trainer.episodes.conversation import Chat, Conversation, Message
from llm_trainer.episodes.player import Call
from llm_trainer.episodes.players import AT_ONCE, Players
from llm_trainer.generation.service import Completion, Request
from llm_trainer.rewards.functions import FEW, RECENT, RewardError

# Why an episode failed, beside `rewards.returned.CAUSES`.
NEVER_ENDED, NO_ROOM = "never_ended", "context"
Generate = Callable[[Sequence[Request]], Sequence[Sequence[Completion]]]


class Limits(NamedTuple):
    """How far an episode may go.

    Attributes:
        turns: Of the policy.
        tokens: Of the policy.
        context: Of the model, everything included; None: no limit.
        ends_itself: It is the environment that ends an episode, so that one which has not done so by then has failed;
            otherwise the policy does, and is cut.
    """

    turns: int
    tokens: int
    context: int | None
    ends_itself: bool


class Start(NamedTuple):
    """An episode that is to be played.

    Attributes:
        row: What the environment begins with.
        number: Of its prompt, in the noise.
        sample: Its own number among the episodes of the prompt.
        seed: Of the environment.
    """

    row: Mapping[str, Any]
    number: int
    sample: int
    seed: int


@dataclass(eq=False)
class Episode:
    """One episode.

    Attributes:
        start: what it began with.
        conversation: what was said and written: a `Conversation`, or what has its rows, turns and text.
        reward: the sum of those of its steps; None: nothing but reward functions judges it.
        finish: how it ended, as a completion does; "": it goes on.
        error: if it has failed, the cause and a message.
        reply: what the environment is to answer; None: it begins.
        last: what the environment said at the end.
    """

    start: Start
    conversation: Any
    reward: float | None = 0.0
    finish: str = ""
    error: tuple[str, str] | None = None
    reply: Message | None = None
    last: list[Message] = field(default_factory=list)

    def fail(self, cause: str, message: str) -> None:
        """End it; it is not learned from."""
        self.finish, self.error = "error", (cause, message)


class Episodes:
    """Plays episodes with one kind of environment.

    Args:
        chat: makes ids of messages.
        players: the environments.
        tools: descriptions of functions that the policy may call.
        stops: tokens that end a turn.
        limits: of an episode.
        max_failed: the run stops above this share of failed episodes, over the latest ones.
    """

    def __init__(
        self,
        chat: Chat,
        players: Players,
        tools: Sequence[Mapping[str, Any]],
        stops: Sequence[int],
        limits: Limits,
        max_failed: float,
    ) -> None:
        self.chat, self.players, self.tools, self.stops = chat, players, tools, stops
        self.limits = limits
        self._failures = Failures(max_failed)

    def play(self, starts: Sequence[Start], generate: Generate, stop: Callable[[], bool]) -> list[Episode]:
        """Episodes from beginning to end, in the order of `starts`.

        Args:
            generate: the policy's turns; all of a round at once.
            stop: asked several times a second while environments answer.

        Raises:
            Interrupted: of the rewards or of the service: it was asked to stop.
            RewardError: too many episodes have failed.
        """
        episodes = [Episode(start, Conversation(self.chat, self.stops, self.tools)) for start in starts]
        queue, playing = deque(episodes), dict[int, Episode]()
        while queue or playing:
            for slot in range(AT_ONCE):
                if queue and slot not in playing:
                    playing[slot] = queue.popleft()
            # 1. environments begin, or answer
            for slot, answer in zip(playing, self.players.ask(_calls(playing), stop), strict=True):
                self._take(playing[slot], answer)
            playing = {slot: episode for slot, episode in playing.items() if not episode.finish}
            # 2. the policy answers
            waiting = list(playing.values())
            for episode, completion in zip(waiting, self._drawn(waiting, generate), strict=True):
                episode.reply = episode.conversation.write(completion)
                if completion.finish != "stop":
                    episode.finish = completion.finish
            playing = {slot: episode for slot, episode in playing.items() if not episode.finish}
        self._failures.watch(episodes)
        return episodes

    def _take(self, episode: Episode, answer: Mapping[str, Any]) -> None:
        """What an environment has answered."""
        limits, conversation = self.limits, episode.conversation
        if "cause" in answer:
            episode.fail(answer["cause"], f"environment {self.players.name} {answer['what']}")
            return
        if episode.reply is not None:
            episode.reward = (episode.reward or 0.0) + answer["reward"]
            if answer["done"]:
                episode.finish, episode.last = "stop", answer["messages"]
                return
            if conversation.num_turns >= limits.turns:
                episode.last = answer["messages"]
                self._out_of_turns(episode)
                return
        try:
            conversation.hear(answer["messages"])
        except ValueError as error:  # the template refuses it
            episode.fail("type", f"environment {self.players.name} said what cannot be shown to the policy: {error}")
            return
        room = len(conversation.ids) < (limits.context or float("inf"))
        if not room and not conversation.num_turns:
            episode.fail(
                NO_ROOM,
                f"environment {self.players.name} begins with {len(conversation.ids)} tokens, and the model's context is "
                f"{limits.context}: no room for an answer",
            )
        elif not room or conversation.num_written >= limits.tokens:
            episode.finish = "length"

    def _out_of_turns(self, episode: Episode) -> None:
        if self.limits.ends_itself:
            what = f"has not ended after {self.limits.turns} turns of the policy (max_turns)"
            episode.fail(NEVER_ENDED, f"environment {self.players.name} {what}")
        else:
            episode.finish = "length"

    def _drawn(self, waiting: Sequence[Episode], generate: Generate) -> list[Completion]:
        """The policy's turn in each episode."""
        requests: list[Request] = []
        for episode in waiting:
            conversation, start = episode.conversation, episode.start
            most = self.limits.tokens - conversation.num_written
            one = conversation.request(start.number, start.sample, most)
            if requests and _follows(requests[-1], one):
                requests[-1] = requests[-1]._replace(samples=requests[-1].samples + 1)
            else:
                requests.append(one)
        found: list[Completion] = []
        for completions in generate(requests) if requests else ():
            found += completions
        return found


class Failures:
    """Stops a run of which too many episodes fail.

    Args:
        most: share of failed episodes, over the latest ones, above which it does.
    """

    def __init__(self, most: float) -> None:
        self.most = most
        self._recent: deque[Episode] = deque(maxlen=RECENT)

    def watch(self, episodes: Sequence[Episode]) -> None:
        """
        Raises:
            RewardError: too large a share has failed.
        """
        self._recent.extend(episodes)
        failures = [episode.error for episode in self._recent if episode.error is not None]
        if len(failures) <= max(FEW - 1, self.most * len(self._recent)):
            return
        counts = Counter(cause for cause, _ in failures)
        examples = dict(reversed(failures))
        causes = "; ".join(f"{count} x {cause}: {examples[cause]}" for cause, count in counts.most_common())
        raise RewardError(
            f"{len(failures)} of the last {len(self._recent)} episodes have failed, more than the share of {self.most:g} that "
            f"max_failed_rewards allows. {causes}. Mend the environment, or what it asks, or raise the share"
        )


def _calls(playing: Mapping[int, Episode]) -> list[Call]:
    calls = []
    for slot, episode in playing.items():
        if episode.reply is None:
            calls.append(Call(slot, None, episode.start.row, episode.start.seed))
        else:
            calls.append(Call(slot, episode.reply))
    return calls


def _follows(request: Request, one: Request) -> bool:
    """Whether a sample is the next one of those that a request asks for, from the same beginning."""
    is_next = one.first == 0 and one.sample == request.sample + request.samples
    return is_next and one == request._replace(sample=one.sample, samples=1)
