"""Which image stands where in a sample: those of its turns' parts, and those that the row lists beside its text."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llm_trainer.config.errors import counted
from llm_trainer.data.read.errors import DataError, Location
from llm_trainer.data.read.json_text import parse_json
from llm_trainer.data.read.messages import IMAGE, Message, image_source

IMAGE_KEYS = ("images", "image")  # columns of a row
_TURNS = ("messages", "prompt", "completion", "chosen", "rejected")  # of a sample, in the order in which they are read
_TEXTS = ("text", "prompt", "completion")


def images_of(row: Any, location: Location) -> list[str | bytes]:
    """Sources of the images that a row lists in a column: paths, bytes, `{"bytes", "path"}` or images in memory."""
    if not isinstance(row, dict):
        return []
    key = next((name for name in IMAGE_KEYS if row.get(name)), None)
    if key is None:
        return []
    listed, here = row[key], location.at(key)
    if isinstance(listed, str) and listed.lstrip().startswith("["):  # tables hold text
        listed = parse_json(listed, here)
    if not isinstance(listed, list | tuple):
        listed = [listed]
    return [image_source(image, here.at(i)) for i, image in enumerate(listed)]


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
