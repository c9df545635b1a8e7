"""Rows of comparisons: two answers to one prompt, the chosen one better than the rejected one.

Each is stored as a whole conversation, in which only the answer is trained on.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NotRequired, TypedDict

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.from_ids import spans_from_ids
from llm_trainer.data.encode.pictured import IMAGE_COLUMNS, image_columns
from llm_trainer.data.encode.plain import EncodedChat
from llm_trainer.data.encode.printed import UNPRINTED
from llm_trainer.data.encode.store import TokenStore, compact_ids
from llm_trainer.data.kinds import NO_WEIGHT, WEIGHT, Batch, DataOptions, Encoded, Kind, LanguageSample, Lay, Sample
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.messages import mute_empty_answers, read_only
from llm_trainer.data.read.weights import weight_as_a_whole
from llm_trainer.data.windows import Column, Rows, lay_flat, row_blocks, weight_column

SIDES = ("chosen", "rejected")
EQUAL_AFTER_CUT = "both answers equal after truncation"


class PairSample(TypedDict):
    """One pair; a reference model's sums are there once they are known."""

    chosen: LanguageSample
    rejected: LanguageSample
    margin: float  # by how much the chosen answer is better; 0: not stated
    weight: NotRequired[float]  # how much the pair counts; absent: 1
    ref_logps: NotRequired[np.ndarray]  # [2] summed log-probs of chosen and rejected under the reference model


def up_to_last_trained(one: EncodedChat, vocab_size: int, location: Location) -> tuple[np.ndarray, np.ndarray] | None:
    """Ids of a conversation and which of them are trained on; what follows the last of these teaches nothing.

    None: nothing is trained on, or only a first token, which nothing predicts.

    Raises:
        DataError: some of its tokens are to weigh more or less than others.
    """
    refuse_weights([one], location)
    trained = np.asarray(one.trained, dtype=np.uint8)
    if not trained[1:].any():
        return None
    stop = int(trained.nonzero()[0][-1]) + 1
    return compact_ids(one.input_ids, vocab_size)[:stop], trained[:stop]


def refuse_weights(conversations: Sequence[EncodedChat], location: Location) -> None:
    """Answers that are compared or judged are scored as wholes.

    Raises:
        DataError: a message weighs neither 0 nor 1.
    """
    if any(one.weights is not None for one in conversations):
        expected = "weights of 0 or 1: an answer that is compared or judged is scored as a whole"
        fix = "remove the weights, or train the answers as conversations"
        raise DataError(location, "a message that weighs neither 0 nor 1", expected, fix, "loss_weight")


