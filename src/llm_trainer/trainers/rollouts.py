"""The maker of rollouts: the policy's completions of prompts, drawn by a service and judged by reward functions.

What is learned from them is the trainer's business (`RolloutMaker.finish` asks it). A rollout depends on weights, seed and
prompts alone: the noise of a completion is that of its prompt's number in the rollout, whichever process draws it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from llm_trainer.config.options import Sampling
from llm_trainer.config.reinforcement import GenerateConfig
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.rollout_prompts import IMAGES
from llm_trainer.data.rollouts import JUDGED, REDRAWN, TOKEN_REWARDS, Finished, Plan, Prompt, Rollout
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.service import Completion, Interrupted, Request
from llm_trainer.generation.verify import Verified
from llm_trainer.losses.advantages import weighted_rewards
from llm_trainer.machine import Machine
from llm_trainer.rewards.functions import RewardFunctions, Rewards
from llm_trainer.rewards.workers import Interrupted as RewardsInterrupted
from llm_trainer.trainers.completions import (
    Row,
    Written,
    count_redrawn,
    decoding_of,
    earned,
    given_with,
    metrics_of,
    passes_of,
    row_of,
    shown_of,
)
from llm_trainer.trainers.given import as_table, check_rewards
from llm_trainer.trainers.played import Partners, played
from llm_trainer.trainers.prompt_images import PromptImages
from llm_trainer.trainers.routes import route_columns

ATTEMPT = 1 << 32  # what a prompt's number is raised by when its group is drawn again: other noise


@dataclass(eq=False)
class RolloutMaker:
    """Makes rollouts of a trainer (`data.rollouts.Maker`).

    Beside those of every rollout its rows have the column `failed` (a reward function did), and where the distribution is cut
    `kept` and `kept_counts [T]`, the ids that each token was drawn from, end to end, and how many are each token's; and
    `redrawn` where groups may be drawn again.

    Args:
        machine: of the run.
        how: how completions are drawn.
        service: gives who draws them.
        finished: called by all processes when all rows are there: further columns, such as advantages.
        of_finished: what these depend on beside what draws and rewards completions, in JSON types.
        samples: completions of each prompt.
        dtype: of the weights that the service gets, unless it draws with the trained ones in place.
        rewards: functions that judge them; None: they come with their rewards, or a model judges them later.
        tokenizer: for the texts that functions get; None: they get ids.
        stop_token_ids: that end a completion.
        context: most tokens that the model takes; None: no limit.
        vocab_size: how many ids it knows; None: it does not say.
        max_resamplings: how often a group whose rewards are all equal is drawn again.
        padding: of completions that are given without a mask: its id, None if there is none, and whether it ends one too.
        draws_greedy: in training, also the likeliest completion of each prompt, in the column `greedy`.
        eval_samples: completions of each held-out prompt.
        pass_reward: from which on a completion passes.
        shown: completions of each rollout that are printed.
        evaluation: how completions are drawn in evaluation; they may be as long as in training.
        partners: who answers the policy, where it has several turns; None: nobody.
        route_columns: of each row, the experts that drew its tokens (`trainers.routes`); 0: nobody asks.
        images: what becomes of those that prompts show; None: nobody makes anything of them.
        never_drawn: ids beside those that the section suppresses.
    """

    machine: Machine
    how: GenerateConfig
    service: Callable[[], Verified]
    finished: Callable[[Rollout], Finished]
    _: KW_ONLY
    samples: int
    dtype: torch.dtype
    of_finished: Mapping[str, Any] = field(default_factory=dict)
    rewards: RewardFunctions | None = None
    tokenizer: Any = None
    stop_token_ids: Sequence[int] = ()
    context: int | None = None
    vocab_size: int | None = None
    max_resamplings: int = 0
    padding: tuple[int | None, bool] = (None, False)
    draws_greedy: bool = False
    eval_samples: int = 1
    pass_reward: float = 1.0
    shown: int = 0
    evaluation: Sampling = field(default_factory=Sampling)
    partners: Partners | None = None
    route_columns: int = 0
    images: PromptImages | None = None
    never_drawn: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.names: tuple[str, ...] = ("given",)  # of the columns of `rewards`
        self.weights: np.ndarray = np.ones(1)  # of each
        self._said_short = False  # that a prompt leaves less room than a completion may take
        if self.rewards is not None:
            self.names, self.weights = self.rewards.names, self.rewards.weights
        if self.partners is None:
            return
        chat = ChatFormat(self.tokenizer)
        tokens = self.how.gen_max_seq_len
        self._episodes = self.partners.episodes(chat, self.stop_token_ids, tokens, self.context)
        if self.partners.gives_rewards:
            own = () if self.rewards is None else self.names
            self.names, self.weights = (self.partners.label, *own), np.append(1.0, self.weights[: len(own)])

    def settings(self, training: bool) -> Mapping[str, Any]:
        facts = asdict(self._decoding(0, training))
        for name in ("decode", "seed", "row_numbers"):
            del facts[name]
        own: dict[str, Any] = {"max_resamplings": self.max_resamplings, **self.of_finished}
        if self.draws_greedy:
            own["greedy"] = True
        if self.route_columns:
            own["routes"] = self.route_columns
        if self.rewards is not None:
            own["code"] = self.rewards.codes
        if self.partners is not None:
            own["episodes"] = self.partners.facts
        rewards = dict(zip(self.names, self.weights.tolist(), strict=True))
        return facts | own | {"samples": self.num_samples(training), "rewards": rewards}

    @property
    def updates_in_flight(self) -> bool:
        return self.service().updates_in_flight

    def begin(self, plan: Plan) -> None:
        service = self.service()
        dtype = None if service.in_place else self.dtype
        service.load(self.machine.stream_weights(dtype), plan.version)

    def make(self, plan: Plan, prompts: Sequence[Prompt]) -> list[Row] | None:
        try:
            groups = self._groups(plan, prompts, 0)
            for attempt in range(1, self.max_resamplings + 1):
                level = [prompt for prompt in prompts if plan.training and self._is_level(prompt, groups)]
                again = self._groups(plan, level, attempt)
                for number, rows in again.items():
                    count_redrawn(rows, groups[number])
                groups |= again
        except (Interrupted, RewardsInterrupted):
            return None
        rows = []
        for prompt in prompts:
            rows += groups[prompt.number]
        return rows

    def finish(self, rollout: Rollout) -> Finished:
        return self.finished(rollout)

    def metrics(self, rollout: Rollout) -> Mapping[str, tuple[float, float]]:
        values, names, weights = self.table(rollout, judged_of(rollout))
        found = metrics_of(rollout, names, values, weights)
        if not rollout.is_of_training and self.eval_samples > 1:
            found |= passes_of(rollout, values, weights, self.pass_reward, self.eval_samples)
        if rollout.is_of_training and self.shown:
            for line in shown_of(rollout, values, weights, self.shown, self._text):
                self.machine.say(line)
        return found

    def table(self, rollout: Rollout, judged: Mapping[str, Any]) -> tuple[np.ndarray, tuple[str, ...], np.ndarray]:
        """What completions are worth: `[rows, F]`, NaN where a reward is missing; the names and weights of the columns.

        A row for which a function has failed has no reward at all: it would be compared with rows that all have judged.

        Args:
            judged: the columns of a reward model, if there is one.
        """
        values, names, weights = rollout.column("rewards").copy(), self.names, self.weights
        if self.names == ("given",) and judged:
            values, names, weights = values[:, 1:], names[1:], weights[1:]
        if judged:
            values = np.column_stack([values, np.concatenate([np.atleast_1d(value) for value in judged[JUDGED]])])
            names, weights = (*names, JUDGED), np.append(weights, 1.0)
        values[rollout.column("failed") != 0] = np.nan
        return values, names, weights

    # Drawing.

    def num_samples(self, training: bool) -> int:
        """Completions of each prompt."""
        return self.samples if training else self.eval_samples

    def _decoding(self, seed: int, training: bool) -> Decoding:
        decoding = decoding_of(self.how, seed, self.stop_token_ids, self.tokenizer)
        decoding = replace(decoding, suppress_tokens=(*decoding.suppress_tokens, *self.never_drawn))
        if training:
            return decoding
        sampling = self.evaluation
        return replace(
            decoding, temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=0.0
        )

    def _groups(self, plan: Plan, prompts: Sequence[Prompt], attempt: int) -> dict[int, list[Row]]:
        """The rows of each prompt, by its number.

        Raises:
            Interrupted: the plan has been stopped.
            ValueError: a prompt leaves no room for a completion.
        """
        written: list[Written] = []
        for prompt in prompts:
            written += given_with(prompt, *self.padding, self.vocab_size)
        written += self._drawn(plan, [prompt for prompt in prompts if not prompt.given], attempt)
        if self.draws_greedy and plan.training:
            written = [one._replace(is_greedy=False) for one in written]
            for one in self._drawn(plan, prompts, attempt, greedy=True):
                written.append(one._replace(is_greedy=True))
        rows = self._rewarded(plan, written)
        groups: dict[int, list[Row]] = {prompt.number: [] for prompt in prompts}
        for row in rows:
            groups[int(row["group"][0])].append(row)
        if self.images is not None:
            for prompt in prompts:
                self.images.keep(prompt, groups[prompt.number])
        return groups

    def _drawn(self, plan: Plan, prompts: Sequence[Prompt], attempt: int, greedy: bool = False) -> list[Written]:
        """The policy's completions of prompts; of each the likeliest alone, if `greedy`."""
        if not prompts:
            return []
        decoding, samples = self._decoding(plan.seed, plan.training), self.num_samples(plan.training)
        if greedy:
            decoding, samples = replace(decoding, temperature=0.0), 1
        numbers = [prompt.number + attempt * ATTEMPT for prompt in prompts]

        def generate(requests: Sequence[Request]) -> list[list[Completion]]:
            with plan.timed("generate"):
                return self.service().generate(requests, decoding, plan.stop)

        written: list[Written] = []
        shown = [None if self.images is None else self.images.opened(prompt) for prompt in prompts]
        if self.partners is not None:
            gives_rewards = self.partners.gives_rewards
            for rows in played(self._episodes, plan, prompts, numbers, samples, generate, gives_rewards):
                written += [row._replace(attempt=attempt) for row in rows]
            return written
        requests = []
        for prompt, number, images in zip(prompts, numbers, shown, strict=True):
            self._check_prompt(prompt)
            requests.append(Request(prompt.ids.tolist(), number, samples, images=images))
        drawn = generate(requests)
        for prompt, completions in zip(prompts, drawn, strict=True):
            written += [Written(prompt, completion, attempt=attempt) for completion in completions]
        return written

    def _check_prompt(self, prompt: Prompt) -> None:
        """
        Raises:
            ValueError: the model does not know its ids, or it leaves no room for a completion.
        """
        length, longest = len(prompt.ids), self.how.gen_max_seq_len
        extremes = int(prompt.ids.min()), int(prompt.ids.max())
        unknown = [token for token in extremes if self.vocab_size is not None and not 0 <= token < self.vocab_size]
        if unknown:
            raise ValueError(
                f"prompt {prompt.number} of a rollout has the id {unknown[0]}, and the model knows {self.vocab_size} ids; "
                f"expected prompts that its own tokenizer has made"
            )
        if self.context is None or length + longest <= self.context:
            return
        fix = f"leave such rows out, set dataset_block_size to {self.context - longest}, or take a model with a longer context"
        if longest >= self.context:
            fix = "set gen_max_seq_len to less than the context, less the longest prompt"
        if length >= self.context:
            raise ValueError(
                f"prompt {prompt.number} of a rollout has {length} tokens, and the model's context is {self.context}: no room "
                f"for a completion of up to {longest} (gen_max_seq_len); {fix}"
            )
        if not self._said_short:
            self._said_short = True
            self.machine.say(
                f"WARNING: a prompt of {length} tokens leaves {self.context - length} of the model's context of {self.context} "
                f"for its completions, which are cut there, before gen_max_seq_len ({longest}); {fix}"
            )

    # Rewarding.

    def _rewarded(self, plan: Plan, written: Sequence[Written]) -> list[Row]:
        """The rows of completions.

        Raises:
            Interrupted: the plan has been stopped.
        """
        values = np.full((len(written), len(self.names)), np.nan)
        errors: list[Mapping[str, str]] = [{}] * len(written)
        causes: list[Mapping[str, str]] = [{}] * len(written)
        of_tokens: dict[int, dict[str, np.ndarray]] = {}  # by completion and function
        asked = [number for number, one in enumerate(written) if _is_judged(one)]
        if self.rewards is not None and asked:
            with plan.timed("reward"):
                found = self._judged([written[number] for number in asked], plan)
            values[asked, values.shape[1] - found.values.shape[1] :] = found.values
            for number, said, why in zip(asked, found.errors, found.cause_of, strict=True):
                errors[number], causes[number] = said, why
            for name, numbers in found.tokens.items():
                for number, earned_here in zip(asked, numbers, strict=True):
                    if earned_here is not None:
                        of_tokens.setdefault(number, {})[name] = earned_here
        keeps_cuts = self._decoding(0, training=True).is_cut  # rows then have the ids that each token was drawn from
        counts_redrawn = plan.training and self.max_resamplings > 0
        rows = []
        for number, one in enumerate(written):
            if one.reward is not None:
                values[number] = self._given_rewards(one.reward)
            if one.played is not None and not one.played.is_first:
                values[number], errors[number] = values[number - 1], errors[number - 1]
                causes[number] = causes[number - 1]
            elif one.played is not None and one.played.error is not None:
                assert self.partners is not None
                errors[number] = {self.partners.label: one.played.error[1]}
            elif one.played is not None and one.played.reward is not None:
                values[number, 0] = one.played.reward
            row = row_of(one, values[number], errors[number], causes[number], keeps_cuts)
            if self.route_columns:
                row |= route_columns(one.completion.routes, len(row["input_ids"]), self.route_columns)
            if self.rewards is not None and self.partners is None:  # of an episode the sum alone counts
                row |= earned(one, of_tokens.get(number, {}), self.names, self.weights)
            if counts_redrawn:
                row[REDRAWN] = np.zeros(1, dtype=np.int64)
            rows.append(row)
        return rows

    def _given_rewards(self, given: float | Sequence[float]) -> np.ndarray:
        """`[F]`: those that came for each function, or one for all, which is a function's whatever its weight is.

        Raises:
            ValueError: there are more or fewer.
        """
        check_rewards(as_table("rewards", given))
        if isinstance(given, Sequence):
            if len(given) != len(self.names):
                raise ValueError(
                    f"rewards: found {len(given)} for a response that is given; expected 1, or {len(self.names)}, one for each "
                    f"of {', '.join(self.names)}"
                )
            return np.array(given, dtype=np.float64)
        values, counted = np.full(len(self.names), np.nan), int(np.argmax(self.weights != 0))
        values[counted] = given / self.weights[counted]
        return values

    def _judged(self, written: Sequence[Written], plan: Plan) -> Rewards:
        assert self.rewards is not None
        names: dict[str, None] = {}
        for one in written:
            names |= dict.fromkeys(one.prompt.columns)
        columns = {}
        for name in names:
            columns[name] = [one.prompt.columns.get(name) for one in written]
        if any(one.prompt.images for one in written):
            columns[IMAGES] = [list(map(attrgetter("source"), one.prompt.images)) for one in written]
        return self.rewards(
            [self._text(one.prompt.ids.tolist()) for one in written],
            [self._text(one.completion.ids) if one.played is None else one.played.text for one in written],
            [one.prompt.answer for one in written],
            columns,
            lengths=[len(one.completion.ids) for one in written],
            stop=plan.stop,
        )

    def _text(self, ids: list[int]) -> Any:
        """As functions get it: without the tokens that mark turns and their ends."""
        if self.tokenizer is None:
            return ids
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _is_level(self, prompt: Prompt, groups: Mapping[int, Sequence[Row]]) -> bool:
        """Whether a group was drawn here, and its rewards, as far as there are any, are all equal, and none is of a token."""
        if prompt.given:
            return False
        rows = groups[prompt.number]
        if any(len(row.get(TOKEN_REWARDS, ())) for row in rows):
            return False
        values = np.stack([row["rewards"] for row in rows])
        values[np.concatenate([row["failed"] for row in rows]) != 0] = np.nan
        totals = weighted_rewards(torch.from_numpy(values), torch.from_numpy(self.weights))
        known = totals[~totals.isnan()]
        return len(known) == 0 or bool(known.max() == known.min())


def judged_of(rollout: Rollout) -> dict[str, Any]:
    """What a reward model has given for the completions of a finished rollout; nothing: there was none."""
    return {JUDGED: rollout.column(JUDGED)} if JUDGED in rollout.store.columns else {}


def _is_judged(one: Written) -> bool:
    """Whether reward functions are asked about a row: none has its reward already, and an episode is judged once."""
    if one.played is None:
        return one.reward is None
    return one.played.is_first and one.played.error is None
