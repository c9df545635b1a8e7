"""Answers that are compared or judged: files -> token stores -> rows -> batches, with a ledger that balances.

A row is a pair (`chosen`, `rejected`) or a single answer (`desirable` or not), each stored with its prompt, as whole
conversations in which only the answer is trained on.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NotRequired, TypedDict

import numpy as np
import torch

from llm_trainer.data.collate import LanguageSample
from llm_trainer.data.datasets import EMPTY_AFTER_CUT, TOO_LONG, Joined, note_dropped
from llm_trainer.data.encode.chat import ChatFormat, ChatTemplateError, spans_from_ids
from llm_trainer.data.encode.store import Part, Ragged, TokenStore, build_store
from llm_trainer.data.ledger import Ledger
from llm_trainer.data.prepare import DataOptions, Located, RowEncoder, cache_key, check_ids, files_of, store_of
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.files import TOKEN_SUFFIXES, TokenFile, open_tokens
from llm_trainer.data.read.messages import Message

SIDES = ("chosen", "rejected")
NumShared = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], int]
EQUAL_AFTER_CUT = "both answers equal after truncation"
Batch = dict[str, torch.Tensor]


class PairSample(TypedDict):
    """One pair; `margin` is by how much the chosen answer is better (0: not stated), `ref_logps` `[2]` the sums under
    the reference model of chosen and rejected."""

    chosen: LanguageSample
    rejected: LanguageSample
    margin: float
    ref_logps: NotRequired[np.ndarray]


class UnpairedSample(TypedDict):
    """One answer; `mismatched` is its prompt with the answer to another prompt (for KTO's KL)."""

    row: LanguageSample
    mismatched: LanguageSample
    desirable: bool


# --- samples -> store columns


def _conversation(prompt: list[Message], answer: list[Message]) -> list[Message]:
    return [*({**turn, "loss_weight": 0.0} for turn in prompt), *answer]  # type: ignore[list-item]


class PairEncoder(RowEncoder):
    """Preference rows -> both conversations, each up to its last trained token."""

    columns: ClassVar[tuple[str, ...]] = ("chosen", "chosen_trained", "rejected", "rejected_trained", "margin")

    def _add(self, kind: str, samples: list[Located], part: Part) -> None:
        def sides(sample: dict[str, Any]) -> list[list[Message]]:
            return [_conversation(sample["prompt"], sample[side]) for side in SIDES]

        for sample, encoded in self.encode_groups(samples, sides, part):
            empty = [side for side, one in zip(SIDES, encoded, strict=True) if not any(one.trained[1:])]
            if empty:
                part.dropped[f"empty_{empty[0]}"] += 1
                continue
            for side, one in zip(SIDES, encoded, strict=True):
                _append(part, side, f"{side}_trained", self.ids(one.input_ids), one.trained)
            part.columns["margin"].append(np.array([sample["margin"] or 0.0], dtype=np.float32))


class UnpairedEncoder(RowEncoder):
    """Judged answers -> their conversations; of a pair, the chosen answer is good and the rejected one bad."""

    columns: ClassVar[tuple[str, ...]] = ("input_ids", "trained", "desirable")

    def _add(self, kind: str, samples: list[Located], part: Part) -> None:
        def answers(sample: dict[str, Any]) -> list[list[Message]]:
            keys = SIDES if kind == "preference" else ("completion",)
            return [_conversation(sample["prompt"], sample[key]) for key in keys]

        for sample, encoded in self.encode_groups(samples, answers, part):
            labels = (True, False) if kind == "preference" else (sample["label"],)
            for label, one in zip(labels, encoded, strict=True):
                if any(one.trained[1:]):
                    _append(part, "input_ids", "trained", self.ids(one.input_ids), one.trained)
                    part.columns["desirable"].append(np.array([label], dtype=np.uint8))
                else:
                    part.dropped["empty_completion"] += 1


def _append(part: Part, ids_name: str, trained_name: str, ids: np.ndarray, mask: Sequence[bool]) -> None:
    """Append a conversation without what follows its last trained token, from which nothing is learnt."""
    trained = np.asarray(mask, dtype=np.uint8)
    stop = int(trained.nonzero()[0][-1]) + 1
    part.columns[ids_name].append(ids[:stop])
    part.columns[trained_name].append(trained[:stop])


class _TokenPairs:
    """Pairs that are token ids already: the last answer of both conversations is found from the ids."""

    def __init__(self, chat: ChatFormat, bad_rows: str) -> None:
        self.chat, self.bad_rows = replace(chat, train_on="last"), bad_rows

    def __call__(self, rows: list[tuple[Location, dict[str, np.ndarray]]]) -> Part:
        part = Part({name: [] for name in PairEncoder.columns})
        for location, row in rows:
            try:
                trained = {side: spans_from_ids(row[side].tolist(), self.chat) for side in SIDES}
            except ChatTemplateError as error:
                if self.bad_rows == "drop":
                    part.dropped["no answer found in the ids"] += 1
                    continue
                raise DataError(location, str(error), "conversations in the chat template", "store text") from error
            empty = [f"empty_{side}" for side in SIDES if not any(trained[side][1:])]
            if empty or np.array_equal(row["chosen"], row["rejected"]):
                part.dropped[(empty or ["identical"])[0]] += 1
                continue
            for side in SIDES:
                _append(part, side, f"{side}_trained", row[side].astype(np.uint32), trained[side])
            part.columns["margin"].append(np.zeros(1, dtype=np.float32))
        return part


# --- store columns -> rows


class Column:
    """Conversations of a store and the window `[starts, stops)` of each that is used."""

    def __init__(self, ids: Ragged, trained: Ragged, max_length: int | None, truncation: str) -> None:
        self.ids, self.trained = ids, trained
        offsets = np.asarray(ids.offsets)
        self.starts, self.stops = offsets[:-1].copy(), offsets[1:].copy()
        self.full = self.stops - self.starts
        self.rows = np.arange(len(ids))  # of the store
        self.too_long = self.full > max_length if max_length is not None else np.zeros(len(ids), dtype=bool)
        if max_length is not None and truncation == "keep_end":
            self.starts[self.too_long] = self.stops[self.too_long] - max_length
        elif max_length is not None and truncation == "keep_start":
            self.stops[self.too_long] = self.starts[self.too_long] + max_length
        windows = zip((self.starts + 1).tolist(), self.stops.tolist(), strict=True)  # nothing predicts a first token
        self.counts = np.array([np.count_nonzero(trained.values[a:b]) for a, b in windows], dtype=np.int64)

    def select(self, keep: np.ndarray) -> None:
        """Keep the rows where `keep [rows]` is True."""
        self.rows, self.starts, self.stops = self.rows[keep], self.starts[keep], self.stops[keep]
        self.counts = self.counts[keep]

    @property
    def lengths(self) -> np.ndarray:
        """`[rows]` tokens that are used."""
        return self.stops - self.starts

    def tokens(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids `[T]` of a row, and which of them are trained on."""
        where = slice(int(self.starts[row]), int(self.stops[row]))
        return self.ids.values[where], self.trained.values[where] != 0

    def sample(self, row: int) -> LanguageSample:
        """A row as language data."""
        ids, trained = self.tokens(row)
        return LanguageSample(input_ids=ids, trained=trained, document_lengths=[len(ids)])


def enter(ledger: Ledger, columns: Sequence[Column], extra_drop: np.ndarray, reason: str, how: DataOptions) -> None:
    """Leave out rows that cannot be used, and account for every token of all `columns`.

    Raises:
        DataError: no row is left, or one is too long and `how.truncation` is 'error'.
    """
    too_long = np.any([column.too_long for column in columns], axis=0)
    full = np.sum([column.full for column in columns], axis=0)
    if too_long.any() and how.truncation == "error":
        row = int(too_long.argmax())
        raise DataError(
            Location(ledger.name, row + 1),
            f"{max(int(column.full[row]) for column in columns):,} tokens",
            f"at most {how.block_size:,}, the context",
            "raise dataset_block_size, or set data_loader_config.truncation to keep_start, keep_end or drop",
        )
    dropped = too_long if how.truncation == "drop" else np.zeros(len(full), dtype=bool)
    empty = np.any([column.counts == 0 for column in columns], axis=0)
    keep = ~dropped
    for mask, why in ((dropped, TOO_LONG), (keep & empty, EMPTY_AFTER_CUT), (keep & ~empty & extra_drop, reason)):
        if mask.any():
            ledger.drop(why, int(full[mask].sum()), int(mask.sum()))
            keep = keep & ~mask
    for column in columns:
        column.select(keep)
    lengths = sum(int(column.lengths.sum()) for column in columns)
    trained = sum(int(column.counts.sum()) for column in columns)
    ledger.rows = int(keep.sum())
    ledger.read += int(full[keep].sum())
    ledger.trained, ledger.context = trained, lengths - trained
    ledger.truncated = int(full[keep].sum()) - lengths
    ledger.truncated_rows = int((too_long & keep).sum())
    ledger.dropped_rows = +ledger.dropped_rows
    ledger.check()
    if not ledger.rows:
        found = f"no row to train on ({'; '.join(ledger.lines()[1:]) or 'an empty file'})"
        fix = "`llm-trainer data check FILE` shows what each row holds; a longer dataset_block_size keeps more of it"
        raise DataError(Location(ledger.name), found, "rows with answers that fit", fix)


class PairRows:
    """The pairs of a store, each side at most `how.block_size` tokens, cut at the end that `how.truncation` names.

    A pair with a side that has no token left to learn from, or with equal sides, is never used.

    Args:
        store: columns of `PairEncoder`.
        name: the file, for messages.
        how: context, truncation and packing.
        num_shared: ids of chosen and rejected, and which of the latter's are trained on -> the first tokens that are run
            once for both. None: all are run twice.

    Attributes:
        lengths: `[rows]` tokens of a pair as a token budget counts them: of both sides, or of two padded rows.
        ref_logps: `[rows, 2]` summed log-probs of chosen and rejected under the reference model, once they are known.
    """

    def __init__(self, store: TokenStore, name: str, how: DataOptions, num_shared: NumShared | None = None) -> None:
        self.store, self.how, self.ledger = store, how, Ledger(name=name)
        note_dropped(self.ledger, store)
        self.sides = [Column(store[s], store[f"{s}_trained"], how.block_size, how.truncation) for s in SIDES]
        cut = np.any([side.too_long for side in self.sides], axis=0).nonzero()[0].tolist()
        equal = np.zeros(len(store), dtype=bool)
        equal[[row for row in cut if np.array_equal(self.sides[0].tokens(row)[0], self.sides[1].tokens(row)[0])]] = True
        self.margins = np.asarray(store["margin"].values)
        enter(self.ledger, self.sides, equal, EQUAL_AFTER_CUT, how)
        chosen, rejected = (side.lengths for side in self.sides)
        self.lengths = chosen + rejected if how.packing == "flat" else 2 * np.maximum(chosen, rejected)
        if num_shared is not None:
            self.lengths = chosen + rejected - [num_shared(*self._tensors(row)) for row in range(len(chosen))]
        self.file_sizes = [len(self.lengths)]
        self.ref_logps: np.ndarray | None = None

    def _tensors(self, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        (chosen, _), (rejected, trained) = (side.tokens(row) for side in self.sides)
        ids = [torch.from_numpy(side.astype(np.int64)) for side in (chosen, rejected)]
        return ids[0], ids[1], torch.from_numpy(trained)

    def __getitem__(self, index: int) -> PairSample:
        chosen, rejected = (side.sample(index) for side in self.sides)
        margin = float(self.margins[self.sides[0].rows[index]])
        sample = PairSample(chosen=chosen, rejected=rejected, margin=margin)
        return sample if self.ref_logps is None else sample | {"ref_logps": self.ref_logps[index]}


class UnpairedRows:
    """The judged answers of a store, at most `how.block_size` tokens each.

    Args:
        store: columns of `UnpairedEncoder`.
        name: the file, for messages.
        how: context and truncation.
        pair_up: `[rows]` prompt numbers -> for each prompt the row whose answer it is mismatched with. It is asked once
            for the whole file, so a mismatched pair depends neither on the sampler nor on how a step is cut.
    """

    def __init__(
        self, store: TokenStore, name: str, how: DataOptions, pair_up: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.ledger, self.how = Ledger(name=name), how
        note_dropped(self.ledger, store)
        self.answers = Column(store["input_ids"], store["trained"], how.block_size, how.truncation)
        enter(self.ledger, [self.answers], np.zeros(len(store), dtype=bool), "", how)
        self.desirable = np.asarray(store["desirable"].values) != 0
        self.lengths = self.answers.lengths
        self.file_sizes = [len(self.lengths)]
        numbers: dict[bytes, int] = {}
        prompts = [numbers.setdefault(self._halves(row)[0].tobytes(), row) for row in range(len(self.lengths))]
        if len(prompts) < 2:
            raise DataError(
                Location(name), "one answer", "at least two, to pair prompts with others' answers", "add rows"
            )
        self.partners = pair_up(torch.tensor(prompts)).numpy()

    def _halves(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the prompt and of what follows it."""
        ids, trained = self.answers.tokens(row)
        first = int(trained.argmax())
        return ids[:first], ids[first:]

    def _mismatched(self, row: int) -> LanguageSample:
        partner = int(self.partners[row])
        prompt, answer = self._halves(row)[0], self._halves(partner)[1]
        trained = np.concatenate([np.zeros(len(prompt), dtype=bool), self.answers.tokens(partner)[1][-len(answer) :]])
        ids, limit = np.concatenate([prompt, answer]), self.how.block_size
        if limit is not None and len(ids) > limit:
            kept = slice(-limit, None) if self.how.truncation == "keep_end" else slice(limit)
            ids, trained = ids[kept], trained[kept]
        return LanguageSample(input_ids=ids, trained=trained, document_lengths=[len(ids)])

    def __getitem__(self, index: int) -> UnpairedSample:
        desirable = bool(self.desirable[self.answers.rows[index]])
        return UnpairedSample(row=self.answers.sample(index), mismatched=self._mismatched(index), desirable=desirable)


# --- rows -> batches

Collate = Callable[[Sequence[LanguageSample]], Any]


def collate_pairs(samples: Sequence[PairSample], collate: Collate) -> Batch:
    """Pairs as language rows by `collate`, all chosen before all rejected; `margin [B]`, and `ref_*_logps [B]`."""
    batch = dict(collate([s["chosen"] for s in samples] + [s["rejected"] for s in samples]))
    batch["margin"] = torch.tensor([s["margin"] for s in samples])
    if all("ref_logps" in s for s in samples):
        table = torch.from_numpy(np.stack([s["ref_logps"] for s in samples]))
        batch |= {"ref_chosen_logps": table[:, 0], "ref_rejected_logps": table[:, 1]}
    return batch


def collate_unpaired(samples: Sequence[UnpairedSample], collate: Collate) -> Batch:
    """Answers as language rows by `collate`, `desirable [B]`, and the mismatched rows under keys that start `kl_`."""
    mismatched = collate([s["mismatched"] for s in samples])
    batch = dict(collate([s["row"] for s in samples])) | {f"kl_{name}": value for name, value in mismatched.items()}
    return batch | {"desirable": torch.tensor([s["desirable"] for s in samples])}


# --- files -> rows


def _token_rows(tokens: TokenFile) -> Iterator[tuple[Location, dict[str, np.ndarray]]]:
    for i in range(len(tokens)):
        yield Location(tokens.path, i + 1), tokens[i]


def _token_store(path: Path, chat: ChatFormat, how: DataOptions, cache: Path) -> TokenStore:
    tokens = open_tokens(path)
    check_ids(tokens, len(chat.tokenizer))
    if tokens.kind != "preference" or how.stage != "preference":
        found = f"token rows of kind '{tokens.kind}'"
        fix = "store judged answers as text" if how.stage == "unpaired" else "use the matching trainer"
        raise DataError(Location(path), found, f"text, or pairs of ids for pairs, here for {how.stage}", fix)
    folder = cache / f"{path.stem}-{cache_key(path, ['tokens', how.stage, how.bad_rows], chat)}"
    encode, meta = _TokenPairs(chat, how.bad_rows), {"source": str(path)}
    return build_store(folder, _token_rows(tokens), encode, PairEncoder.columns, meta=meta)


def load_answers(
    paths: Iterable[str],
    chat: ChatFormat,
    how: DataOptions,
    cache: Path,
    pair_up: Callable[[torch.Tensor], torch.Tensor],
    num_shared: NumShared | None = None,
) -> Joined:
    """All files as one dataset of pairs (`how.stage` 'preference') or judged answers ('unpaired'), in the order given.

    Args:
        paths: files or folders.
        chat: how conversations become ids.
        how: stage, schema, context, packing and truncation.
        cache: folder of the token stores.
        pair_up: see `UnpairedRows`.
        num_shared: see `PairRows`.

    Raises:
        DataError: a file, a row, or what is asked of them cannot be used; the message says where and how to mend it.
        ValueError: a packing was asked for that puts several pairs into one row.
    """

    def rows_of(path: Path) -> PairRows | UnpairedRows:
        if path.suffix in TOKEN_SUFFIXES:
            store = _token_store(path, chat, how, cache)
        else:
            store = store_of(path, chat, how, cache, PairEncoder if how.stage == "preference" else UnpairedEncoder)
        if how.stage == "preference":
            return PairRows(store, str(path), how, num_shared)
        return UnpairedRows(store, str(path), how, pair_up)

    return join_files(paths, how, rows_of)


def join_files(paths: Iterable[str], how: DataOptions, rows_of: Callable[[Path], Any]) -> Joined:
    """The rows of all files as one dataset.

    Raises:
        ValueError: there is no file, or a packing was asked for that puts several answers into one row.
    """
    if how.packing not in ("none", "flat"):
        raise ValueError(f"data_loader_config.packing: got {how.packing!r}, expected 'none' or 'flat' for answers")
    parts = [rows_of(path) for given in paths for path in files_of(Path(given))]
    if not parts:
        raise ValueError("file_dataset: no file was given, expected at least one path")
    return Joined(parts)
