"""Completions as rows of a rollout, and what one watches of them."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from llm_trainer.config.reinforcement import GenerateConfig
from llm_trainer.data.rollouts import (
    BY_TOKEN,
    EPISODE,
    FINISHES,
    GREEDY,
    REDRAWN,
    TOKEN_REWARDS,
    Prompt,
    Rollout,
    as_json,
    num_sampled,
    sum_of_known,
)
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.service import Completion
from llm_trainer.losses.advantages import level_share, weighted_rewards
from llm_trainer.trainers.given import as_table, check_known, mask_of_responses, per_token

Row = dict[str, np.ndarray]
GIVEN = -1  # the version of the weights of a completion that was not drawn
LONGEST_SHOWN = 300  # characters of a prompt, its last ones, and of a completion, its first ones
_LOGPROBS = ("old_logprobs", "sampled_logprobs")


class Played(NamedTuple):
    """What is known of an episode, beside its rows.

    Attributes:
        number: its own, in its group.
        is_first: the row is its first one; what judges it is asked once.
        text: of all of it, for reward functions.
        reward: of its environment; None: that gives none.
        error: if it has failed, cause and message.
        facts: `turns` of the policy, `cause` of its failure, and what the environment said at the end, `last`.
    """

    number: int
    is_first: bool
    text: str
    reward: float | None
    error: tuple[str, str] | None
    facts: Mapping[str, Any]


class Written(NamedTuple):
    """A completion with its prompt.

    Attributes:
        prompt: what it continues.
        completion: as the service wrote it, or as it was given.
        reward: that was given with it, or one for each function; None: functions say it.
        attempt: how often its group had been drawn before.
        old_logprobs: that were given with it, a number for each token.
        has_sum: they are one number, the sum, that was spread over the tokens.
        played: the episode that it is a row of.
        is_greedy: it is the likeliest one, to compare others with; None: there are no such ones in this rollout.
    """

    prompt: Prompt
    completion: Completion
    reward: float | Sequence[float] | None = None
    attempt: int = 0
    old_logprobs: Sequence[float] | None = None
    has_sum: bool = False
    played: Played | None = None
    is_greedy: bool | None = None


def decoding_of(how: GenerateConfig, seed: int, stop_token_ids: Sequence[int], tokenizer: Any = None) -> Decoding:
    """How completions are drawn.

    Args:
        how: what the section says.
        seed: of their noise.
        stop_token_ids: that end one.
        tokenizer: makes text of ids where texts end one; None: there are no such texts.
    """
    decode = None if tokenizer is None else tokenizer.decode
    return Decoding(
        max_new_tokens=how.gen_max_seq_len,
        temperature=how.gen_temperature,
        top_k=how.gen_k,
        top_p=how.gen_p,
        min_p=how.gen_min_p,
        repetition_penalty=how.gen_repetition_penalty,
        suppress_tokens=tuple(how.gen_suppress_tokens),
        stop_strings=tuple(how.gen_stop_strings),
        decode=decode,
        stop_token_ids=tuple(stop_token_ids),
        seed=seed,
    )


def given_with(prompt: Prompt, pad_id: int | None, pad_ends: bool, vocab_size: int | None = None) -> list[Written]:
    """The completions that came with a prompt, without their padding; nobody knows how probable they were when drawn.

    Args:
        pad_id: of padding, where no mask says what is; None: nothing is.
        pad_ends: it is also the token that ends a completion.
        vocab_size: how many ids the model knows; None: it does not say.

    Raises:
        ValueError: the model does not know their ids, or what came with them is of another shape or no log-probability.
    """
    written = []
    for given in prompt.given:
        one = {name: as_table(name, [values]) for name, values in given.items()}  # a batch of one
        mask = mask_of_responses(one, one["responses"], pad_id, pad_ends)
        check_known("responses", one["responses"][mask], vocab_size)
        numbers = {name: per_token(name, one[name], mask)[mask].tolist() for name in _LOGPROBS if name in one}
        ids = one["responses"][mask].tolist()
        sampled = numbers.get("sampled_logprobs", [math.nan] * len(ids))
        completion = Completion(ids, sampled, "stop", [(0, GIVEN)])
        old = numbers.get("old_logprobs")
        has_sum = old is not None and one["old_logprobs"].dim() == 1
        written.append(Written(prompt, completion, given.get("rewards"), old_logprobs=old, has_sum=has_sum))
    return written


def given_logprobs(rollout: Rollout, columns: Mapping[str, Sequence[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """`old_logprobs` with those that came with completions, and `has_sums` where these are sums; nothing if none came.

    Args:
        rollout: whole.
        columns: `old_logprobs` of all rows, as they were computed; may be absent where `has_given_logprobs` says no.
    """
    if not has_given_logprobs(rollout):
        return {}
    old, has_sums = list(columns["old_logprobs"]), False
    for row, facts in _given_facts(rollout):
        if "old_logprobs" in facts:
            numbers = np.array(old[row], dtype=np.float32)
            numbers[len(numbers) - len(facts["old_logprobs"]) :] = facts["old_logprobs"]
            old[row] = numbers
            has_sums = has_sums or facts["has_sum"]
    found = {"old_logprobs": old}
    if has_sums:
        found["has_sums"] = [np.ones(1, dtype=np.float32)] * len(old)
    return found


def has_given(rollout: Rollout) -> bool:
    """Whether completions of a rollout were given, not drawn."""
    return bool((rollout.store["versions"].values[1::2] == GIVEN).any())


def has_given_logprobs(rollout: Rollout) -> bool:
    """Whether older log-probs came with completions of a rollout."""
    return any("old_logprobs" in facts for _, facts in _given_facts(rollout))


def _given_facts(rollout: Rollout) -> Iterator[tuple[int, dict[str, Any]]]:
    if not has_given(rollout):
        return
    for row in range(len(rollout)):
        yield row, rollout.facts(row)


def count_redrawn(rows: Sequence[Row], earlier: Sequence[Row]) -> None:
    """Note in the first row of a group the tokens of those that were drawn `earlier`, whose place the `rows` take."""
    for before in earlier:
        rows[0][REDRAWN] += before[REDRAWN] + num_sampled(len(before["input_ids"]), before["versions"])


def row_of(
    one: Written, rewards: np.ndarray, errors: Mapping[str, str], causes: Mapping[str, str], keeps_cuts: bool
) -> Row:
    """A row of a rollout (`data.rollouts.COLUMNS`).

    Args:
        rewards: `[F]`.
        errors: by reward function that has failed.
        causes: of these, by reward function.
        keeps_cuts: it says what ids each token was drawn from, as `RolloutMaker` does.
    """
    prompt, completion = one.prompt, one.completion
    start = len(prompt.ids)
    ids = np.concatenate([prompt.ids, np.array(completion.ids, dtype=np.int64)])
    spans = [(start + first, version) for first, version in completion.versions]
    logprobs = np.zeros(len(ids), dtype=np.float32)
    logprobs[start:] = completion.logprobs
    trained = np.arange(len(ids)) >= start
    if completion.trained is not None:
        trained[start:] = completion.trained
    facts: dict[str, Any] = {
        "answer": prompt.answer,
        "columns": prompt.columns,
        "errors": errors,
        "attempt": one.attempt,
    }
    if causes:
        facts["causes"] = causes
    if one.old_logprobs is not None:
        facts |= {"old_logprobs": one.old_logprobs, "has_sum": one.has_sum}
    if one.played is not None:
        facts["episode"] = one.played.facts
    row = {
        "input_ids": ids,
        "trained": trained,
        "group": np.array([prompt.number]),
        "sampled_logprobs": logprobs,
        "versions": np.array(spans).flatten(),
        "finish": np.array([FINISHES.index(completion.finish)]),
        "rewards": rewards,
        "facts": as_json(facts),
        "failed": np.array([bool(errors)], dtype=np.uint8),
    }
    if one.played is not None:
        row[EPISODE] = np.array([one.played.number])
    if one.is_greedy is not None:
        row[GREEDY] = np.array([one.is_greedy], dtype=np.uint8)
    if keeps_cuts:
        cuts = completion.kept or [[]] * len(completion.ids)
        counts = np.zeros(len(ids), dtype=np.int64)
        counts[start:] = [len(cut) for cut in cuts]
        row["kept_counts"] = counts
        row["kept"] = np.array(list(chain.from_iterable(cuts)), dtype=np.uint32)
    return row


def earned(
    one: Written, of_tokens: Mapping[str, np.ndarray], names: Sequence[str], weights: np.ndarray
) -> dict[str, np.ndarray]:
    """What the tokens of a completion have earned themselves, as columns of its row.

    Args:
        of_tokens: by function that has judged them: a number for each of its tokens, NaN where it has not.
        names: of all functions.
        weights: `[F]`.
    """
    by_token = np.array([name in of_tokens for name in names], dtype=np.uint8)
    if not of_tokens:
        return {TOKEN_REWARDS: np.empty(0), BY_TOKEN: by_token}
    start, length = len(one.prompt.ids), len(one.completion.ids)
    found: np.ndarray = np.full(start + length, np.nan)
    for name, numbers in of_tokens.items():
        weighted = weights[names.index(name)] * numbers
        found[start:] = sum_of_known(found[start:], weighted)
    return {TOKEN_REWARDS: found, BY_TOKEN: by_token}


def metrics_of(
    rollout: Rollout, names: Sequence[str], rewards: np.ndarray, weights: np.ndarray
) -> dict[str, tuple[float, float]]:
    """What one watches of a rollout, as name -> (sum, number of terms). Names are TRL's, as far as it has them.

    Args:
        rollout: whole.
        names: of the columns of `rewards`.
        rewards: `[rows, F]`, NaN where missing.
        weights: `[F]`.
    """
    # 1. rewards, and their parts: an episode of several rows counts once
    last, of_row = rollout.episodes()
    rewards, drawn = rewards[last], ~rollout.is_greedy[last]
    rows = int(drawn.sum())
    totals = weighted_rewards(torch.from_numpy(rewards), torch.from_numpy(weights)).numpy()
    present = totals[drawn & ~np.isnan(totals)]
    found = {"reward": (float(present.sum()), float(len(present)))}
    if len(present) > 1:
        found["reward_std"] = float(present.std(ddof=1)), 1.0
    for name, column in zip(names, rewards.T, strict=True):
        there = column[drawn & ~np.isnan(column)]
        found[f"rewards/{name}"] = float(there.sum()), float(len(there))
    greedy = totals[~drawn & ~np.isnan(totals)]
    if len(greedy):
        found["reward_greedy"] = float(greedy.sum()), float(len(greedy))
    groups = torch.from_numpy(np.array(rollout.column("group")))[last]
    if len(groups.unique()) < len(last):  # else there is nothing to compare
        found["frac_reward_zero_std"] = level_share(torch.from_numpy(totals), groups)
    if REDRAWN in rollout.store.columns:
        redrawn = np.unique(rollout.column("group")[rollout.column(REDRAWN) > 0])
        found["frac_groups_resampled"] = float(len(redrawn)), float(len(groups.unique()))
    failed = last[(rollout.column("failed")[last] != 0) & drawn]
    found["rewards/failed"] = float(len(failed)), float(rows)
    for cause, completions in _causes_of(rollout, failed).items():
        found[f"rewards/failed/{cause}"] = float(completions), float(rows)

    # 2. completions
    lengths = np.bincount(of_row, [trained.sum() for trained in rollout.column("trained")], minlength=len(last))[drawn]
    finish = np.zeros(len(last), dtype=np.uint8)
    np.maximum.at(finish, of_row, rollout.column("finish"))
    finish = finish[drawn]
    found["completions/mean_length"] = float(lengths.sum()), float(rows)
    found["completions/min_length"] = float(lengths.min(initial=10**9)), 1.0
    found["completions/max_length"] = float(lengths.max(initial=0)), 1.0
    found["completions/clipped_ratio"] = float((finish == FINISHES.index("length")).sum()), float(rows)
    found["completions/failed"] = float((finish >= FINISHES.index("aborted")).sum()), float(rows)
    if EPISODE in rollout.store.columns:
        found |= _metrics_of_episodes([rollout.facts(row)["episode"] for row in last.tolist()])
    return found


def _causes_of(rollout: Rollout, failed: np.ndarray) -> Counter[str]:
    """Of the rows `failed`, for how many each cause is one why a reward function gave nothing."""
    found: Counter[str] = Counter()
    for row in failed.tolist():
        causes = rollout.facts(row).get("causes", {})
        found.update(dict.fromkeys(causes.values(), 1))
    return found


def _metrics_of_episodes(episodes: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Turns of the policy, and failures by cause."""
    count = float(len(episodes))
    found = {"episodes/turns": (float(sum(one["turns"] for one in episodes)), count)}
    for cause, failures in Counter(one["cause"] for one in episodes if "cause" in one).items():
        found[f"episodes/failed/{cause}"] = float(failures), count
    return found


