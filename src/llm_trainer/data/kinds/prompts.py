"""Rows of prompts, whose answers are written in training: the ids, the reference answer, and the row as the file has it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NotRequired, TypedDict

import numpy as np

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.pictured import IMAGE_COLUMNS, image_columns
from llm_trainer.data.encode.store import TokenStore, compact_ids
from llm_trainer.data.images import ImageRef
from llm_trainer.data.kinds import Batch, DataOptions, Encoded, Kind, Lay, Sample
from llm_trainer.data.read.pictures import IMAGE_KEYS, without_images
from llm_trainer.data.windows import Column, Rows


class PromptSample(TypedDict):
    """One prompt."""

    input_ids: np.ndarray  # [T], up to where the assistant begins to write
    answer: str | None  # the reference answer, if the row has one
    row: Any  # every column of the row in the file, for rewards that read them
    messages: list[Any] | None  # the prompt as it was before it became ids, for environments; None: it was ids
    images: NotRequired[Sequence[ImageRef]]  # that it shows, in the order of their tokens; absent: none


def _as_json(answer: str | None, row: Any, messages: Any = None) -> np.ndarray:
    """The facts of a prompt as the bytes of a JSON text; what JSON has no form for (dates in tables) becomes text."""
    facts = json.dumps({"answer": answer, "row": row, "messages": messages}, ensure_ascii=False, default=str)
    return np.frombuffer(facts.encode(), dtype=np.uint8)


def encode_prompts(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Prompts -> ids that end where the assistant begins to write, and the facts beside them."""
    prompts = chat.encode_pictured([s.values["prompt"] for s in samples], [s.values.get("tools") for s in samples])
    for sample, one in zip(samples, prompts, strict=True):
        sample.location.note_all(chat.left_out(sample.values["prompt"], sample.values.get("tools")))
        row, messages = sample.row, sample.values["prompt"]
        columns: dict[str, np.ndarray] = {}
        if one.images:  # they are in columns of their own
            row = {name: value for name, value in row.items() if name not in IMAGE_KEYS}
            messages = without_images(messages)
            columns = image_columns([(one.images, one.places)])
        facts = _as_json(sample.values["answer"], row, messages)
        yield {"input_ids": compact_ids(one.input_ids, chat.vocab_size), "facts": facts, **columns}


def encode_prompt_ids(chat: ChatFormat, samples: Sequence[Sample]) -> Iterator[Encoded]:
    """Prompts in ids as they are, and their answers, where there are any, as text again."""
    for sample in samples:
        answer = None
        if "answer" in sample.values:
            answer = str(chat.tokenizer.decode(sample.values["answer"].tolist()))
        yield {"input_ids": sample.values["prompt"].astype(np.uint32), "facts": _as_json(answer, {})}


class PromptRows(Rows):
    """The prompts of a store; nothing of them is trained on.

    One that is too long is left out where the start of rows is kept: at its end stand the question and the mark after which
    the assistant writes, and without them it is no prompt.
    """

    def __init__(self, store: TokenStore, name: str, how: DataOptions) -> None:
        if how.truncation == "keep_start":
            how = replace(how, truncation="drop")
        self.prompts = Column(store, "input_ids", None, how)
        super().__init__(store, name, how, [self.prompts], learns=False)
        self.facts = store["facts"]

    def __getitem__(self, index: int) -> PromptSample:
        facts = json.loads(self.facts[self.stored[index]].tobytes())
        tokens = self.prompts.sample(index)
        ids = tokens["input_ids"]
        sample = PromptSample(input_ids=ids, answer=facts["answer"], row=facts["row"], messages=facts.get("messages"))
        if "images" in tokens:
            sample["images"] = tokens["images"]
        return sample


def collate_prompts(samples: Sequence[PromptSample], lay: Lay) -> Batch:
    """Prompts padded on the left, as generation wants them; `lay` is for rows that are trained on and is not used.

    Returns:
        `prompts [B, P]`, `prompt_attention_mask [B, P]`, and `answers` and `rows`, lists of B; `image_refs`, a list of B
        lists, where any prompt shows an image.
    """
    import torch

    from llm_trainer.data.collate import pad_right

    reversed_ids = [sample["input_ids"][::-1] for sample in samples]
    present = [np.ones(len(ids), dtype=np.int64) for ids in reversed_ids]
    batch: Batch = {
        "prompts": torch.flip(pad_right(reversed_ids, 0), [1]),
        "prompt_attention_mask": torch.flip(pad_right(present, 0), [1]),
        "answers": [sample["answer"] for sample in samples],
        "rows": [sample["row"] for sample in samples],
    }
    if any("images" in sample for sample in samples):
        batch["image_refs"] = [list(sample.get("images", ())) for sample in samples]
    return batch


PROMPTS = Kind(
    name="prompts",
    accepts=("prompt",),
    columns=("input_ids", "facts"),
    encode=encode_prompts,
    rows=PromptRows,
    collate=collate_prompts,
    packings=("none",),
    section="grpo_config or ppo_config",
    token_kind="prompt",
    encode_ids=encode_prompt_ids,
    columns_of_images=IMAGE_COLUMNS,
)
