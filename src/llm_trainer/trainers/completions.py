"""Completions as rows of a rollout, and what one watches of them."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from llm_trainer.config.reinforcement import GenerateConfig
from llm_trainer.data.rollouts import FINISHES, Prompt, Rollout, as_json
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.service import Completion
from llm_trainer.losses.advantages import level_share, weighted_rewards

Row = dict[str, np.ndarray]


class Written(NamedTuple):
    """A completion with its prompt.

    Attributes:
        prompt: what it continues.
        completion: as the service wrote it, or as it was given.
        reward: that was given with it; None: functions say it.
        attempt: how often its group had been drawn before.
    """

    prompt: Prompt
    completion: Completion
    reward: float | None = None
    attempt: int = 0


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


def given_with(prompt: Prompt) -> list[Written]:
    """The completions that came with a prompt."""
    written = []
    for given in prompt.given:
        ids = list(given["responses"])
        logprobs = given.get("old_logprobs")
        if not isinstance(logprobs, list):
            logprobs = [0.0] * len(ids)
        completion = Completion(ids, logprobs[: len(ids)], "stop", [(0, -1)])
        written.append(Written(prompt, completion, given.get("rewards")))
    return written


def row_of(one: Written, rewards: np.ndarray, errors: Mapping[str, str], keeps_cuts: bool) -> Row:
    """A row of a rollout (`data.rollouts.COLUMNS`).

    Args:
        rewards: `[F]`.
        errors: by reward function that has failed.
        keeps_cuts: it says what ids each token was drawn from, as `RolloutMaker` does.
    """
    prompt, completion = one.prompt, one.completion
    start = len(prompt.ids)
    ids = np.concatenate([prompt.ids, np.array(completion.ids, dtype=np.int64)])
    spans = [(start + first, version) for first, version in completion.versions]
    logprobs = np.zeros(len(ids), dtype=np.float32)
    logprobs[start:] = completion.logprobs
    row = {
        "input_ids": ids,
        "trained": np.arange(len(ids)) >= start,
        "group": np.array([prompt.number]),
        "sampled_logprobs": logprobs,
        "versions": np.array(spans).flatten(),
        "finish": np.array([FINISHES.index(completion.finish)]),
        "rewards": rewards,
        "facts": as_json(
            {"answer": prompt.answer, "columns": prompt.columns, "errors": errors, "attempt": one.attempt}
        ),
        "failed": np.array([bool(errors)], dtype=np.uint8),
    }
    if keeps_cuts:
        cuts = completion.kept or [[]] * len(completion.ids)
        counts = np.zeros(len(ids), dtype=np.int64)
        counts[start:] = [len(cut) for cut in cuts]
        row["kept_counts"] = counts
        row["kept"] = np.array(list(chain.from_iterable(cuts)), dtype=np.uint32)
    return row


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
    # 1. rewards, and their parts
    rows = len(rollout)
    totals = weighted_rewards(torch.from_numpy(rewards), torch.from_numpy(weights)).numpy()
    present = totals[~np.isnan(totals)]
    found = {"reward": (float(present.sum()), float(len(present)))}
    if len(present) > 1:
        found["reward_std"] = float(present.std(ddof=1)), 1.0
    for name, column in zip(names, rewards.T, strict=True):
        there = column[~np.isnan(column)]
        found[f"rewards/{name}"] = float(there.sum()), float(len(there))
    groups = torch.from_numpy(np.array(rollout.column("group")))
    found["frac_reward_zero_std"] = level_share(torch.from_numpy(totals), groups)
    found["rewards/failed"] = float((rollout.column("failed") != 0).sum()), float(rows)

    # 2. completions
    lengths = np.array([trained.sum() for trained in rollout.column("trained")])
    finish = rollout.column("finish")
    found["completions/mean_length"] = float(lengths.sum()), float(rows)
    found["completions/min_length"] = float(lengths.min(initial=10**9)), 1.0
    found["completions/max_length"] = float(lengths.max(initial=0)), 1.0
    found["completions/clipped_ratio"] = float((finish == FINISHES.index("length")).sum()), float(rows)
    found["completions/failed"] = float((finish >= FINISHES.index("aborted")).sum()), float(rows)
    return found
