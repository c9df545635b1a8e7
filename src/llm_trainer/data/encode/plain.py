"""Text to token ids, with the images that stand in it: what conversations and plain documents have in common.

`PlainText` is of texts outside of any template; `chat.ChatFormat` adds conversations.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llm_trainer.data.encode.pictured import NO_IMAGE, Pictured, Place, expanded, grown, joined
from llm_trainer.data.encode.spans import Span
from llm_trainer.data.encode.templates import ChatTemplateError, Rendered, adds_bos
from llm_trainer.data.encode.tokenizer import TextEncoder
from llm_trainer.data.images import ImageRef
from llm_trainer.data.read.messages import IMAGE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llm_trainer.data.vision import ImageFormat


@dataclass(frozen=True)
class EncodedChat:
    """Token ids, for each whether the loss counts it, and the text they were made from."""

    input_ids: list[int]  # [T]
    trained: list[bool]  # [T]
    text: str  # as rendered; a BOS or eos that is not part of a template is only in the ids
    weights: list[float] | None = None  # [T] how much each counts, 0 where it does not; None: all that do count 1
    num_unprinted: int = 0  # answers of which the template prints nothing; their ends are not trained on
    images: Sequence[ImageRef] = ()  # that stand among the tokens, in their order
    places: Sequence[Place] = ()  # where each of them stands

    def loss_weights(self, row_weight: float = 1.0) -> np.ndarray:
        """`[T]` how much each token counts in the loss of a row of this weight.

        uint8, unless any of them is neither 0 nor 1: then float32.
        """
        own: list[Any] = self.trained if self.weights is None else self.weights
        dtype = weights_dtype([row_weight, *(self.weights or ())])
        return np.asarray(own, dtype=dtype) * dtype(row_weight)


class Printed(NamedTuple):
    """A text before it is tokenised."""

    rendered: Rendered
    spans: list[Span]  # that are trained on
    weights: list[float]  # of the spans; none: all count 1
    num_unprinted: int = 0
    images: Sequence[ImageRef] = ()


def weights_dtype(weights: Iterable[float]) -> type:
    """uint8, unless any of the weights is neither 0 nor 1: then float32."""
    return np.uint8 if all(weight in (0, 1) for weight in weights) else np.float32


class PlainText:
    """How texts outside of any template become tokens.

    Attributes:
        tokenizer: a fast tokenizer.
        parse_special_tokens: text of a special token is the token; else it is only text.
        images: what an image is in tokens; then every `<image>` is one. None: it is text.
    """

    tokenizer: "PreTrainedTokenizerFast"
    parse_special_tokens: bool
    images: "ImageFormat | None"

    def encode_completion(self, prompt: str, completion: str) -> EncodedChat:
        """Plain strings: the completion and the eos after it are trained on, the prompt is not."""
        return self.encode_completions([(prompt, completion)])[0]

    def encode_completions(
        self, pairs: Sequence[tuple[str, str]], images: Sequence[Sequence[ImageRef]] | None = None
    ) -> list[EncodedChat]:
        """Many prompts with their completions, tokenised together; `images` stand for the `<image>`s of each."""
        spans, texts = [], []
        for prompt, completion in pairs:
            texts.append(self._plain(prompt + completion))
            start = len(prompt)
            if self.images is not None:  # a marker may be longer than `<image>`
                start = len(self._plain(prompt).text)
            spans.append([(start, len(texts[-1].text))])
        return self._encode_plain(texts, spans, images, is_completion=True)

    def encode_documents(
        self, texts: Sequence[str], images: Sequence[Sequence[ImageRef]] | None = None
    ) -> list[EncodedChat]:
        """Documents to pretrain on: all but their images is trained on, the eos after it too."""
        plain = [self._plain(text) for text in texts]
        return self._encode_plain(plain, [[(0, len(one.text))] for one in plain], images)

    def _encode_plain(
        self,
        texts: Sequence[Rendered],
        spans: Sequence[list[Span]],
        images: Sequence[Sequence[ImageRef]] | None,
        is_completion: bool = False,
    ) -> list[EncodedChat]:
        """Texts outside of any template, with what stands before and after them."""
        refs: Sequence[Sequence[ImageRef]] = images or [()] * len(texts)
        printed = []
        for text, span, shown_here in zip(texts, spans, refs, strict=True):
            printed.append(Printed(text, span, [], images=shown_here))
        results = []
        for one in self._tokenise(printed):
            before, after = self._ends(one.input_ids)
            trained = [not is_completion] * len(before) + one.trained + [True] * len(after)
            places = [place.behind(len(before)) for place in one.places]
            ids = before + one.input_ids + after
            results.append(replace(one, input_ids=ids, trained=trained, places=places))
        return results

    def encode_text(self, text: str) -> EncodedChat:
        """A document to pretrain on: everything is trained on, the eos after it too."""
        ids = self.encode_texts([text])[0]
        return EncodedChat(ids, [True] * len(ids), text)

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many documents, tokenised together."""
        results = []
        for ids in self.encode_pieces(texts):
            before, after = self._ends(ids)
            results.append(before + ids + after)
        return results

    def encode_pieces(self, texts: Sequence[str]) -> list[list[int]]:
        """Plain strings, each tokenised by itself, with nothing before or after it."""
        return self._encoder.encode_ids([self._plain(text) for text in texts])

    @cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.tokenizer)

    @cached_property
    def _bos_and_eos(self) -> tuple[list[int], list[int]]:
        """What stands before a plain text (nothing, where the tokenizer adds no BOS) and after it."""
        bos, eos = [], []
        if adds_bos(self.tokenizer):
            bos = [self.tokenizer.bos_token_id]
        if self.tokenizer.eos_token_id is not None:
            eos = [self.tokenizer.eos_token_id]
        return bos, eos

    def _ends(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Ids to put before and after those of a plain text, which may have a BOS or an eos of its own."""
        bos, eos = self._bos_and_eos
        before = [] if ids[:1] == bos else bos
        after = [] if (before + ids)[-1:] == eos else eos
        return before, after

    def _plain(self, text: str) -> Rendered:
        """Text outside of any template; what looks like a special token is only text unless they are parsed."""
        if self.images is not None and IMAGE in text:
            pieces = [self._plain(piece) for piece in text.split(IMAGE)]
            return joined(pieces, self.images.marker)
        matches = () if self.parse_special_tokens else self._encoder.special.finditer(text)
        return Rendered(text, [], frozenset(match.start() for match in matches))

    def _tokenise(self, block: Sequence["Printed"]) -> Iterator[EncodedChat]:
        """Rendered texts as tokens; in the place of each image stands what the processor writes for it."""
        pictures = [self._pictured(one) for one in block]
        texts = [one if picture is None else picture for one, picture in zip(block, pictures, strict=True)]
        encoded = self._encoder.encode(
            [t.rendered for t in texts], [t.spans for t in texts], [t.weights for t in texts]
        )
        for one, picture, (ids, counted) in zip(block, pictures, encoded, strict=True):
            places: list[Place] = []
            if picture is not None:
                assert self.images is not None
                ids, counted, places = grown(ids, counted, picture, self.images.image_token_id)
            elif self.images is not None and self.images.image_token_id in ids:
                raise ChatTemplateError(NO_IMAGE)
            trained, weights = counted, None
            if one.weights:
                weights = counted
            if one.weights or picture is not None:
                trained = [weight != 0 for weight in counted]
            yield EncodedChat(ids, trained, one.rendered.text, weights, one.num_unprinted, one.images, places)

    def _pictured(self, one: "Printed") -> Pictured | None:
        """A rendered text with its images in it; None where there are none."""
        if self.images is None or not (one.images or self.images.marker in one.rendered.text):
            return None
        return expanded(one.rendered, one.spans, one.weights, one.images, self.images)
