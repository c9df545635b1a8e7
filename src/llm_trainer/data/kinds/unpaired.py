"""Rows of single answers that are desirable or not, each with a mismatched one beside it (for KTO's KL)."""

from collections.abc import Iterator, Sequence
from typing import TypedDict

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.printed import UNPRINTED
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.kinds import Batch, DataOptions, Encoded, Kind, LanguageSample, Lay, Sample
from llm_trainer.data.kinds.pairs import SIDES, up_to_last_trained
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.messages import read_only
from llm_trainer.data.windows import Column, Rows


class UnpairedSample(TypedDict):
    """One answer; `mismatched` is its prompt with the answer to another prompt."""

    row: LanguageSample
    mismatched: LanguageSample
    desirable: bool


def encode_unpaired(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Judged answers -> their conversations; of a pair, the chosen answer is good and the rejected one bad."""
    conversations, tools, labels, origins = [], [], [], []
    for sample in samples:
        values = sample.values
        judged = {"completion": values.get("label")}
        if sample.kind == "preference":
            judged = dict(zip(SIDES, (True, False), strict=True))
        for key, label in judged.items():
            conversations.append(read_only(values["prompt"]) + values[key])
            tools.append(sample.values.get("tools"))
            labels.append(label)
            origins.append(sample.location)
    encoded = chat.encode_many(conversations, tools)
    for origin, conversation, functions, one in zip(origins, conversations, tools, encoded, strict=True):
        origin.note_all(chat.left_out(conversation, functions))
        origin.note(UNPRINTED, one.num_unprinted)
    for label, origin, one in zip(labels, origins, encoded, strict=True):
        tokens = up_to_last_trained(one, chat.vocab_size, origin)
        if tokens is None:
            yield "empty_completion"
        else:
            desirable = np.array([label], dtype=np.uint8)
            yield {"input_ids": tokens[0], "trained": tokens[1], "desirable": desirable}


class UnpairedRows(Rows):
    """The judged answers of a store, at most `how.block_size` tokens each.

    Prompts and answers are mismatched once per file, independently of the sampler and of how a step is split.
    """

    def __init__(self, store: TokenStore, name: str, how: DataOptions) -> None:
        import torch

        from llm_trainer.losses.unpaired import mismatched_order

        self.answers = Column(store, "input_ids", "trained", how)
        super().__init__(store, name, how, [self.answers])
        self.desirable = np.asarray(store["desirable"].values) != 0
        numbers: dict[bytes, int] = {}
        prompts = [numbers.setdefault(self._halves(row)[0].tobytes(), row) for row in range(len(self.lengths))]
        if len(prompts) < 2:
            expected = "at least two, to pair prompts with others' answers"
            raise DataError(Location(name), "one answer", expected, "add rows")
        self.partners = mismatched_order(torch.tensor(prompts)).numpy()

    def _halves(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the prompt and of what follows it."""
        ids, trained = self.answers.tokens(row)
        first = int(trained.argmax())
        return ids[:first], ids[first:]

    def _mismatched(self, row: int) -> LanguageSample:
        partner = int(self.partners[row])
        prompt, answer = self._halves(row)[0], self._halves(partner)[1]
        answer_trained = self.answers.tokens(partner)[1][-len(answer) :]
        trained = np.concatenate([np.zeros(len(prompt), dtype=bool), answer_trained])
        ids = np.concatenate([prompt, answer])
        limit = self.how.block_size
        if limit is not None and len(ids) > limit:
            kept = slice(-limit, None) if self.how.truncation == "keep_end" else slice(limit)
            ids, trained = ids[kept], trained[kept]
        return LanguageSample(input_ids=ids, trained=trained, document_lengths=[len(ids)])

    def __getitem__(self, index: int) -> UnpairedSample:
        desirable = bool(self.desirable[self.stored[index]])
        return UnpairedSample(row=self.answers.sample(index), mismatched=self._mismatched(index), desirable=desirable)


def collate_unpaired(samples: Sequence[UnpairedSample], lay: Lay) -> Batch:
    """Answers as language rows, `desirable [B]`, and the mismatched rows under keys that start `kl_`."""
    import torch

    batch = dict(lay([s["row"] for s in samples]))
    mismatched = lay([s["mismatched"] for s in samples])
    batch |= {f"kl_{name}": value for name, value in mismatched.items()}
    return batch | {"desirable": torch.tensor([s["desirable"] for s in samples])}


UNPAIRED = Kind(
    name="unpaired",
    accepts=("unpaired", "preference"),
    columns=("input_ids", "trained", "desirable"),
    encode=encode_unpaired,
    rows=UnpairedRows,
    collate=collate_unpaired,
    section="kto_config",
)
