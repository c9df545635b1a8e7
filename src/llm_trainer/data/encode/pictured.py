"""Images in rendered text: where they stand, what stands for them, and where their tokens are in the end.

A chat template prints one marker per image. What the processor puts in its place is tokenised with the text around it, each
run of placeholders cut down to one, and grows to its length among the ids. Which tokens are trained on is decided in characters
as without images, and those of an image never are.
"""

import json
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm_trainer.config.errors import counted
from llm_trainer.data.encode.spans import Span
from llm_trainer.data.encode.templates import IMAGE_MARK, ChatTemplateError, Message, Rendered
from llm_trainer.data.images import ImageRef
from llm_trainer.data.read.messages import IMAGE

if TYPE_CHECKING:
    from llm_trainer.data.vision import ImageFormat

PLACES, REFS, BYTES = IMAGE_COLUMNS = ("image_places", "image_refs", "image_bytes")  # of a store of rows with images
PLACE_SIZE = (
    6  # numbers of a use: which sequence of the row, which of its images, start, first placeholder, stop, tower
)


NO_IMAGE = (
    "placeholders of images among the tokens that belong to no image; expected those of the images alone: no answer may hold "
    "the placeholder as text"
)


class Place(NamedTuple):
    """Where an image stands among the tokens of a sequence."""

    start: int  # its first token, whatever that is
    first: int  # its first placeholder
    stop: int  # behind its last token
    tower: int  # patches that the tower sees

    def behind(self, tokens: int) -> "Place":
        """The same behind so many further tokens."""
        return Place(self.start + tokens, self.first + tokens, self.stop + tokens, self.tower)


class Pictured(NamedTuple):
    """A rendered text with images in it, ready to be tokenised."""

    rendered: Rendered
    spans: list[Span]  # that are trained on, and behind these those of the images
    weights: list[float]  # of the spans; of an image -1, -2, ...
    runs: list[tuple[int, ...]]  # of each image, how long each of its runs of placeholders is
    towers: list[int]


def with_image_marks(text: str, change: Callable[[str], str]) -> str:
    """A text whose `<image>`s are marks, and what is between them changed."""
    return IMAGE_MARK.join(map(change, text.split(IMAGE)))


def joined(pieces: Sequence[Rendered], marker: str) -> Rendered:
    """Texts with a marker between each two."""
    literals: list[int] = []
    done = 0
    for piece in pieces:
        literals += [done + place for place in piece.literals]
        done += len(piece.text) + len(marker)
    return Rendered(marker.join(piece.text for piece in pieces), [], frozenset(literals))


def shown(messages: Sequence[Message], how: str, marker: str) -> list[Message]:
    """Messages as a template takes them.

    Args:
        messages: with marks in their text.
        how: 'text': the marker stands in it; 'some': contents with images are lists of parts; 'all': all contents are.
        marker: what stands for an image in text.
    """
    found = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str) and (how == "all" or (how == "some" and IMAGE_MARK in content)):
            message = {**message, "content": _parts(content)}
        elif isinstance(content, str) and IMAGE_MARK in content:
            message = {**message, "content": content.replace(IMAGE_MARK, marker)}
        found.append(message)
    return found


