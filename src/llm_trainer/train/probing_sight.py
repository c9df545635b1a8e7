"""The model as it trains, shown pictures, on whatever engine: see `probe.Sight`."""

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.config.errors import ConfigError
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.plain import EncodedChat
from llm_trainer.data.images import ImageRef
from llm_trainer.data.read.messages import IMAGE
from llm_trainer.data.vision import ImageFormat
from llm_trainer.export.asking import margin_of, prints_the_day, stops_of
from llm_trainer.export.pictures import PICTURES, Look, Numbers, Showing, Shown, draw, sampled, scored_places
from llm_trainer.export.seeing import without
from llm_trainer.image_batch import ImageBatch
from llm_trainer.models.inside import transformers_model
from llm_trainer.models.vision import Features, Vision


class TrainingSight:
    """Pictures become tokens and numbers as those of rows do; in lockstep all ranks look together.

    Args:
        chat: of the run, with images.
        images: that of `chat`.
        module: the model without wrappers.
        device: where it computes.
    """

    def __init__(self, chat: ChatFormat, images: ImageFormat, module: nn.Module, device: torch.device) -> None:
        self._chat, self._images, self._module, self._device = chat, images, module, device
        self._vision = Vision.of(module)

    def numbers(self, height: int, width: int) -> Numbers:
        return sampled(self._images.numbers([draw(height, width)]))

    def show(self, showing: Showing, pictures: Sequence[Sequence[int]]) -> Shown | None:
        refs = []
        for number in showing.pictures:
            height, width = pictures[number]
            refs.append(ImageRef(b"", height, width, f"{height} x {width}"))
        try:
            encoded = self._encoded(showing, refs)
        except ValueError:  # as `ChatTemplateError`, and what processors raise
            return None
        if encoded is None:
            return None
        return Shown(encoded.text, encoded.input_ids)

    def _encoded(self, showing: Showing, refs: list[ImageRef]) -> EncodedChat | None:
        tokenizer = self._chat.tokenizer
        if isinstance(showing.said, str):
            (encoded,) = self._chat.encode_documents([showing.said], [refs])
            ids = encoded.input_ids
            if ids[-1] == tokenizer.eos_token_id:  # the end of a document, which nobody writes who shows it
                ids = ids[:-1]
            return replace(encoded, input_ids=ids)
        if not tokenizer.chat_template or prints_the_day(tokenizer):
            return None
        # Each message shows the next ones of the pictures.
        messages, left = list[dict[str, Any]](), list(refs)
        for message in showing.messages:
            num_images = message["content"].count(IMAGE)
            messages.append({**message, "images": left[:num_images]})
            del left[:num_images]
        if not showing.add_generation_prompt:
            return self._chat.encode(messages)
        (encoded,) = self._chat.encode_pictured([messages])
        return encoded

    def look(self, showing: Showing, pictures: Sequence[Sequence[int]]) -> Look:
        shown = self.show(showing, pictures)
        assert shown is not None  # only what can be shown is asked
        images = self._batch(showing, pictures).to(self._device)
        try:
            features = self._vision.encode(images)
        except ValueError as error:  # processor and model disagree, on every rank alike; rows may have shown no image
            return Look.failed(error, shown)
        places = scored_places(shown.ids, self._images.image_token_id)
        logits = self._logits(shown.ids, features, places)  # (places, V)
        labels = torch.tensor([shown.ids[place + 1] for place in places], device=logits.device)
        chosen = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0].tolist()
        answer, margins = self._answer(shown.ids, features, showing.num_answered)
        return Look(shown, chosen, answer, margins)

    def _batch(self, showing: Showing, pictures: Sequence[Sequence[int]]) -> ImageBatch:
        distinct = list(dict.fromkeys(showing.pictures))
        uses = [distinct.index(number) for number in showing.pictures]
        return self._images.batch([draw(*pictures[number]) for number in distinct], [uses])

    def _answer(self, prompt: Sequence[int], features: Features, num_tokens: int) -> tuple[list[int], list[float]]:
        """As many forwards whatever is written, so that no rank waits for another."""
        stops = stops_of(transformers_model(self._module))
        ids, margins = list(prompt), list[float]()
        for _ in range(num_tokens):
            logits = without(self._logits(ids, features, [len(ids) - 1])[0], self._images.image_token_id)
            ids.append(int(logits.argmax()))
            margins.append(margin_of(logits))
        written = ids[len(prompt) :]
        ends = [place + 1 for place, token in enumerate(written) if token in stops]
        length = min([*ends, num_tokens])
        return written[:length], margins[:length]

    def _logits(self, ids: Sequence[int], features: Features, places: Sequence[int]) -> Tensor:
        """`[places, V]` in fp32 of one row."""
        row, kept = torch.tensor([list(ids)], device=self._device), torch.tensor(list(places), device=self._device)
        inputs = self._vision.inputs(row, features)
        output = self._module(row, **inputs, use_cache=False, logits_to_keep=kept)
        logits: Tensor = output.logits[0].float()
        return logits


def sight_of(algorithm: Algorithm, module: nn.Module, device: torch.device) -> TrainingSight | None:
    """None: the model reads text alone, or the run has no processor, or one that makes nothing of pictures.

    Whether rows show images does not count: who gets the model will show it some.

    Args:
        algorithm: of the run.
        module: its base model without wrappers.
        device: where it computes.
    """
    keeps = "logits_to_keep" in inspect.signature(module.forward).parameters
    if algorithm.processor is None or Vision.of(module).model is None or not keeps:
        return None
    try:
        # As the folder will say it: without what the run alone knows, such as a limit of pixels.
        images = ImageFormat(algorithm.processor)
        for height, width in PICTURES:
            images.numbers([draw(height, width)])
    except (ConfigError, ValueError):  # a run that reads text must not end with it; its export will
        return None
    return TrainingSight(ChatFormat(algorithm.tokenizer, images=images), images, module, device)
