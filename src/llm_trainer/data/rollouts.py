"""Rollouts: what a policy has written, as data on disk. Learning from one is a `SampleStream` over it.

A rollout is a token store (`data.encode.store`) with one row per completion. It is a function of the weights, the seed and
the prompts, and is found again by them. Whoever makes one is a `Maker`; `RolloutSource` asks it for rollouts, keeps them on
disk, and yields the optimizer steps that are taken on each.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from llm_trainer.data.collate import pad_right
from llm_trainer.data.encode.pictured import BYTES, IMAGE_COLUMNS, PLACE_SIZE, PLACES, REFS, refs_of
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.images import ImageRef
from llm_trainer.data.kinds import Batch, LanguageSample, Lay
from llm_trainer.data.packing import SharedPrompts, shared_prompts
from llm_trainer.data.rollout_prompts import Prompt
from llm_trainer.data.rollout_store import Row
from llm_trainer.data.shown import Images

FINISHES = ("stop", "length", "aborted", "error")  # how a completion ended: it is done, was cut, given up, has failed
# Columns of every rollout. One number per token of prompt AND completion where it says `[T]`, aligned like labels: the
# number at t is about the token AT t, and 0 where the policy did not write it.
COLUMNS: dict[str, type] = {
    "input_ids": np.uint32,  # [T]
    "trained": np.bool_,  # [T] the policy wrote it, and it may be learned from
    "group": np.int64,  # [1] number of the prompt in the rollout
    "sampled_logprobs": np.float32,  # [T] under the distribution that the token was drawn from; NaN: nobody knows
    "versions": np.int64,  # [2k] spans: first token, version of the weights that wrote from there on
    "finish": np.uint8,  # [1] index into FINISHES
    "rewards": np.float64,  # [F] one per reward function; NaN: it is missing, or does not apply
    "facts": np.uint8,  # the bytes of a JSON text: answer, the prompt's other columns, errors by reward function
}
GREEDY = "greedy"  # [1] 1: the likeliest completion of the prompt, to compare the others with; where a run draws such
TOKEN_REWARDS = (
    "token_rewards"  # [T], or empty: what tokens have earned themselves, NaN where nothing; functions weighted
)
BY_TOKEN = "by_token"  # [F] 1: that reward is the sum of what tokens have earned
STEP_REWARDS = (
    "step_rewards"  # [T] what a reward model gave at the last tokens of steps, NaN elsewhere; where it judges steps
)
JUDGED = "model_reward"  # [1] what a reward model gave; of steps their mean
LEFT_OUT = "left_out"  # [1] 0: learned from; else why not, as `meta.json` numbers the reasons
EPISODE = "episode"  # [1] where conversations have several turns: its number in the group, the same for all of its rows
PER_ROW = ("group", "row_index", "finish", "rewards", GREEDY, LEFT_OUT, EPISODE)
REDRAWN = "redrawn"  # [1] tokens of completions that were drawn in this one's place before, and are not there any more
# Why rows are dropped.
NOTHING_WRITTEN, FAILED, NO_REWARD = "nothing was written", "the completion failed", "no reward"
LEVEL = "all rewards of its group are equal"
DRAWN_AGAIN = "its group was drawn again"
NOT_IN_BATCHES = (
    "input_ids",
    "trained",
    "versions",
    "facts",
    GREEDY,
    LEFT_OUT,
    REDRAWN,
    TOKEN_REWARDS,
    BY_TOKEN,
    STEP_REWARDS,
)


def as_json(facts: Mapping[str, Any]) -> np.ndarray:
    """What the column `facts` holds; what JSON has no form for becomes text."""
    text = json.dumps(facts, ensure_ascii=False, default=str)
    return np.frombuffer(text.encode(), dtype=np.uint8)


def sum_of_known(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two arrays; where one of them is NaN, the other."""
    return np.where(np.isnan(one), other, one + np.nan_to_num(other))