def _parts(content: str) -> list[dict[str, str]]:
    parts = []
    for number, piece in enumerate(content.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts


def taken_by(render: Callable[[Sequence[Message]], str], marker: str) -> str:
    """How a template takes images: 'some', 'all' or 'text' of `shown`, the first that prints what is said and shown."""
    asked = [{"role": "user", "content": f"{IMAGE_MARK}?1?"}, {"role": "assistant", "content": "?2?"}]
    for how in ("some", "all"):
        try:
            text = render(shown(asked, how, marker))
        except ChatTemplateError:
            continue
        if text.count(marker) == 1 and "?1?" in text and "?2?" in text:
            return how
    return "text"


def expanded(
    rendered: Rendered, spans: Sequence[Span], weights: Sequence[float], refs: Sequence[ImageRef], images: "ImageFormat"
) -> Pictured:
    """The text with what stands for each image in the place of its marker.

    Raises:
        ChatTemplateError: the template has not printed one marker per image.
    """
    found = [m.span() for m in re.finditer(re.escape(images.marker), rendered.text)]
    markers = [span for span in found if span[0] not in rendered.literals]
    if len(markers) != len(refs):
        raise ChatTemplateError(
            f"{len(markers)} times the marker {images.marker} in a text with {counted(len(refs), 'image')}; expected it once "
            "per image, from the template alone: no answer may hold it as text"
        )
    # 1. the text, and where its characters go
    pieces, done, length = [], 0, 0
    stops, shifts, blocks = [0], [0], []  # from character stops[k] on, positions move by shifts[k]
    known = [images.tokens(ref.height, ref.width) for ref in refs]
    for (start, stop), one in zip(markers, known, strict=True):
        pieces += [rendered.text[done:start], one.text]
        length += start - done
        blocks.append((length, length + len(one.text)))
        length += len(one.text)
        done = stop
        stops.append(stop)
        shifts.append(length - stop)
    pieces.append(rendered.text[done:])

    def moved(position: int) -> int:
        return position + shifts[int(np.searchsorted(stops, position, side="right")) - 1]

    # 2. what is known by characters
    text = Rendered("".join(pieces), [], frozenset(map(moved, rendered.literals)))
    numbers = [-float(number + 1) for number in range(len(refs))]
    return Pictured(
        text,
        [(moved(start), moved(stop)) for start, stop in spans] + blocks,
        [*(weights or [1.0] * len(spans)), *numbers],
        [one.runs for one in known],
        [one.tower for one in known],
    )


def grown(
    ids: Sequence[int], values: Sequence[float], pictured: Pictured, image_token_id: int
) -> tuple[list[int], list[float], list[Place]]:
    """Ids with all placeholders of each image, what each token weighs (0 in an image), and where the images stand.

    Args:
        ids: `[T]`, with one placeholder per run.
        values: `[T]` weights of the tokens, below 0 in images.
        pictured: what was tokenised.
        image_token_id: the placeholder.

    Raises:
        ChatTemplateError: placeholders that belong to no image, or images without them.
    """
    runs = list(chain.from_iterable(pictured.runs))
    owners = list(chain.from_iterable([number] * len(one) for number, one in enumerate(pictured.runs)))
    places: list[Place | None] = [None] * len(pictured.runs)
    out: list[int] = []
    weights: list[float] = []
    used = 0
    for token, value in zip(ids, values, strict=True):
        repeats = 1
        if token == image_token_id:
            if used == len(runs) or value != -(owners[used] + 1):
                used = -1
                break
            repeats = runs[used]
        if value < 0:
            number = int(-value) - 1
            before = places[number] or Place(len(out), -1, 0, pictured.towers[number])
            first = before.first
            if first < 0 and token == image_token_id:
                first = len(out)
            places[number] = before._replace(first=first, stop=len(out) + repeats)
        if token == image_token_id:
            used += 1
        out += [token] * repeats
        weights += [max(value, 0.0)] * repeats
    if used != len(runs):
        raise ChatTemplateError(NO_IMAGE)
    return out, weights, [place for place in places if place is not None]


def find_places(ids: np.ndarray, refs: Sequence[ImageRef], images: "ImageFormat") -> list[Place]:
    """Where images stand in ids whose placeholders are there already.

    Raises:
        ChatTemplateError: these are not the placeholders of these images.
    """
    places = []
    done = 0
    holders = (ids == images.image_token_id).nonzero()[0]
    for number, ref in enumerate(refs):
        tokens = np.asarray(images.ids(ref.height, ref.width))
        own = (tokens == images.image_token_id).nonzero()[0]
        inner = tokens[own[0] : own[-1] + 1]
        following = holders[holders >= done]
        first = int(following[0]) if len(following) else len(ids)
        if not np.array_equal(ids[first : first + len(inner)], inner):
            raise ChatTemplateError(
                f"other placeholders than the {len(own)} of image {number + 1} ({ref.height} x {ref.width} pixels) from token "
                f"{first} on; expected ids made with this processor, each image's placeholders one after another"
            )
        done = first + len(inner)
        places.append(Place(first, first, done, images.tower_tokens(ref.height, ref.width)))
    if (holders >= done).any():
        raise ChatTemplateError(
            f"{int((holders >= done).sum())} placeholders behind those of the {counted(len(refs), 'image')}; expected none"
        )
    return places


# --- columns of a store


def image_columns(sequences: Sequence[tuple[Sequence[ImageRef], Sequence[Place]]]) -> dict[str, np.ndarray]:
    """The images of a row, each distinct one once, and their uses.

    Args:
        sequences: of each sequence of tokens in the row its images and where they stand.
    """
    refs: dict[str, tuple[int, ImageRef]] = {}
    table = []
    for number, (images, places) in enumerate(sequences):
        for ref, place in zip(images, places, strict=True):
            which, _ = refs.setdefault(ref.digest, (len(refs), ref))
            table.append((number, which, *place))
    facts, data = [], []
    for _, ref in refs.values():
        source: str | int = ref.source if isinstance(ref.source, str) else len(ref.source)
        facts.append([source, ref.height, ref.width, ref.digest])
        if isinstance(ref.source, bytes):
            data.append(ref.source)
    described = json.dumps(facts, ensure_ascii=False).encode() if facts else b""
    return {
        PLACES: np.asarray(table, dtype=np.uint32).reshape(-1),
        REFS: np.frombuffer(described, dtype=np.uint8),
        BYTES: np.frombuffer(b"".join(data), dtype=np.uint8),
    }


def refs_of(described: np.ndarray, data: np.ndarray) -> list[ImageRef]:
    """The images of a row of a store, as `image_columns` wrote them."""
    if not len(described):
        return []
    refs: list[ImageRef] = []
    done = 0
    for given, *facts in json.loads(described.tobytes()):
        source: str | bytes = given
        if isinstance(given, int):  # how many bytes it has
            source = data[done : done + given].tobytes()
            done += given
        refs.append(ImageRef(source, *facts))
    return refs


def no_images() -> dict[str, np.ndarray]:
    """The columns of a row without images."""
    return image_columns([])
