"""Which image stands where in a sample: those of its turns' parts, and those that the row lists beside its text."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from llm_trainer.config.errors import counted
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.json_text import parse_json
from llm_trainer.data.read.messages import IMAGE, Message, image_source, own_source

IMAGE_KEYS = ("images", "image")  # columns of a row
_TURNS = ("messages", "prompt", "completion", "chosen", "rejected")  # of a sample, in the order in which they are read
_TEXTS = ("text", "prompt", "completion")


def images_of(row: Any, location: Location) -> list[str | bytes]:
    """Sources of the images that a row lists in a column: paths, bytes, `{"bytes", "path"}` or images in memory."""
    key = _column_of(row)
    if key is None:
        return []
    here = location.at(key)
    return [image_source(image, here.at(i)) for i, image in enumerate(_listed(row[key], here))]


def _column_of(row: Any) -> str | None:
    """The column that lists the images of a row; None: it has none, or nothing in it."""
    if not isinstance(row, dict):
        return None
    return next((name for name in IMAGE_KEYS if row.get(name)), None)


def _listed(value: Any, location: Location) -> Sequence[Any]:
    """The images in such a column, as they are."""
    if isinstance(value, str) and value.lstrip().startswith("["):  # tables hold text
        value = parse_json(value, location)
    return value if isinstance(value, list | tuple) else [value]


def num_named(row: Any, location: Location) -> int:
    """How many images a row names that nothing was made of: in its column, and in parts of its turns."""
    number, key = 0, _column_of(row)
    if key is not None:
        with suppress(DataError):
            number = len(_listed(row[key], location))
        row = {name: value for name, value in row.items() if name not in IMAGE_KEYS}
    return number + _num_in_parts(row)


def _num_in_parts(value: Any) -> int:
    """How many parts of contents, anywhere in a value, bring an image."""
    if isinstance(value, list | tuple):
        return sum(map(_num_in_parts, value))
    if not isinstance(value, dict):
        return 0
    if own_source(value) is not None:
        return 1
    return sum(map(_num_in_parts, value.values()))


def with_images(sample: dict[str, Any], listed: Sequence[str | bytes], location: Location) -> dict[str, Any]:
    """A sample whose turns, or whose texts as a whole, have the sources of their images in `images`.

    Args:
        sample: of any kind.
        listed: images beside the text, for every `<image>` that has no source of its own.
        location: of the row.

    Raises:
        DataError: not as many `<image>` as images.
    """
    if "images" in sample:  # the schema has found them
        listed = sample["images"]
        sample = {key: value for key, value in sample.items() if key != "images"}
    remaining: Iterator[Any] = iter(listed)
    found, sources = dict(sample), list[Any]()
    for key in _TURNS:
        if not isinstance(sample.get(key), list):
            continue
        turns = []
        for turn in sample[key]:
            shown = [next(remaining, None) if source is None else source for source in _slots(turn)]
            sources += shown
            if shown:
                turn = {**turn, "images": shown}
            turns.append(turn)
        found[key] = turns
    in_text = sum(sample[key].count(IMAGE) for key in _TEXTS if isinstance(sample.get(key), str))
    if in_text:
        found["images"] = [next(remaining, None) for _ in range(in_text)]
        sources += found["images"]
    _check_count(sources, list(remaining), location)
    return found


def without_images(turns: Sequence[Message]) -> list[Message]:
    """The same turns without what they show."""
    return [_without(turn) for turn in turns]


def _without(turn: Message) -> Message:
    return {key: value for key, value in turn.items() if key != "images"}  # type: ignore[return-value]


def all_images(sample: dict[str, Any]) -> list[Any]:
    """What `with_images` has put into a sample, in the order of its text."""
    found = list(sample.get("images", ()))
    for key in _TURNS:
        if isinstance(sample.get(key), list):
            for turn in sample[key]:
                found += turn.get("images", ())
    return found


def num_shown(sample: dict[str, Any]) -> int:
    """How many images the conversations of a sample show; both answers to a prompt show its images."""
    number = len(all_images(sample))
    if "chosen" in sample:
        number += sum(len(turn.get("images", ())) for turn in sample["prompt"])
    return number


def resolved(sample: dict[str, Any], look: Callable[[Any], Any]) -> dict[str, Any]:
    """A sample whose images are what `look` makes of their sources."""
    found = dict(sample)
    if "images" in sample:
        found["images"] = [look(source) for source in sample["images"]]
    for key in _TURNS:
        if isinstance(sample.get(key), list):
            found[key] = [_resolved_turn(turn, look) for turn in sample[key]]
    return found


def _resolved_turn(turn: Any, look: Callable[[Any], Any]) -> Any:
    if "images" not in turn:
        return turn
    return {**turn, "images": [look(source) for source in turn["images"]]}


def _slots(turn: Message) -> list[Any]:
    """For each `<image>` of a turn its own source, or None."""
    own = turn.get("images")
    return own if own is not None else [None] * turn["content"].count(IMAGE)


def _check_count(sources: Sequence[Any], left: Sequence[Any], location: Location) -> None:
    num_images = sum(source is not None for source in sources) + len(left)
    if num_images != len(sources):
        found = f"{counted(len(sources), f'{IMAGE} marker')} and {counted(num_images, 'image')}"
        raise DataError(location, found, "one marker per image", "repair the text or the list", "image_count")
