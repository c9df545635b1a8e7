"""Rows of answers that are judged step by step, for process reward models."""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.plain import weights_dtype
from llm_trainer.data.encode.store import TokenStore, compact_ids
from llm_trainer.data.encode.turns import Tools
from llm_trainer.data.kinds import NO_WEIGHT, Batch, DataOptions, Encoded, Kind, LanguageSample, Lay, Sample
from llm_trainer.data.read.messages import Message
from llm_trainer.data.read.weights import step_weights
from llm_trainer.data.windows import Column, Rows

SEPARATOR = "\n"  # ends every step; its last token is where the step is judged


class ProcessSample(TypedDict):
    """One answer; `right [T]` is how right each step is, read where `row["trained"]`, at the steps' last tokens."""

    row: LanguageSample
    right: np.ndarray


class ProcessFormat:
    """A prompt in the chat template and the steps of its answer, each tokenised by itself, as ids."""

    def __init__(self, chat: ChatFormat) -> None:
        self.chat = chat

    def encode(
        self, prompt: Sequence[Message], steps: Sequence[str], tools: Tools | None = None
    ) -> tuple[list[int], list[int]]:
        """Ids `[T]`, and the position of each step's last token.

        Raises:
            ChatTemplateError: the template cannot render the prompt.
        """
        ids, ends = self.chat.encode_prompt(prompt, tools), list[int]()
        for step in self.chat.encode_pieces([step + SEPARATOR for step in steps]):
            ids += step
            ends.append(len(ids) - 1)
        return ids, ends


def encode_process(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Judged steps -> ids, which of them end a step (and how much it weighs), and how right that step is."""
    answers = ProcessFormat(chat)
    for sample in samples:
        ids, ends = answers.encode(sample.values["prompt"], sample.values["steps"], sample.values.get("tools"))
        sample.location.note_all(chat.left_out(sample.values["prompt"], sample.values.get("tools")))
        weights = step_weights(sample.row, len(ends), sample.location)
        if not any(weights):
            yield NO_WEIGHT
            continue
        trained: np.ndarray = np.zeros(len(ids), dtype=weights_dtype(weights))
        right = np.zeros(len(ids), dtype=np.float32)
        trained[ends], right[ends] = weights, sample.values["right"]
        yield {"input_ids": compact_ids(ids, chat.vocab_size), "trained": trained, "right": right}


class ProcessRows(Rows):
    """The answers of a store, at most `how.block_size` tokens each, truncated as `how.truncation` says."""

    def __init__(self, store: TokenStore, name: str, how: DataOptions) -> None:
        self.answers = Column(store, "input_ids", "trained", how)
        super().__init__(store, name, how, [self.answers])
        self.right = store["right"].values

    def __getitem__(self, index: int) -> ProcessSample:
        window = slice(int(self.answers.starts[index]), int(self.answers.stops[index]))
        return ProcessSample(row=self.answers.sample(index), right=np.asarray(self.right[window]))


def collate_process(samples: Sequence[ProcessSample], lay: Lay) -> Batch:
    """Answers as language rows, with `step_labels` instead of `labels`: -100 except where a step ends."""
    import torch

    from llm_trainer.data.collate import IGNORE

    batch = dict(lay([sample["row"] for sample in samples]))  # with `loss_weights` where steps weigh differently
    ends = batch.pop("labels") != IGNORE
    # The first token of a document has no label, here as in language modelling.
    judged = [sample["right"][1:][sample["row"]["trained"][1:]] for sample in samples]
    right = torch.from_numpy(np.concatenate(judged))
    batch["step_labels"] = torch.full(ends.shape, float(IGNORE)).masked_scatter(ends, right)
    return batch


PROCESS = Kind(
    name="process",
    accepts=("process",),
    columns=("input_ids", "trained", "right"),
    encode=encode_process,
    rows=ProcessRows,
    collate=collate_process,
    section="reward_config",
)