def passes_of(
    rollout: Rollout, rewards: np.ndarray, weights: np.ndarray, pass_reward: float, samples: int
) -> dict[str, tuple[float, float]]:
    """`pass@k` for the powers of two up to `samples`, and for these: a prompt counts where k of its completions have a reward.

    Args:
        rewards: `[rows, F]`, NaN where missing.
        weights: `[F]`.
        pass_reward: from which on a completion passes.
        samples: completions of each prompt.
    """
    last, _ = rollout.episodes()
    totals = weighted_rewards(torch.from_numpy(rewards[last]), torch.from_numpy(weights)).numpy()
    _, groups = np.unique(rollout.column("group")[last], return_inverse=True)
    drawn = np.bincount(groups, ~np.isnan(totals)).astype(int)
    passed = np.bincount(groups, totals >= pass_reward).astype(int)
    found, sizes = {}, {samples}
    sizes.update(2**power for power in range(samples.bit_length()))
    for k in sorted(sizes):
        chances = [pass_at_k(n, c, k) for n, c in zip(drawn.tolist(), passed.tolist(), strict=True) if n >= k]
        found[f"pass@{k}"] = math.fsum(chances), float(len(chances))
    return found


def pass_at_k(drawn: int, passed: int, k: int) -> float:
    """The chance that at least one of k completions passes, unbiased, of a prompt of which `passed` of `drawn` have.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    """
    return 1 - math.comb(drawn - passed, k) / math.comb(drawn, k)


def shown_of(
    rollout: Rollout, rewards: np.ndarray, weights: np.ndarray, count: int, text: Callable[[list[int]], Any]
) -> list[str]:
    """Lines with some completions, from the one with the highest reward to the lowest; those without one come last.

    Args:
        rewards: `[rows, F]`, NaN where missing.
        weights: `[F]`.
        count: how many.
        text: of ids.
    """
    totals = weighted_rewards(torch.from_numpy(rewards), torch.from_numpy(weights)).numpy()
    order = np.argsort(-totals, kind="stable")
    places = np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)
    lines = [f"rollout {rollout.name}: {len(places)} of {len(rollout)} completions, from the best to the worst"]
    for row in order[places].tolist():
        ids, trained = rollout.store["input_ids"][row], rollout.store["trained"][row]
        start = int(trained.argmax()) if trained.any() else len(ids)
        before, after = str(text(ids[:start].tolist())), str(text(ids[start:].tolist()))
        lines.append(f"  reward {totals[row]:.4g}: {before[-LONGEST_SHOWN:]!r} -> {after[:LONGEST_SHOWN]!r}")
    return lines