class RolloutRow(dict[str, np.ndarray]):
    """A row of a rollout: its arrays by column.

    Attributes:
        per_token: names of the columns that have a number per token in every row of the rollout.
        images: that its prompt shows, in the order of their placeholders.
        place: where it comes from, for messages about these.
    """

    per_token: frozenset[str]
    images: Sequence[ImageRef] = ()
    place = "a completion"


class Rollout:
    """A rollout on disk, one row per completion: a `SampleDataset`.

    Args:
        folder: of the store.
        meta: its facts, while it is not finished.

    Attributes:
        lengths: `[rows]` tokens of prompt and completion.
        tower_tokens: `[rows]` patches that the tower sees of the images of each; None: nothing is shown.
        costs: `[rows]` what each row takes of a token budget.
        used: `[rows that are learned from]` their numbers.
        after: position of the prompts behind it.
    """

    def __init__(self, folder: Path, meta: dict[str, Any] | None = None) -> None:
        self.store = TokenStore(folder, meta)
        self.lengths: np.ndarray = np.diff(self.store["input_ids"].offsets)
        shown = Images.of(self.store, 0)
        self.tower_tokens = None if shown is None else shown.per_row(weights=shown.towers)
        self.costs = self.lengths if self.tower_tokens is None else self.lengths + self.tower_tokens
        if shown is not None:
            groups = self.column("group")
            _, first, group = np.unique(groups, return_index=True, return_inverse=True)
            self._first_of_group = first[group]
        self.file_sizes = [len(self.lengths)]
        self.after: int = self.store.meta.get("after", 0)
        reasons = self.store.meta.get("reasons", [])
        left_out = np.zeros(len(self), dtype=np.uint8)
        if LEFT_OUT in self.store.columns:
            left_out = self.column(LEFT_OUT)
        masking = [number for number, (how, _) in enumerate(reasons, start=1) if how == "masked"]
        self.is_masked = np.isin(left_out, masking)
        offsets = self.store["input_ids"].offsets
        per_token = [name for name, column in self.store.columns.items() if np.array_equal(column.offsets, offsets)]
        self._per_token = frozenset(per_token).difference(PER_ROW)
        self.used: np.ndarray = np.flatnonzero((left_out == 0) | self.is_masked)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> RolloutRow:
        """Row `index`, counted over all rows, as its arrays by column; `trained` without what is masked."""
        columns = [name for name in self.store.columns if name not in IMAGE_COLUMNS]
        row = RolloutRow((name, self.store[name][index]) for name in columns)
        row.per_token = self._per_token
        if self.tower_tokens is not None:
            row.images, row.place = self.images(index), self.place(index)
        row["row_index"] = np.array([index])
        if self.is_masked[index]:
            row["trained"] = np.zeros_like(row["trained"])
        return row

    def column(self, name: str) -> Any:
        """The whole of a column: `[rows]` or `[rows, F]` of what there is once per row, else `column[i]` is row i's array."""
        ragged = self.store[name]
        widths = set(np.diff(ragged.offsets).tolist())
        if name not in PER_ROW and widths != {1}:
            return ragged
        values = np.asarray(ragged.values).reshape(len(self), -1)
        return values[:, 0] if name != "rewards" else values

    def episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """`[E]` the last row of each episode, and `[rows]` whose row each is; where there are none, every row is one."""
        if EPISODE not in self.store.columns:
            return np.arange(len(self)), np.arange(len(self))
        own = self.column(EPISODE)
        keys = self.column("group") * (own.max(initial=0) + 1) + own
        _, behind, of_row = np.unique(keys[::-1], return_index=True, return_inverse=True)
        last = len(keys) - 1 - behind
        order = last.argsort()  # in that of the rows
        return last[order], order.argsort()[of_row[::-1]]

    @property
    def is_greedy(self) -> np.ndarray:
        """`[rows]` bool: completions that are there to compare others with, and are not learned from."""
        return self.column(GREEDY) != 0 if GREEDY in self.store.columns else np.zeros(len(self), dtype=bool)

    def step_rewards(self, judged: Mapping[str, Any] | None = None) -> Sequence[np.ndarray] | None:
        """What a reward model gave for steps, `[T]` of each row, NaN where none ends; None: there is no such model.

        Args:
            judged: further columns of a rollout that is not finished.
        """
        if judged is not None and STEP_REWARDS in judged:
            of_steps: Sequence[np.ndarray] = judged[STEP_REWARDS]
            return of_steps
        if STEP_REWARDS not in self.store.columns:
            return None
        return [np.asarray(self.store[STEP_REWARDS][row]) for row in range(len(self))]

    def token_rewards(self, judged: Mapping[str, Any] | None = None) -> tuple[list[np.ndarray], np.ndarray] | None:
        """What tokens have earned themselves, `[T]` of each row, NaN where nothing; and `[rows, F]` bool, of which functions'
        rewards that is a part. None: nobody has judged tokens.

        Args:
            judged: as in `step_rewards`, which are among them.
        """
        of_steps = self.step_rewards(judged)
        of_functions = TOKEN_REWARDS in self.store.columns and len(self.store[TOKEN_REWARDS].values) > 0
        if of_steps is None and not of_functions:
            return None
        found = []
        by_token: np.ndarray = np.zeros((len(self), 0), dtype=bool)
        if of_functions:
            by_token = np.asarray(self.store[BY_TOKEN].values).reshape(len(self), -1) != 0
        for row, length in enumerate(self.lengths.tolist()):
            values: np.ndarray = np.full(length, np.nan)
            if of_functions and len(self.store[TOKEN_REWARDS][row]):
                values = np.asarray(self.store[TOKEN_REWARDS][row])
            if of_steps is not None:
                values = sum_of_known(values, of_steps[row])
            found.append(values)
        return found, by_token

    @property
    def is_of_training(self) -> bool:
        """Whether it is learned from; else it is an evaluation's."""
        return bool(self.store.meta.get("made_of", {}).get("training", True))

    def images(self, index: int) -> list[ImageRef]:
        """What the prompt of a row shows, in the order of its placeholders.

        Bytes that are in no file are kept once, by the first row of a group.
        """
        if self.tower_tokens is None:
            return []
        known = refs_of(self.store[REFS][index], self.store[BYTES][self._first_of_group[index]])
        uses = self.store[PLACES][index].reshape(-1, PLACE_SIZE)[:, 1]
        return [known[which] for which in uses.tolist()]

    def facts(self, index: int) -> dict[str, Any]:
        """What else is known of a row: `answer`, the prompt's other columns, errors by reward function."""
        return json.loads(self.store["facts"][index].tobytes())

    def place(self, index: int) -> str:
        """Where a row comes from, for messages."""
        return f"completion {index} of rollout {self.name}"

    @property
    def name(self) -> str:
        """Its number, for messages: the folder's name, also while that is still written."""
        return self.store.folder.name.partition(".")[0]

    @property
    def ledger(self) -> dict[str, Any]:
        """Where every token went that was sampled: `sampled` = `trained` + `environment` + `masked` + `dropped`."""
        return self.store.meta["ledger"]


