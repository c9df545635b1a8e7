"""Rows of single answers that are desirable or not, each with a mismatched one beside it (for KTO's KL)."""

from collections.abc import Iterator, Sequence
from typing import NotRequired, TypedDict

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.pictured import IMAGE_COLUMNS, image_columns
from llm_trainer.data.encode.printed import UNPRINTED
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.kinds import NO_WEIGHT, WEIGHT, Batch, DataOptions, Encoded, Kind, LanguageSample, Lay, Sample
from llm_trainer.data.kinds.pairs import SIDES, up_to_last_trained, weights_of_rows
from llm_trainer.data.packing import add_images
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.messages import read_only
from llm_trainer.data.read.weights import weight_as_a_whole
from llm_trainer.data.windows import Column, Rows, weight_column


class UnpairedSample(TypedDict):
    """One answer; `mismatched` is its prompt with the answer to another prompt."""

    row: LanguageSample
    mismatched: LanguageSample
    desirable: bool
    weight: NotRequired[float]  # how much the answer counts; absent: 1


def encode_unpaired(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Judged answers -> their conversations; of a pair, the chosen answer is good and the rejected one bad."""
    conversations, tools, labels, origins, weights = [], [], [], [], []
    for sample in samples:
        values = sample.values
        weight = weight_as_a_whole(sample.row, sample.location)
        judged = {"completion": values.get("label")}
        if sample.kind == "preference":
            judged = dict(zip(SIDES, (True, False), strict=True))
        for key, label in judged.items():
            conversations.append(read_only(values["prompt"]) + values[key])
            tools.append(sample.values.get("tools"))
            labels.append(label)
            origins.append(sample.location)
            weights.append(weight)
    encoded = chat.encode_many(conversations, tools)
    for origin, conversation, functions, one in zip(origins, conversations, tools, encoded, strict=True):
        origin.note_all(chat.left_out(conversation, functions))
        origin.note(UNPRINTED, one.num_unprinted)
    for label, origin, weight, one in zip(labels, origins, weights, encoded, strict=True):
        tokens = up_to_last_trained(one, chat.vocab_size, origin)
        if tokens is None:
            yield "empty_completion"
        elif weight == 0:
            yield NO_WEIGHT
        else:
            desirable = np.array([label], dtype=np.uint8)
            row = {"input_ids": tokens[0], "trained": tokens[1], "desirable": desirable}
            if one.images:
                row |= image_columns([(one.images, one.places)])
            yield row | {WEIGHT: weight_column(weight)}


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
        prompts = [numbers.setdefault(self._prompt(row), row) for row in range(len(self.lengths))]
        if len(prompts) < 2:
            expected = "at least two, to pair prompts with others' answers"
            raise DataError(Location(name), "one answer", expected, "add rows")
        self.partners = mismatched_order(torch.tensor(prompts)).numpy()

    def _halves(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the prompt and of what follows it."""
        ids, trained = self.answers.tokens(row)
        first = int(trained.argmax())
        return ids[:first], ids[first:]

    def _prompt(self, row: int) -> bytes:
        """What tells the prompt of a row from others: its ids, and the images in it."""
        ids = self._halves(row)[0]
        images = self.answers.sample(row, 0, len(ids)).get("images", ())
        return ids.tobytes() + "".join(ref.digest for ref in images).encode()

    def _mismatched(self, row: int) -> LanguageSample:
        partner = int(self.partners[row])
        prompt, answer = self._halves(row)[0], self._halves(partner)[1]
        answer_trained = self.answers.tokens(partner)[1][-len(answer) :]
        trained = np.concatenate([np.zeros(len(prompt), dtype=bool), answer_trained])
        ids = np.concatenate([prompt, answer])
        start, stop = 0, len(ids)
        limit = self.how.block_size
        if limit is not None and len(ids) > limit:
            start, stop = (len(ids) - limit, len(ids)) if self.how.truncation == "keep_end" else (0, limit)
        if self.answers.images is None:
            ids, trained = ids[start:stop], trained[start:stop]
            return LanguageSample(input_ids=ids, trained=trained, document_lengths=[len(ids)])
        # Images are cut off whole: of the prompt and of the answer those that lie inside are taken.
        moved = len(prompt) - len(self._halves(partner)[0])
        blocks = [self.answers.blocks(row)[:, :2], self.answers.blocks(partner)[:, :2] + moved]
        mine = (blocks[0][:, 1] <= len(prompt), blocks[1][:, 0] >= len(prompt))
        for first, last in np.concatenate([block[which] for block, which in zip(blocks, mine, strict=True)]).tolist():
            start = last if first < start < last else start
            stop = first if first < stop < last else stop
        halves = [
            self.answers.sample(row, min(start, len(prompt)), min(stop, len(prompt))),
            self.answers.sample(
                partner,
                len(self._halves(partner)[0]) + max(start - len(prompt), 0),
                len(self._halves(partner)[0]) + max(stop - len(prompt), 0),
            ),
        ]
        sample = LanguageSample(
            input_ids=ids[start:stop],
            trained=trained[start:stop],
            document_lengths=[stop - start],
            place=self.place(row),
        )
        add_images(sample, halves)
        return sample

    def __getitem__(self, index: int) -> UnpairedSample:
        desirable = bool(self.desirable[self.stored[index]])
        answer, mismatched = self.answers.sample(index), self._mismatched(index)
        if "images" in answer:
            answer["place"] = self.place(index)
        sample = UnpairedSample(row=answer, mismatched=mismatched, desirable=desirable)
        if self.weights is not None:
            sample["weight"] = float(self.weights[index])
        return sample


def collate_unpaired(samples: Sequence[UnpairedSample], lay: Lay) -> Batch:
    """Answers as language rows, `desirable [B]`, `row_weights [B]`, and the mismatched rows under keys that start `kl_`."""
    import torch

    batch = dict(lay([s["row"] for s in samples]))
    mismatched = lay([s["mismatched"] for s in samples])
    batch |= {f"kl_{name}": value for name, value in mismatched.items()}
    batch |= weights_of_rows(samples)
    return batch | {"desirable": torch.tensor([s["desirable"] for s in samples])}


UNPAIRED = Kind(
    name="unpaired",
    accepts=("unpaired", "preference"),
    columns=("input_ids", "trained", "desirable", WEIGHT),
    encode=encode_unpaired,
    rows=UnpairedRows,
    collate=collate_unpaired,
    section="kto_config",
    columns_of_images=IMAGE_COLUMNS,
)
