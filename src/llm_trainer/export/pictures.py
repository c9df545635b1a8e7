"""What a model that sees is asked: pictures made by a rule, texts and conversations that show them, and what it answers.

A picture is its size: the same everywhere, so no file of it is kept. Their sizes and shapes differ, as processors cut, fill and
count by these; each has slopes, edges and a fine grain, of another course in every colour, so that another way to resize,
another mean or colours in another order all give other numbers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = ((64, 64), (48, 80), (96, 32))  # height and width
LONGEST_LOOK = 4096  # tokens; some processors make thousands of a picture
NUM_SAMPLED = 64  # numbers of a tensor
# Of numbers between about -3 and 3. Another way to resize moves them by hundredths, another backend of transformers too.
SAME_NUMBERS = 1e-4


class Showing(NamedTuple):
    """A text or a conversation with pictures in it.

    Attributes:
        said: a text, or messages as `data/read/schemas.py` has them; every `<image>` in it is a picture.
        pictures: of each, which one of `Questions.pictures`.
        add_generation_prompt: the text of a conversation ends where the assistant begins to write.
        num_answered: tokens of a greedy answer; 0: none is asked.
    """

    said: str | list[dict[str, str]]
    pictures: list[int]
    add_generation_prompt: bool = False
    num_answered: int = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """Of a conversation."""
        assert not isinstance(self.said, str)
        return self.said

    def described(self, pictures: Sequence[Sequence[int]]) -> str:
        """`the text with pictures of 64 x 64, 48 x 80`"""
        kind = "text" if isinstance(self.said, str) else "conversation"
        sizes = [" x ".join(map(str, pictures[number])) for number in self.pictures]
        return f"the {kind} with pictures of {', '.join(sizes)}"


SHOWINGS = (
    Showing("Here <image> is one, and <image>\nanother one.", [0, 1]),
    Showing([{"role": "user", "content": "<image>\nWhat is in the picture?"}], [1], add_generation_prompt=True),
    Showing(
        [
            {"role": "user", "content": "Which is wider: <image> or <image>?"},
            {"role": "assistant", "content": "The second one."},
        ],
        [2, 0],
    ),
)


class Shown(NamedTuple):
    """A showing before a model sees it.

    Attributes:
        text: as the template prints it, with one marker per picture.
        ids: with all placeholders of every picture.
    """

    text: str
    ids: list[int]


class Look(NamedTuple):
    """What a model makes of a showing.

    Attributes:
        shown: what it is given.
        logprobs: of every token but the first and the placeholders, in nats.
        answer: ids of the likeliest tokens, with the stop token that ended them, if one did.
        margins: of each, in nats: how far the second likeliest token was behind.
        problem: why there is no more than this; empty: there is.
    """

    shown: Shown
    logprobs: list[float]
    answer: list[int]
    margins: list[float]
    problem: str = ""

    @classmethod
    def failed(cls, problem: object, shown: Shown | None = None) -> "Look":
        """One that ended with an error."""
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        return cls(shown or Shown("", []), [], [], [], lines[0][:300])


def scored_places(ids: Sequence[int], placeholder: int) -> list[int]:
    """The places before tokens whose log-probabilities are asked.

    NOTE: a picture may be thousands of placeholders, and the logits of all of them gigabytes.
    """
    return [place for place, after in enumerate(ids[1:]) if after != placeholder]


# Of a tensor that a processor makes of a picture: its shape, and numbers spread over it, the mean of all before them.
Numbers = dict[str, tuple[list[int], list[float]]]


def draw(height: int, width: int) -> "Image":
    """The picture of a size, RGB."""
    from PIL import Image

    rows, columns = np.indices((height, width))
    red = columns * 255 // max(1, width - 1)
    green = (rows // 5 + columns // 7) % 2 * 200 + rows * 55 // max(1, height - 1)
    grain = (rows * 7919 + columns * 104729 + rows * columns * 31) % 97
    blue = np.where(rows * width < columns * height, 250 - grain, grain)
    return Image.fromarray(np.stack([red, green, blue], axis=-1).astype(np.uint8))


def sampled(tensors: Mapping[str, Any]) -> Numbers:
    """What is kept of the tensors that a processor makes of a picture."""
    found: Numbers = {}
    for name, tensor in sorted(tensors.items()):
        values = np.asarray(tensor, dtype=np.float64)
        flat = values.reshape(-1)
        places = np.arange(min(flat.size, NUM_SAMPLED))
        if flat.size > NUM_SAMPLED:
            places = places * golden_step(flat.size) % flat.size
        numbers = [float(flat.mean()), *flat[places].tolist()] if flat.size else []
        found[name] = list(values.shape), [round(number, 6) for number in numbers]
    return found


def other_numbers(wanted: Numbers, there: Numbers) -> str:
    """How the numbers of a picture differ, in words; empty: they do not."""
    if wanted.keys() != there.keys():
        return f"expected {', '.join(wanted)}, found {', '.join(there)}"
    for name, (shape, numbers) in wanted.items():
        other_shape, others = there[name]
        if list(shape) != list(other_shape):
            return f"{name}: expected {list(shape)} numbers, found {list(other_shape)}"
        apart = [abs(one - other) for one, other in zip(numbers, others, strict=True)]
        if not all(distance <= SAME_NUMBERS for distance in apart):  # NaN is beyond any limit
            place = apart.index(max(apart))
            return (
                f"{name}: {apart[place]:.3g} apart at worst, expected {numbers[place]:.4f}, found {others[place]:.4f}"
            )
    return ""


def golden_step(size: int) -> int:
    """A step that leads through all of `size` places, spread evenly from the first on."""
    step = 1 + int(size * 0.618)
    while math.gcd(step, size) != 1:
        step += 1
    return step