def encode_pairs(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Preferences -> both conversations, each up to its last trained token."""
    conversations, tools = [], []
    for sample in samples:
        prompt = read_only(sample.values["prompt"])
        conversations += [prompt + mute_empty_answers(sample.values[side], sample.location) for side in SIDES]
        tools += [sample.values.get("tools")] * len(SIDES)
    encoded = chat.encode_many(conversations, tools)
    for number, conversation in enumerate(conversations):
        location = samples[number // len(SIDES)].location
        location.note_all(chat.left_out(conversation, tools[number]))
        location.note(UNPRINTED, encoded[number].num_unprinted)
    for sample, chosen, rejected in zip(samples, encoded[::2], encoded[1::2], strict=True):
        weight = weight_as_a_whole(sample.row, sample.location)
        yield _row(chat, sample, chosen, rejected, sample.values["margin"] or 0.0, weight)


def encode_pair_ids(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Conversations in ids; the last answer of each is found again from the marks of the chat template."""
    last_answer = replace(chat, train_on="last")
    for sample in samples:
        if sample.values.get("images"):
            fix = "give the conversations as text, with their images in a column"
            raise DataError(sample.location, "images of pairs of token ids", "pairs without images", fix, "images")
        sides = [sample.values[side].tolist() for side in SIDES]
        chosen, rejected = (EncodedChat(ids, spans_from_ids(ids, last_answer), "") for ids in sides)
        row = _row(chat, sample, chosen, rejected, 0.0)
        is_tie = not isinstance(row, str) and sides[0] == sides[1]
        yield "identical" if is_tie else row


def _row(
    chat: ChatFormat, sample: Sample, chosen: EncodedChat, rejected: EncodedChat, margin: float, weight: float = 1.0
) -> Encoded:
    if weight == 0:
        return NO_WEIGHT
    row = {"margin": np.array([margin], dtype=np.float32), WEIGHT: weight_column(weight)}
    for side, one in zip(SIDES, (chosen, rejected), strict=True):
        tokens = up_to_last_trained(one, chat.vocab_size, sample.location)
        if tokens is None:
            return f"empty_{side}"
        row[side], row[f"{side}_trained"] = tokens
    if chosen.images or rejected.images:
        row |= image_columns([(one.images, one.places) for one in (chosen, rejected)])
    return row


class PairRows(Rows):
    """The pairs of a store, each side at most `how.block_size` tokens; a pair with equal sides is never used."""

    def __init__(self, store: TokenStore, name: str, how: DataOptions) -> None:
        self.chosen = Column(store, "chosen", "chosen_trained", how, number=0)
        self.rejected = Column(store, "rejected", "rejected_trained", how, number=1)
        equal = _equal_after_cut(self.chosen, self.rejected)
        super().__init__(store, name, how, [self.chosen, self.rejected], (equal, EQUAL_AFTER_CUT))
        # as a token budget counts them: of both sides, or of two padded rows; what is run once for both counts once
        if how.share_prompts and self.tower_tokens is None:  # rows with images are run by themselves
            self.lengths = self.lengths - _num_shared(self.chosen, self.rejected)
        elif how.packing != "flat":
            self.lengths = 2 * np.maximum(self.chosen.lengths, self.rejected.lengths)
        self.margins = np.asarray(store["margin"].values)
        self.ref_logps: np.ndarray | None = None  # [rows, 2] sums of chosen and rejected, once they are known

    def __getitem__(self, index: int) -> PairSample:
        chosen, rejected = self.chosen.sample(index), self.rejected.sample(index)
        for side in (chosen, rejected):
            if "images" in side:
                side["place"] = self.place(index)
        sample = PairSample(chosen=chosen, rejected=rejected, margin=float(self.margins[self.stored[index]]))
        if self.weights is not None:
            sample["weight"] = float(self.weights[index])
        if self.ref_logps is not None:
            sample["ref_logps"] = self.ref_logps[index]
        return sample


def _equal_after_cut(chosen: Column, rejected: Column) -> np.ndarray:
    """`[rows of the store]` bool: truncation has cut off where both sides differ."""
    equal = np.zeros(len(chosen.full), dtype=bool)
    may_be = (chosen.too_long | rejected.too_long) & (chosen.lengths == rejected.lengths) & (chosen.lengths > 0)
    candidates = may_be.nonzero()[0]
    for block in row_blocks(chosen.lengths[candidates]):
        rows = candidates[block]
        lengths = chosen.lengths[rows]
        same = chosen.flat_ids(rows) == rejected.flat_ids(rows)
        equal[rows] = np.logical_and.reduceat(same, np.cumsum(lengths) - lengths)
    return equal


def _num_shared(chosen: Column, rejected: Column) -> np.ndarray:
    """`[rows]` tokens that are run once for both sides of a pair."""
    import torch

    from llm_trainer.losses.pairs import num_shared

    shared = np.zeros(len(chosen.lengths), dtype=np.int64)
    assert rejected.trained is not None
    for rows in row_blocks(chosen.lengths + rejected.lengths):
        better, worse = (side.flat_ids(rows).astype(np.int32) for side in (chosen, rejected))
        is_label = lay_flat(rejected.trained, rejected.starts[rows], rejected.stops[rows]) != 0
        arrays = (better, chosen.lengths[rows], worse, rejected.lengths[rows], is_label)
        shared[rows] = num_shared(*map(torch.from_numpy, arrays)).numpy()
    return shared


def collate_pairs(samples: Sequence[PairSample], lay: Lay) -> Batch:
    """Pairs as language rows, all chosen before all rejected; `margin [B]`, `row_weights [B]`, and `ref_*_logps [B]`."""
    import torch

    chosen, rejected = [s["chosen"] for s in samples], [s["rejected"] for s in samples]
    batch = dict(lay(chosen + rejected))
    batch["margin"] = torch.tensor([s["margin"] for s in samples])
    batch |= weights_of_rows(samples)
    if all("ref_logps" in s for s in samples):
        table = torch.from_numpy(np.stack([s["ref_logps"] for s in samples]))
        batch |= {"ref_chosen_logps": table[:, 0], "ref_rejected_logps": table[:, 1]}
    return batch


def weights_of_rows(samples: Sequence[Any]) -> Batch:
    """`row_weights [B]`, how much each sample counts as a whole; nothing where all count alike."""
    import torch

    if not any("weight" in sample for sample in samples):
        return {}
    return {"row_weights": torch.tensor([sample.get("weight", 1.0) for sample in samples])}


PAIRS = Kind(
    name="pairs",
    accepts=("preference",),
    columns=("chosen", "chosen_trained", "rejected", "rejected_trained", "margin", WEIGHT),
    encode=encode_pairs,
    rows=PairRows,
    collate=collate_pairs,
    section="dpo_config or reward_config",
    token_kind="preference",
    encode_ids=encode_pair_ids,
    may_share=True,
    columns_of_images=IMAGE_COLUMNS,
)