class Used:
    """The rows of a rollout that are learned from."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self.lengths, self.costs = rollout.lengths[rollout.used], rollout.costs[rollout.used]
        self.file_sizes = [len(self.lengths)]

    def __getitem__(self, index: int) -> RolloutRow:
        return self._rollout[int(self._rollout.used[index])]

    def shared(self) -> SharedPrompts:
        """What the rows of each group begin with, the tokens before their completions."""
        rollout = self._rollout
        ids, labels = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=bool)]
        for row in rollout.used.tolist():
            ids.append(rollout.store["input_ids"][row])
            labels.append(rollout.store["trained"][row] & ~rollout.is_masked[row])
        groups = rollout.column("group")[rollout.used]
        found = shared_prompts(np.concatenate(ids), np.concatenate(labels), self.lengths, groups)
        if rollout.tower_tokens is None:
            return found
        of_images = np.where(found.tokens > 0, rollout.tower_tokens[rollout.used], 0)  # the same in all of a group
        return found._replace(tokens=found.tokens + of_images)

    def place(self, index: int) -> str:
        return self._rollout.place(int(self._rollout.used[index]))


def collate_rollout(rows: Sequence[RolloutRow], lay: Lay) -> Batch:
    """A micro-batch of rows of a rollout, laid out as language rows are.

    Args:
        rows: as `Rollout` gives them.
        lay: `collate_flat`, or `collate_padded` with its pad_id; around it `lay_with_images` where rows show some.

    Returns:
        `input_ids`, `labels` (the ids where trained, else -100) and what else `lay` gives, padded `[B, T]` or flat
        `[1, N]`; every column with a number per token under its own name in the same layout, 0 on padding; `group [B]`,
        `row_index [B]`, `finish [B]`, `rewards [B, F]` and other columns with as many numbers in every row; further ones as
        lists of B tensors.
    """
    samples = []
    for row in rows:
        ids = row["input_ids"]
        sample = LanguageSample(input_ids=ids, trained=row["trained"], document_lengths=[len(ids)])
        if row.images:
            sample["images"], sample["place"] = row.images, row.place
        samples.append(sample)
    batch: Batch = dict(lay(samples))
    is_flat = "document_lengths" in batch
    for name in rows[0]:
        if name in NOT_IN_BATCHES:
            continue
        values = [row[name] for row in rows]
        if name not in rows[0].per_token:
            batch[name] = _per_row(values)
        elif is_flat:
            batch[name] = torch.from_numpy(np.concatenate(values))[None]
        else:
            batch[name] = pad_right(values, 0, values[0].dtype.type)
    return batch


def _per_row(values: Sequence[np.ndarray]) -> Any:
    if len({len(value) for value in values}) > 1:
        return [torch.from_numpy(np.array(value)) for value in values]
    table = torch.from_numpy(np.stack(values))
    return table[:, 0] if table.shape[1] == 1 and values[0].dtype != np.float64 else table


class Finished(NamedTuple):
    """What `Maker.finish` adds to a rollout.

    Attributes:
        columns: name -> an array per row, `[T]` (one number per token) or of another length: `advantages`, `old_logprobs`.
        masked: reason -> `[rows]` bool: rows of which no token counts in the loss, but which are there as rows.
        dropped: reason -> `[rows]` bool: rows that no update sees. A row that is named twice is left out for the first
            reason.
    """

    columns: Mapping[str, Sequence[np.ndarray]]
    masked: Mapping[str, np.ndarray] = {}
    dropped: Mapping[str, np.ndarray] = {}


@dataclass(frozen=True)
class Plan:
    """What rollout is to be made.

    Attributes:
        number: of the rollout, counted over the run; of an evaluation, within it.
        seed: all its noise follows from it, and from the prompt's number, the sample's and the token's.
        version: of the weights: optimizer steps done.
        training: False: for an evaluation.
        stop: whether any process has been asked to stop; to be asked at every token.
        seconds: by phase, see `timed`.
    """

    number: int
    seed: int
    version: int
    training: bool
    stop: Callable[[], bool]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count the seconds of the block as those of 'generate', 'reward', 'score', 'sync', ...: logged `seconds/<phase>`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - began


class Maker(Protocol):
    """What makes rollouts: `trainers/rollouts.py`.

    `make` may be called in a thread, while the main one learns from the rollout before: it draws from no generator of random
    numbers but its own, counts its seconds in the plan, and waits for no other process.

    Attributes:
        updates_in_flight: whether `begin` may be called meanwhile: what is being sampled goes on with the weights of then, and
            says so in `versions`.
    """

    @property
    def updates_in_flight(self) -> bool: ...

    def settings(self, training: bool) -> Mapping[str, Any]:
        """What a rollout depends on beside weights, seed and prompts, in JSON types: how completions are drawn, rewards."""

    def begin(self, plan: Plan) -> None:
        """All processes, before parts are made: bring the weights to whatever samples."""

    def make(self, plan: Plan, prompts: Sequence[Prompt]) -> Sequence[Row] | None:
        """The rows of some consecutive prompts, a part; called in one process, with other parts in others.

        They depend on nothing but weights, `plan.seed` and prompts. None: `plan.stop` has said so.
        """

    def finish(self, rollout: Rollout) -> Finished:
        """All processes, when all parts are there: further columns (a scoring pass, advantages); all get the same."""

    def metrics(self, rollout: Rollout) -> Mapping[str, tuple[float, float]]:
        """Name -> (sum, number of terms) of what is to be logged of a rollout, when learning from it begins."""


def checked(row: Row) -> Row:
    """A row with its columns in their types.

    Raises:
        ValueError: a column is missing, or has not a number per token.
    """
    length = len(row["input_ids"])
    for name in COLUMNS:
        found = len(row[name]) if name in row else None
        if found is None or (name in ("trained", "sampled_logprobs") and found != length):
            raise ValueError(
                f"a completion of {length} tokens, prompt included: column {name} is {found} long; expected every column of "
                f"COLUMNS, and {length} numbers in those per token"
            )
    return {name: np.asarray(values, dtype=COLUMNS.get(name)) for name, values in row.items()}


def num_sampled(length: int, versions: np.ndarray) -> int:
    """Tokens of a row from the first one on that a policy wrote: what an environment said in between is among them."""
    return int(length - versions[0]) if len(versions) else 0


def account(rollout: Rollout, finished: Finished) -> tuple[list[tuple[str, str]], np.ndarray, dict[str, Any]]:
    """Why rows are left out, `[rows]` the number of the reason (from 1; 0: none), and the ledger of all tokens.

    Raises:
        ValueError: a column is not one array per row.
    """
    rows = len(rollout)
    for name, values in finished.columns.items():
        if len(values) != rows:
            raise ValueError(f"column {name} of a rollout: found {len(values)} arrays, expected {rows}, one per row")
    # 1. tokens by row: sampled from the first one on that the policy wrote, of which those of an environment are not its own
    trained, sampled = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.int64)
    for row in range(rows):
        trained[row] = rollout.store["trained"][row].sum()
        spans = rollout.store["versions"][row]
        sampled[row] = num_sampled(rollout.lengths[row], spans)
    # 2. the first reason of each row
    finish = rollout.column("finish")
    dropped = {FAILED: finish >= FINISHES.index("aborted"), NOTHING_WRITTEN: trained == 0, **finished.dropped}
    reasons = [("dropped", why) for why in dropped] + [("masked", why) for why in finished.masked]
    left_out = np.zeros(rows, dtype=np.uint8)
    for number, is_so in enumerate([*dropped.values(), *finished.masked.values()], start=1):
        left_out[(left_out == 0) & np.asarray(is_so, dtype=bool)] = number
    # 3. where the tokens are
    used = left_out == 0
    ledger: dict[str, Any] = {
        "rows": rows,
        "sampled": int(sampled.sum()),
        "trained": int(trained[used].sum()),
        "environment": int((sampled - trained)[used].sum()),
        "masked": {},
        "dropped": {},
    }
    for number, (how, why) in enumerate(reasons, start=1):
        if (left_out == number).any():
            ledger[how][why] = int(sampled[left_out == number].sum())
    if REDRAWN in rollout.store.columns and rollout.column(REDRAWN).any():
        ledger["dropped"][DRAWN_AGAIN] = int(rollout.column(REDRAWN).sum())
        ledger["sampled"] += ledger["dropped"][DRAWN_AGAIN]
    everything = (
        ledger["trained"] + ledger["environment"] + sum(ledger["masked"].values()) + sum(ledger["dropped"].values())
    )
    assert everything == ledger["sampled"], ledger
    return reasons, left_out, ledger
