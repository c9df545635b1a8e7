"""Answers that are judged step by step, for process reward models: files -> token store -> rows -> batches."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import ClassVar, TypedDict

import numpy as np
import torch

from llm_trainer.data.collate import IGNORE, LanguageSample
from llm_trainer.data.datasets import Joined, note_dropped
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.store import Part, TokenStore
from llm_trainer.data.encode.templates import ChatTemplateError, Rendered
from llm_trainer.data.encode.tokenizer import TextEncoder
from llm_trainer.data.ledger import Ledger
from llm_trainer.data.pairs import Batch, Collate, Column, enter, join_files
from llm_trainer.data.prepare import ROWS_LOOKED_AT, DataOptions, Located, RowEncoder, store_of
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.files import TOKEN_SUFFIXES, read_rows
from llm_trainer.data.read.messages import Message
from llm_trainer.data.read.schemas import get_schema, recognise

SEPARATOR = "\n"  # ends every step; its last token is where the step is judged


class StepSample(TypedDict):
    """One answer; `right [T]` is how right each step is, read where `row["trained"]`, at the steps' last tokens."""

    row: LanguageSample
    right: np.ndarray


class StepFormat:
    """A prompt in the chat template and the steps of its answer, each tokenised by itself, as ids."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.chat.tokenizer)

    def encode(self, prompt: Sequence[Message], steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids `[T]`, and the position of each step's last token."""
        texts = [step + SEPARATOR for step in steps]
        ids, ends = self.chat.encode_prompt(prompt), list[int]()
        special = self._encoder.special if not self.chat.parse_special_tokens else None
        literals = [frozenset(m.start() for m in special.finditer(text)) if special else frozenset() for text in texts]
        rendered = [Rendered(text, [], literal) for text, literal in zip(texts, literals, strict=True)]
        for step, _ in self._encoder.encode(rendered, [[]] * len(rendered)):
            ids += step
            ends.append(len(ids) - 1)
        return ids, ends


class StepEncoder(RowEncoder):
    """Judged steps -> ids, which of them end a step, and how right that step is."""

    columns: ClassVar[tuple[str, ...]] = ("input_ids", "trained", "right")

    def _add(self, kind: str, samples: list[Located], part: Part) -> None:
        steps = StepFormat(self.chat)
        for location, sample in samples:
            try:
                ids, ends = steps.encode(sample["prompt"], sample["steps"])
            except ChatTemplateError as error:
                what = f"a prompt the chat template cannot render ({error})"
                self._drop(DataError(location, what, "turns that the template knows", "mend the row", "template"), part)
                continue
            trained, right = np.zeros(len(ids), dtype=np.uint8), np.zeros(len(ids), dtype=np.float32)
            trained[ends], right[ends] = 1, sample["right"]
            part.columns["input_ids"].append(self.ids(ids))
            part.columns["trained"].append(trained)
            part.columns["right"].append(right)


class StepRows:
    """The answers of a store, at most `how.block_size` tokens each, cut at the end that `how.truncation` names."""

    def __init__(self, store: TokenStore, name: str, how: DataOptions) -> None:
        self.ledger = Ledger(name=name)
        note_dropped(self.ledger, store)
        self.answers = Column(store["input_ids"], store["trained"], how.block_size, how.truncation)
        self.right = store["right"]
        enter(self.ledger, [self.answers], np.zeros(len(store), dtype=bool), "", how)
        self.lengths = self.answers.lengths
        self.file_sizes = [len(self.lengths)]

    def __getitem__(self, index: int) -> StepSample:
        where = slice(int(self.answers.starts[index]), int(self.answers.stops[index]))
        return StepSample(row=self.answers.sample(index), right=np.asarray(self.right.values[where]))


def collate_steps(samples: Sequence[StepSample], collate: Collate) -> Batch:
    """Answers as language rows by `collate`, with `step_labels` instead of `labels`: -100 except where a step ends."""
    batch = dict(collate([sample["row"] for sample in samples]))
    ends = batch.pop("labels") != IGNORE
    # The first token of a document has no label, here as in language modelling.
    right = torch.from_numpy(np.concatenate([s["right"][1:][s["row"]["trained"][1:]] for s in samples]))
    batch["step_labels"] = torch.full(ends.shape, float(IGNORE)).masked_scatter(ends, right)
    return batch


def holds_steps(path: Path, options: DataOptions) -> bool:
    """Whether the rows of a file are answers judged step by step."""
    if path.suffix in TOKEN_SUFFIXES:
        return False
    if options.schema is not None:
        return get_schema(options.schema).kind == "steps"
    rows = islice(read_rows(path, options.text_unit, on_error=lambda error: None), ROWS_LOOKED_AT)
    return recognise(list(rows)).kind == "steps"


def load_steps(paths: Iterable[str], chat: ChatFormat, how: DataOptions, cache: Path) -> Joined:
    """All files as one dataset of answers judged step by step, in the order given.

    Raises:
        DataError: a file or a row cannot be used; the message says where and how to mend it.
        ValueError: a packing was asked for that puts several answers into one row.
    """

    def rows_of(path: Path) -> StepRows:
        if path.suffix in TOKEN_SUFFIXES:
            fix = "store prompt, completions and labels"
            raise DataError(Location(path), "token ids", "text with a label per step", fix)
        return StepRows(store_of(path, chat, how, cache, StepEncoder), str(path), how)

    return join_files(paths, how, rows_of)
