"""Which tokens of a text lie in a span of its characters.

A tokenizer can say which characters each token stands for, and takes a quarter longer when it is asked. The tokens of a
byte-level BPE (GPT-2, Llama 3, Qwen and most since) are bytes: their numbers of bytes add up to the same places.
"""

import json
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain, pairwise
from operator import eq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Span = tuple[int, int]  # [start, stop) in characters


def overlaps(offsets: Sequence[Span], spans: Sequence[Span], weights: Sequence[float] = ()) -> list[Any]:
    """For each token (its characters, in order) whether it overlaps one of the spans; or the weight of the last such span.

    Returns:
        `[T]` bools; with `weights`, one per span, `[T]` floats, 0 outside of all spans.
    """
    if not offsets:
        return []
    starts, stops = zip(*offsets, strict=True)
    if any(map(eq, starts, stops)):
        starts, stops = zip(*_widened(offsets), strict=True)
    return _marked(starts, stops, spans, weights)


def _marked(starts: Sequence[int], stops: Sequence[int], spans: Sequence[Span], weights: Sequence[float]) -> list[Any]:
    values: Sequence[Any] = weights or [True] * len(spans)
    nothing: Any = 0.0 if weights else False
    marked = [nothing] * len(stops)
    for (start, stop), value in zip(spans, values, strict=True):
        if start < stop:
            first = bisect_right(stops, start)
            last = bisect_left(starts, stop, lo=first)
            marked[first:last] = [value] * (last - first)
    return marked


def _widened(offsets: Sequence[Span]) -> list[Span]:
    """A token without characters gets the spaces that offset trimming took from it, else the character that follows."""
    widened, covered = [], 0
    for start, stop in offsets:
        if start < stop:
            widened.append((start, stop))
        elif covered < stop:
            widened.append((covered, stop))
        else:
            widened.append((start, start + 1))
        covered = max(covered, stop)
    return widened


class TokenBytes:
    """What `overlaps` says, from the numbers of bytes of the tokens alone, where that is certain.

    It is for a byte-level BPE that takes every byte of a text as it is. Nothing else is: a tokenizer with another
    normalizer than NFC, a text that NFC changes, an added token that swallows the spaces around it.
    """

    def __init__(self, backend: "Tokenizer") -> None:
        self._backend = backend

    def know(self, text: str, spans: Sequence[Span]) -> bool:
        """Whether `overlaps` can be expected to answer for a text; False: ask the tokenizer for characters."""
        if not spans:
            return True
        if self._lengths is None:
            return False
        if self._has_normalizer and not unicodedata.is_normalized("NFC", text):
            return False
        if not self._trims:
            return True
        # NOTE: where offsets are trimmed, a space at the beginning or end of a token is not among its characters. That
        # makes a difference at the edge of a span only.
        return all(" " not in text[max(edge - 1, 0) : edge + 1] for edge in chain.from_iterable(spans))

    def overlaps(
        self, ids: Sequence[int], text: str, spans: Sequence[Span], weights: Sequence[float] = ()
    ) -> list[Any] | None:
        """As `overlaps` of a text that `know` is true of; None: these tokens do not hold all bytes of the text."""
        if not spans or not ids:
            return [False] * len(ids)
        assert self._lengths is not None
        edges = list(accumulate(map(self._lengths.__getitem__, ids), initial=0))  # where each token starts, and the end
        spans, num_bytes = in_bytes(text, spans)
        if edges.pop() != num_bytes:
            return None
        return _marked(edges, [*edges[1:], num_bytes], spans, weights)

    @cached_property
    def _lengths(self) -> list[int] | None:
        """Bytes of each id; None: the tokens of this tokenizer are not simply the bytes of a text."""
        return _lengths(self._backend)

    @cached_property
    def _has_normalizer(self) -> bool:
        return self._backend.normalizer is not None

    @cached_property
    def _trims(self) -> bool:
        return b'"trim_offsets":true' in _described(self._backend.post_processor)


def in_bytes(text: str, spans: Sequence[Span]) -> tuple[Sequence[Span], int]:
    """Spans in the bytes of a text instead of its characters, and how many bytes the text has."""
    if text.isascii():
        return spans, len(text)
    edges = sorted({0, len(text), *chain.from_iterable(spans)})
    sizes = [len(text[start:stop].encode()) for start, stop in pairwise(edges)]
    places = dict(zip(edges, accumulate(sizes, initial=0), strict=True))
    return [(places[start], places[stop]) for start, stop in spans], places[len(text)]


def _lengths(backend: "Tokenizer") -> list[int] | None:
    """`[largest id + 1]` bytes of each token of a byte-level BPE; None for any other tokenizer."""
    from tokenizers import models

    # 1. tokens that are pieces of the text, none of which is dropped, doubled or marked
    model = backend.model
    if not isinstance(model, models.BPE):
        return None
    if any((model.unk_token, model.dropout, model.continuing_subword_prefix, model.end_of_word_suffix)):
        return None
    if model.byte_fallback or not _is_byte_level(backend):
        return None
    # 2. each character of such a token stands for a byte; added tokens are written as they are
    added = [(number, token.content) for number, token in backend.get_added_tokens_decoder().items()]
    if any(content != content.strip() for _, content in added):  # trimming would take their own spaces from them
        return None
    vocabulary = backend.get_vocab()
    lengths = [0] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        lengths[number] = len(token)
    for number, content in added:
        lengths[number] = len(content.encode())
    return lengths


def _is_byte_level(backend: "Tokenizer") -> bool:
    """Whether text comes to the model as its bytes, all of them: NFC or nothing before, and pieces that are only cut."""
    normalizers = _steps(_described(backend.normalizer), "normalizers")
    cutters = _steps(_described(backend.pre_tokenizer), "pretokenizers")
    if any(step["type"] != "NFC" for step in normalizers):
        return False
    levels = [step for step in cutters if step["type"] == "ByteLevel"]
    for step in cutters:
        is_cut = step["type"] == "Digits" or (step["type"] == "Split" and step["behavior"] != "Removed")
        if step not in levels and not is_cut:
            return False
    return len(levels) == 1 and not levels[0]["add_prefix_space"]


def _described(part: Any) -> bytes:
    """A part of a tokenizer as the JSON that it is saved as; nothing where there is none."""
    return b"" if part is None else part.__getstate__()


def _steps(described: bytes, several: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, which may be a sequence of sequences."""
    waiting = [json.loads(described)] if described else []
    steps = []
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = step[several] + waiting
        else:
            steps.append(step)
    return steps
